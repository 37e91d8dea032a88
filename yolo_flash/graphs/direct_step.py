"""The optimizer step of Ultralytics' trainer without the search for its tensors.

Ultralytics' step walks through all modules and looks up the gradient, the state and the kind of every parameter several
times: on the host that takes longer than to launch its kernels. Here lists of the tensors are made once, and the step
calls the operators that Ultralytics' and torch's own functions end up calling, in their order, on the same tensors,
with the same numbers. The bits are the same for any learning rate, and the optimizer, the scaler and the EMA stay what
they are: their states, checkpoints and resumed runs know of nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import optimizer as torch_optimizer
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.optim import muon as ultralytics_muon

from .clipping import recurring_clip
from .muon import recurring_muon
from .recurring import Recurring

OF_MODULES = frozenset(
    {"parameters", "named_parameters", "_named_members", "named_modules"}
)  # which `parameters` calls
OF_SCALER = frozenset({"unscale_", "_unscale_grads_", "step", "_maybe_opt_step", "_check_scale_growth_tracker"})
OF_OPTIMIZER = frozenset({"zero_grad", "_init_group", "grad_scale", "found_inf"})  # and `step`, which schedulers wrap

_OPTIONS = ("foreach", "fused", "amsgrad", "maximize", "capturable", "differentiable", "use_muon", "nesterov")
_NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps")
HELPERS = (  # functions of modules that a step calls
    (torch.nn.utils, "clip_grad_norm_"),
    (ultralytics_muon, "muon_update"),
    (ultralytics_muon, "zeropower_via_newtonschulz5"),
)
HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)


@dataclass
class Part:
    """The parameters with a gradient of one parameter group, and their state.

    Attributes:
        group: The optimizer's own, whose learning rate, momentum and weight decay are read in every step.
        parameters: In the order of the group.
        state: Name -> the tensor of every parameter.
        muon: `muon_update`; None for a group without.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    state: dict[str, list[Tensor]]
    muon: Recurring | None = None


class Rule(NamedTuple):
    """How an optimizer updates a group.

    Attributes:
        update: Takes the optimizer, a part, its gradients, and 1 in a tensor if a gradient overflowed, or None.
        state: Names of a parameter's state, in a group.
        why_not: Why a group's options are not supported; empty if they are.
        skips_on_device: Whether the kernels leave all as it is after an overflow. Else the host has to know, and waits
            for the backward, as it does with the optimizer's own step.
    """

    update: Callable[[Any, Part, list[Tensor], Tensor | None], None]
    state: Callable[[dict[str, Any]], Sequence[str]]
    why_not: Callable[[dict[str, Any]], str]
    skips_on_device: bool = False


class DirectStep:
    """The step of one trainer as its lists were made; a call refuses to step when what they were made of has changed.

    Attributes:
        recurring: What may come from graphs: clipping, and the updates of Muon.
    """

    def __init__(self, trainer: Any, parts: list[Part], clip: Recurring) -> None:
        """Take lists for which `direct_step` has looked."""
        self._trainer, self._parts, self._clip = trainer, parts, clip
        self._model, self._optimizer, self._scaler = trainer.model, trainer.optimizer, trainer.scaler
        self._rule = RULES[type(self._optimizer)]
        modules = list(self._model.modules())
        self._children = [held for module in modules for held in (module._parameters, module._modules)]
        in_model = list(self._model.parameters())
        # All parameters once, those of the model first: the norm of all gradients is a sum in the model's order.
        self._all = list(dict.fromkeys([*in_model, *_in_groups(self._optimizer)]))
        self._there = [p.grad is not None for p in self._all]
        place = {id(p): i for i, p in enumerate(p for p in self._all if p.grad is not None)}
        self._order = [[place[id(p)] for p in part.parameters] for part in parts]
        self._unscaled = [*chain.from_iterable(self._order)]
        self._count = sum(self._there[: len(in_model)])  # gradients that are clipped
        self._updated = [p for part in parts for p in part.parameters]
        self._kind = {(p.device, p.dtype, torch.strided) for p in self._updated}
        self.recurring = [clip, *(part.muon for part in parts if part.muon is not None)]
        self._read = self._now()
        children = chain.from_iterable(held.values() for held in self._children)
        self._held = [*self._optimizer.param_groups, *self._states(), *children]  # for no other to get the id of one

    def __call__(self) -> bool:
        """Unscale, clip, update, and average the weights; False, with nothing done, if the lists are out of date."""
        trainer, optimizer, scaler = self._trainer, self._optimizer, self._scaler
        if (trainer.model, trainer.optimizer, trainer.scaler) != (self._model, optimizer, scaler):
            return False
        gradients = [p.grad for p in self._all]
        if [gradient is not None for gradient in gradients] != self._there or self._now() != self._read:
            return False
        present = [gradient for gradient in gradients if gradient is not None]
        if {(gradient.device, gradient.dtype, gradient.layout) for gradient in present} != self._kind:
            return False
        with torch.no_grad():
            self._update(present)
        scaler.update()
        for p in self._updated:
            p.grad = None
        del gradients, present
        if trainer.ema:
            trainer.ema.update(self._model)
        return True

    def _update(self, gradients: list[Tensor]) -> None:
        optimizer, scaler = self._optimizer, self._scaler
        scale = scaler._scale if scaler.is_enabled() else None
        gradients, found_inf = self._clip(gradients, self._unscaled, self._count, scale)
        if scale is not None:  # noted as `unscale_` and `step` do it, for `update`
            noted = {"stage": OptState.STEPPED, "found_inf_per_device": {scale.device: found_inf}}
            scaler._per_optimizer_states[id(optimizer)] = noted
        if "step" in vars(optimizer):
            optimizer._opt_called = True  # as the wrapper of a scheduler notes it
        if scale is not None and not self._rule.skips_on_device and found_inf.item():
            return
        for part, order in zip(self._parts, self._order, strict=True):
            self._rule.update(optimizer, part, [gradients[i] for i in order], found_inf)

    def _now(self) -> list[Any]:
        """All that the lists depend on, to be compared with what it was; takes 0.2 ms for a small YOLO."""
        optimizer, scaler = self._optimizer, self._scaler
        found: list[Any] = [
            bool(scaler.is_enabled() and (scaler._scale is None or id(optimizer) in scaler._per_optimizer_states)),
            OF_MODULES.isdisjoint(vars(self._model)),
            OF_SCALER.isdisjoint(vars(scaler)),
            OF_OPTIMIZER.isdisjoint(vars(optimizer)),
            vars(optimizer).get("step"),
            getattr(optimizer, "_step_supports_amp_scaling", False),
            any(HOOKS) or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks),
            *functions(optimizer),
            *map(id, optimizer.param_groups),
            *map(id, _in_groups(optimizer)),
            *map(id, self._states()),
            *map(id, chain.from_iterable(held.values() for held in self._children)),
        ]
        for group in optimizer.param_groups:
            found += options(group)
        return found

    def _states(self) -> Any:
        return chain.from_iterable(state.values() for state in self._optimizer.state.values())


def direct_step(trainer: Any, no_graphs: str = "") -> DirectStep | None:
    """The direct step of a trainer with gradients for which `why_not_direct` found nothing.

    Args:
        trainer: Ultralytics' trainer, before an optimizer step.
        no_graphs: Why no part of it is to come from graphs; empty if they may.

    Returns:
        The step; None if the optimizer's own has to make states of parameters first, or there is no gradient.
    """
    optimizer = trainer.optimizer
    rule, parts = RULES[type(optimizer)], []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        names = rule.state(group)
        states = [optimizer.state.get(p, {}) for p in parameters]
        if not all(isinstance(state.get(name), Tensor) for state in states for name in names):
            return None
        if parameters:
            state = {name: [state[name] for state in states] for name in names}
            muon = recurring_muon(no_graphs) if group.get("use_muon") else None
            parts.append(Part(group, parameters, state, muon))
    return DirectStep(trainer, parts, recurring_clip(no_graphs)) if parts else None


def functions(optimizer: Any) -> list[Any]:
    """Functions of classes and modules whose work the direct step does, of whatever owner they are by now."""
    kind = type(optimizer)
    return [
        BaseTrainer.optimizer_step,
        *(getattr(GradScaler, name) for name in sorted(OF_SCALER)),
        kind.step,
        kind.zero_grad,
        nn.Module.parameters,
        *(getattr(space, name) for space, name in HELPERS),
    ]


def options(group: dict[str, Any]) -> list[Any]:
    """What decides the operators for a group, of the numbers their types alone."""
    decays, moves = bool(group["weight_decay"]), bool(group.get("momentum"))
    return [*map(group.get, _OPTIONS), decays, moves, *map(type, numbers(group))]


def numbers(group: dict[str, Any]) -> list[Any]:
    """The numbers of a group, which may change in every step."""
    return [*(group[name] for name in _NUMBERS if name in group), *group.get("betas", ())]


def _in_groups(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _adam(update: Callable[..., Any]) -> Callable[[Any, Part, list[Tensor], Tensor | None], None]:
    def adam(optimizer: Any, part: Part, gradients: list[Tensor], found_inf: Tensor | None) -> None:
        group, state = part.group, part.state
        beta1, beta2 = group["betas"]
        torch._foreach_add_(state["step"], 1)
        update(
            part.parameters,
            gradients,
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            state["step"],
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(state["step"], [found_inf] * len(part.parameters))

    return adam


def _sgd(optimizer: Any, part: Part, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    group, buffers = part.group, part.state["momentum_buffer"]
    if group["weight_decay"] != 0:
        gradients = list(torch._foreach_add(gradients, part.parameters, alpha=group["weight_decay"]))
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, gradients, alpha=1 - group["dampening"])
    if group["nesterov"]:
        torch._foreach_add_(gradients, buffers, alpha=group["momentum"])
    torch._foreach_add_(part.parameters, gradients if group["nesterov"] else buffers, alpha=-group["lr"])


def _musgd(optimizer: Any, part: Part, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    group, state = part.group, part.state
    lr, momentum, buffers = group["lr"], group["momentum"], state["momentum_buffer"]
    if group["use_muon"] and part.muon is not None:
        updates = part.muon(gradients, buffers, momentum, group["nesterov"])
        torch._foreach_add_(part.parameters, updates, alpha=-(lr * optimizer.muon))
        lr, buffers = lr * optimizer.sgd, state["momentum_buffer_SGD"]
    if group["weight_decay"] != 0:
        gradients = list(torch._foreach_add(gradients, part.parameters, alpha=group["weight_decay"]))
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    updates = torch._foreach_add(gradients, buffers, alpha=momentum) if group["nesterov"] else buffers
    torch._foreach_add_(part.parameters, updates, alpha=-lr)


def _adam_why_not(group: dict[str, Any]) -> str:
    return "" if group.get("fused") else "it is not fused"


def _sgd_why_not(group: dict[str, Any]) -> str:
    if group.get("fused") or group.get("foreach") is False:
        return "it was asked for fused or one by one"
    return "" if group["momentum"] else "it has no momentum"


def _momentum(group: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer", "momentum_buffer_SGD") if group.get("use_muon") else ("momentum_buffer",)


RULES: dict[type, Rule] = {
    kind: Rule(_adam(update), lambda group: ("step", "exp_avg", "exp_avg_sq"), _adam_why_not, skips_on_device=True)
    for kind, update in ((torch.optim.AdamW, torch._fused_adamw_), (torch.optim.Adam, torch._fused_adam_))
}
RULES[torch.optim.SGD] = Rule(_sgd, _momentum, _sgd_why_not)
RULES[ultralytics_muon.MuSGD] = Rule(_musgd, _momentum, lambda group: "")
