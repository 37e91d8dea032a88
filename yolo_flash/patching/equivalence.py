"""Whether an attention block still computes what ours computes: Ultralytics may change it, and forks do.

A twin of the block runs in its place, on the CPU, so that nothing of the block itself runs, moves or changes. The twin
has random weights, since fresh ones hide attention, and computes in float64, where the smallest edit of a number
exceeds rounding. A forward that is not Ultralytics' or torch's own is not run: it may have side effects, such as
keeping the scores.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..utils.numerics import relative_error
from ..utils.stock_code import foreign
from .class_swap import PREFIX, StockPickle, become

if TYPE_CHECKING:
    from .blocks import FlashBlock

ALLOWED = 1e-5  # float64 rounds at 1e-15; a block may cast to float32, which rounds at 1e-6

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (str, int, float, bool, type(None))
_MAX_ANSWERS = 1024  # a user may give a block another number in every step
_answers: dict[Any, str] = {}


def why_not_equal(block: nn.Module, cls: type[FlashBlock]) -> str:
    """Why `cls` cannot stand in for a stock block, as a sentence; empty if both compute the same.

    Blocks that are equal in everything that the answer depends on are compared once a process.

    Args:
        block: An instance of the stock class of `cls`, or one that is patched already.
        cls: Our class for it.
    """
    if "forward" in vars(block):
        return "its forward was replaced on the instance"
    if replaced := foreign([block], ["forward"]) or foreign(*cls.calls):
        return f"{replaced} is not the one of the installed release but somebody else's"
    # A tensor counts by its shape: twins have values of their own, and hooks set weights in every forward.
    attributes = {
        name: value.shape if isinstance(value, Tensor) else value
        for name, value in vars(block).items()
        if name not in _OF_EVERY_MODULE and not name.startswith(PREFIX)
    }
    if not all(isinstance(value, (*_PLAIN, torch.Size)) for value in attributes.values()):
        return _compare(block, cls)
    key = (
        cls,
        tuple(value for value in vars(cls._stock).values() if callable(value)),
        tuple((name, type(value), value) for name, value in attributes.items()),
        tuple((name, type(module)) for name, module in block.named_modules()),
        tuple((name, t.shape) for name, t in (*block.named_parameters(), *block.named_buffers())),
    )
    if key not in _answers:
        if len(_answers) >= _MAX_ANSWERS:
            _answers.clear()
        _answers[key] = _compare(block, cls)
    return _answers[key]


def _compare(block: nn.Module, cls: type[FlashBlock]) -> str:
    """Run a twin by the stock forward and by ours, in training mode and in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    dispatcher = Dispatcher(FlashConfig(backend="sdpa_math"))
    worst = 0.0
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            twin = _twin(block, generator)
            become(twin, cls, layer="", choice="sdpa_math", dispatcher=dispatcher)
            for given in _inputs(twin, generator):
                for training in (True, False):
                    for module in twin.modules():
                        module.training = training
                    wanted, found = (_run(stock_or_ours, twin, given) for stock_or_ours in (cls._stock, cls))
                    if found.shape != wanted.shape:
                        return f"its output is {list(wanted.shape)}, ours {list(found.shape)}"
                    error = relative_error(found, wanted)
                    worst = error if not error <= worst else worst  # NaN stays
    except Exception as error:  # a block that is put together differently raises anything
        return f"it could not be compared with ours ({type(error).__name__}: {error})"
    if worst <= ALLOWED:
        return ""
    return f"its output is {100 * worst:.3g}% off ours on a test input, {100 * ALLOWED:.3g}% is allowed"


def _run(cls: Any, twin: nn.Module, given: dict[str, Tensor]) -> Tensor:
    torch.default_generator.manual_seed(0)  # for dropout and the like
    out = cls.forward(twin, **given)
    return out[0] if isinstance(out, tuple) else out


def _inputs(block: Any, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Small inputs whose batch, height and width differ, so that no two of them can be confused."""

    def sample(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device="cpu").normal_(generator=generator)

    if isinstance(block, nn.MultiheadAttention):
        query, value = sample(3, 5, block.embed_dim), sample(3, 5, block.vdim)
        key = query if block.kdim == block.embed_dim else sample(3, 5, block.kdim)
        tokens = 5 if block.batch_first else 3
        given = {"query": query, "key": key, "value": value}
        return [given, {**given, "attn_mask": torch.ones(tokens, tokens, dtype=torch.bool, device="cpu").triu(1)}]
    channels = next(t.shape[1] for t in block.qkv.parameters() if t.ndim == 4)
    return [{"x": sample(2, channels, 3, 2 * getattr(block, "area", 1))}]


def _twin(module: nn.Module, generator: torch.Generator) -> Any:
    """The same module with random weights, on the CPU in float64. A deepcopy would copy what hooks hold."""
    cls = type(module)
    twin: Any = object.__new__(cls._stock if issubclass(cls, StockPickle) else cls)
    state = twin.__dict__
    for name, value in vars(module).items():
        if name.startswith(PREFIX):
            continue
        if name in ("_parameters", "_buffers"):
            value = {key: None if t is None else _random(t, generator) for key, t in value.items()}
        elif name == "_modules":
            value = {key: None if m is None else _twin(m, generator) for key, m in value.items()}
        elif "_hooks" in name:
            value = {}
        elif isinstance(value, Tensor):
            value = _random(value, generator)
        elif isinstance(value, MethodType) and value.__self__ is module:  # a fused Conv has its forward like that
            value = MethodType(value.__func__, twin)
        state[name] = value
    state["_compiled_call_impl"] = twin.forward  # so `twin()` skips global hooks and `compile()`
    return twin


def _random(t: Tensor, generator: torch.Generator) -> Tensor:
    """Random values none of which vanishes: factors and variances near 1, matrices that keep the norm of a vector."""
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype)
    found = torch.empty(t.shape, dtype=torch.float64, device="cpu")
    if t.ndim < 2:
        return found.uniform_(0.5, 1.5, generator=generator)
    return found.normal_(std=max(math.prod(t.shape[1:]), 1) ** -0.5, generator=generator)
