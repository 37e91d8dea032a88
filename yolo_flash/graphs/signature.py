"""Whether the functions and numbers that a captured step read are still the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.numerics import arithmetic
from ..utils.stock_code import helpers

# Attributes that Ultralytics' code writes while it runs, or that are inputs of a captured loss.
_WRITTEN = frozenset(
    {"anchors", "strides", "shape", "shapes", "valid_mask"}  # of heads in prediction, for images of the last shape
    | {"bs", "n_max_boxes", "_oom_warned"}  # TaskAlignedAssigner
    | {"o2m", "o2o", "updates"}  # E2ELoss, whose weights are an input of the graphs
)

_OF_PYTHON = frozenset(  # attributes of classes that Python adds when it needs them
    {"__slotnames__", "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__"}
)
_PLAIN = (bool, int, float, str)
_GLOBAL_HOOKS: list[Any] = [  # of all modules
    getattr(torch.nn.modules.module, f"_global_{when}_hooks")
    for when in ("forward", "forward_pre", "backward", "backward_pre")
]


class Signature:
    """A snapshot of objects: their attributes, those of their classes, and the functions that the classes call by name.

    A tensor counts by its memory and, unless it is a parameter or buffer, by its version: graphs may hold constants
    made from the tensor. Containers are not looked into, but for those of `nn.Module`.
    """

    def __init__(self, objects: Iterable[Any], tensors: Iterable[Tensor] = (), apart: Any = None) -> None:
        """Take the snapshot.

        Args:
            objects: Modules, or other objects with attributes, such as a criterion.
            tensors: Parameters and buffers, which the step reads and writes in place.
            apart: An object whose `plain_values` do not count.
        """
        objects = self._objects = list(objects)  # held, for no other object to get the id of one of them
        self._tensors = list(tensors)
        modules = [obj for obj in objects if isinstance(obj, nn.Module)]
        self._apart = {} if apart is None else vars(apart)
        self._states = [vars(obj) for obj in objects if not _writes(obj) and obj is not apart]
        self._written = [vars(obj) for obj in objects if _writes(obj) and obj is not apart]
        self._children = [held for m in modules for held in (m._parameters, m._buffers, m._modules) if held]
        self._hooks = [*_GLOBAL_HOOKS, *(held for m in modules for held in _hooks(m))]
        classes = dict.fromkeys(base for obj in objects for base in type(obj).__mro__)
        self._classes = [vars(cls) for cls in classes]
        self._helpers = helpers(objects)
        self._aside = [
            (vars(obj), name)
            for obj in objects
            for name, value in vars(obj).items()
            if isinstance(value, Tensor) and not (name in _WRITTEN and _writes(obj))
        ]
        self._values = self._read()

    @classmethod
    def of_model(cls, model: nn.Module, apart: Any = None) -> Signature:
        """What the kernels of a model depend on beyond its inputs."""
        return cls(network_modules(model), [*model.parameters(), *model.buffers()], apart)

    def changed(self) -> bool:
        """Whether anything has changed since the snapshot; takes some 0.3 ms for a small YOLO."""
        try:
            return self._read() != self._values
        except Exception:  # two tensors or arrays were compared, element by element
            return True

    def _read(self) -> list[Any]:
        found: list[Any] = [
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.are_deterministic_algorithms_enabled(),
            *arithmetic(),
            *map(Tensor.data_ptr, self._tensors),
            *map(attrgetter("requires_grad"), self._tensors),
            *map(id, chain.from_iterable(held.values() for held in self._children)),
            any(self._hooks),
            *(_memory(state.get(name)) for state, name in self._aside),
            *(space.get(name) for space, name in self._helpers),
        ]
        for state in self._states:
            found += state.values()
        for state in self._written:
            kept = (value for name, value in state.items() if name not in _WRITTEN)
            found += [tuple(value) if type(value) is list else value for value in kept]
        for state in self._classes:
            found += [value for name, value in state.items() if name not in _OF_PYTHON]
        found += [
            value for name, value in self._apart.items() if name not in _WRITTEN and not isinstance(value, _PLAIN)
        ]
        return found


def network_modules(model: nn.Module) -> list[nn.Module]:
    """All modules but those of the criterion, which RT-DETR has as a module; a captured loss has a look of its own."""
    losses = (m._modules.get("criterion") for m in model.modules() if hasattr(type(m), "init_criterion"))
    apart = {id(part) for loss in losses if loss is not None for part in loss.modules()}
    return [module for module in model.modules() if id(module) not in apart]


def plain_values(obj: Any) -> tuple[Any, ...]:
    """Names and values of an object's attributes that are numbers or strings."""
    return tuple(item for item in vars(obj).items() if isinstance(item[1], _PLAIN))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks on its forward or backward, which a replay would not call."""
    return any(_GLOBAL_HOOKS) or any(_hooks(module))


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def tensors_aside(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes, such as anchors: a graph still reads those that a module drops."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def kept_graph(model: nn.Module) -> str:
    """The first attribute of a module that holds a tensor of the last step, such as an auxiliary loss; empty if none.

    A replay would leave such a tensor without a gradient.
    """
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            held: Any = list(value.values()) if isinstance(value, dict) else value
            held = held if isinstance(held, (list, tuple)) else (held,)
            if any(isinstance(v, Tensor) and v.grad_fn is not None for v in held):
                return f"{name}.{attribute}".lstrip(".")
    return ""


def _writes(obj: Any) -> bool:
    """Whether the code of an object may write one of the attributes that do not count."""
    if not type(obj).__module__.startswith("ultralytics."):
        return False
    return type(obj).__module__.startswith("ultralytics.utils.") or any(hasattr(obj, name) for name in _WRITTEN)


def _memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return id(value), value.data_ptr(), None if value.is_inference() else value._version
