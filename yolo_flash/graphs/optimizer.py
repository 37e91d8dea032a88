"""When an optimizer step is direct: where all that it does is Ultralytics' and torch's own, and to the bit the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import lr_scheduler
from ultralytics.engine.trainer import BaseTrainer

from ..utils.errors import first_line
from ..utils.stock_code import foreign, foreign_in_class, is_own
from .direct_step import (
    HELPERS,
    HOOKS,
    OF_MODULES,
    OF_OPTIMIZER,
    OF_SCALER,
    RULES,
    DirectStep,
    direct_step,
    functions,
    numbers,
    options,
)

_DEVICES = ("cuda",)
_SHAPES = ((6, 3, 1, 1), (2, 5))  # of a twin's parameters
_FACTORS = (1.0, 100.0, float("inf"), 0.01, 3.0)  # of its gradients: some are clipped, and some overflow


class OptimizerPolicy:
    """Makes the optimizer steps of one training run: direct ones where they may be, else those of its trainer.

    It looks for what forbids direct steps once an epoch, and whenever something changed that lists were made of.

    Attributes:
        why_not: Why steps are not direct; empty before that is looked at, and while they are.
        direct: Direct steps so far.
    """

    def __init__(self, mode: str) -> None:
        """Start with nothing looked at; `mode` is that of graphs, and `off` leaves all steps to the trainer."""
        self.why_not = ""
        self.direct = 0
        self._mode = mode
        self._no_graphs = ""  # why no part of a step is to come from graphs
        self._step: DirectStep | None = None
        self._epoch: int | None = None
        self._told: dict[str, Any] = {}
        self._differs: dict[Any, str] = {}  # what a twin was held against -> how it differed

    def __call__(self, trainer: Any, stock: Callable[[], None]) -> dict[str, Any]:
        """Make an optimizer step.

        Args:
            trainer: Ultralytics' trainer, whose gradients are ready.
            stock: Its own optimizer step.

        Returns:
            Facts for the log when something is new; else empty.
        """
        if self._mode == "off" or trainer.device.type not in _DEVICES:
            stock()
            return {}
        looked = self._epoch != trainer.epoch
        if looked:
            self._epoch = trainer.epoch
            self._look(trainer, stock)
        done = not self.why_not and self._step is not None and _is_ultralytics(stock) and self._step()
        if not done and not self.why_not:
            if not looked:
                self._look(trainer, stock)
            self._step = None if self.why_not else direct_step(trainer, self._no_graphs)
            done = self._step is not None and self._step()
        if not done:
            stock()
        self.direct += done
        return self._news(trainer)

    def release(self, why_not_again: str = "") -> bool:
        """Free the graphs, for good if there is a reason; whether there were any."""
        held = self._step is not None and any(part.pool_bytes for part in self._step.recurring)
        self._step, self._no_graphs = None, why_not_again or self._no_graphs
        return held

    def _look(self, trainer: Any, stock: Callable[[], None]) -> None:
        try:
            self.why_not = why_not_direct(trainer, stock) or self._unlike_stock(trainer)
        except Exception as error:  # of another torch or Ultralytics
            self.why_not = first_line(error)
        if self.why_not:
            self._step = None

    def _unlike_stock(self, trainer: Any) -> str:
        optimizer, scaled = trainer.optimizer, trainer.scaler.is_enabled()
        key = (type(optimizer), scaled, *functions(optimizer), *map(tuple, map(options, optimizer.param_groups)))
        if key not in self._differs:
            self._differs[key] = unlike_stock(trainer)
        return self._differs[key]

    def _news(self, trainer: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {"optimizer": type(trainer.optimizer).__name__, "why_not": self.why_not}
        if self._step is not None:
            parts = self._step.recurring
            facts["captures"] = sum(part.captures for part in parts)
            facts["pool_bytes"] = sum(part.pool_bytes for part in parts)
            facts["no_graphs"] = next((part.why_not for part in parts if part.why_not), "")
        if facts == self._told or not (self.why_not or self._step):
            return {}
        self._told = facts
        return facts


def why_not_direct(trainer: Any, stock: Callable[[], None]) -> str:
    """Why the optimizer step of a trainer has to be its own; empty if a direct one does the same.

    Args:
        trainer: Ultralytics' trainer, before an optimizer step.
        stock: Its own optimizer step.
    """
    return next(_reasons(trainer, stock), "")


def _reasons(trainer: Any, stock: Callable[[], None]) -> Iterator[str]:
    optimizer, scaler = trainer.optimizer, trainer.scaler
    kind, name = type(optimizer), type(optimizer).__name__
    if kind not in RULES:
        yield f"{name} is none of {', '.join(kind.__name__ for kind in RULES)}"
        return
    own = [(cls, {"optimizer_step"}) for cls in type(trainer).__mro__] + [(GradScaler, OF_SCALER)]
    own += [(cls, {"step", "zero_grad", "_init_group"}) for cls in kind.__mro__]
    for cls, names in own:
        if found := foreign_in_class(cls, names):
            yield f"{found} is not torch's or Ultralytics' own"
    if not _is_ultralytics(stock):
        yield f"the optimizer step of {type(trainer).__name__} is not Ultralytics' own"
    if type(scaler) is not GradScaler:
        yield f"the scaler is a {type(scaler).__name__}"
        return
    for obj, names in ((scaler, OF_SCALER), (optimizer, OF_OPTIMIZER)):
        if replaced := names & vars(obj).keys():
            yield f"{type(obj).__name__}.{min(replaced)} was replaced"
    step = vars(optimizer).get("step")
    file = getattr(getattr(step, "__code__", None), "co_filename", None)
    if step is not None and (file != lr_scheduler.__file__ or getattr(step, "__wrapped__", None) is not kind.step):
        yield f"{name}.step was replaced"
    if any(HOOKS) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        yield f"a hook on the step of {name} would not be called"
    for space, helper in HELPERS:
        if not is_own(getattr(space, helper)):
            yield f"{helper} is not torch's or Ultralytics' own"
    if found := foreign(trainer.model.modules(), OF_MODULES):
        yield f"{found} is not torch's own"
    if scaler.is_enabled() and scaler._scale is None:
        yield "the loss was not scaled"
    if scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states:
        yield "gradients were unscaled before"
    yield from _of_groups(trainer)


def _is_ultralytics(stock: Callable[[], None]) -> bool:
    return getattr(stock, "__func__", None) is BaseTrainer.optimizer_step


def _of_groups(trainer: Any) -> Iterator[str]:
    optimizer, name = trainer.optimizer, type(trainer.optimizer).__name__
    rule = RULES[type(optimizer)]
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "capturable", "differentiable"):
            if group.get(option):
                yield f"{name} has {option}=True"
        if why_not := rule.why_not(group):
            yield f"{name}: {why_not}"
        if not all(isinstance(number, (int, float)) for number in numbers(group)):
            yield f"a number of {name} is a tensor"
    if trainer.scaler.is_enabled() and rule.skips_on_device != getattr(optimizer, "_step_supports_amp_scaling", False):
        yield f"{name} takes overflows of gradients in another way"
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    kinds = {(p.dtype, p.grad.dtype, p.grad.layout) for p in parameters}
    for found in kinds - {(torch.float32, torch.float32, torch.strided)}:
        yield f"a parameter is {found[0]}, its gradient {found[1]} and {found[2]}"
    devices = {p.device for p in parameters} | (
        {trainer.scaler._scale.device} if trainer.scaler.is_enabled() else set()
    )
    if len(devices) > 1:
        yield f"parameters lie on {len(devices)} devices"
    if strange := {type(p) for p in parameters} - {Tensor, nn.Parameter}:
        yield f"a parameter is a {min(cls.__name__ for cls in strange)}"


@torch.no_grad()
def unlike_stock(trainer: Any) -> str:
    """How direct steps differ from those of the installed torch and Ultralytics, for twins of a trainer.

    Twins have its optimizer, with the same groups but a few small parameters, and a scaler like its own. Their steps
    clip gradients, overflow, and change the learning rate.

    Returns:
        What was found; empty if all is equal to the bit.
    """
    stock, ours = _twin(trainer), _twin(trainer)
    source = torch.Generator().manual_seed(0)
    for i, factor in enumerate(_FACTORS):
        if factor == float("inf") and not trainer.scaler.is_enabled():
            continue
        for j, (mine, theirs) in enumerate(zip(ours.model, stock.model, strict=True)):
            gradient = torch.randn(mine.shape, generator=source).to(mine) * (factor if j else min(factor, 1.0))
            if j != 1:  # one has none
                mine.grad, theirs.grad = (gradient * _scale(trainer) for _ in range(2))
        for twin in (stock, ours):
            for j, group in enumerate(twin.optimizer.param_groups):
                group["lr"] = 0.003 * (i + j + 1)
        with torch.enable_grad():
            BaseTrainer.optimizer_step(stock)
            step = direct_step(ours, no_graphs="a twin") if i else None  # the first makes states
            if step is None:
                BaseTrainer.optimizer_step(ours)
            elif not step():
                return "the step of a twin is refused"
        if [p.grad is None for p in ours.model] != [p.grad is None for p in stock.model]:
            return "a step of a twin leaves other gradients"
        if not all(torch.equal(a, b) for a, b in zip(_tensors(ours), _tensors(stock), strict=True)):
            return "a step of a twin differs from Ultralytics' own"
    return ""


def _twin(trainer: Any) -> Any:
    """What `optimizer_step` reads of a trainer, with small parameters of a scale of their own."""
    source, kind = torch.Generator().manual_seed(1), type(trainer.optimizer)
    groups = [
        {
            **group,
            "params": [nn.Parameter(torch.randn(shape, generator=source).to(trainer.device)) for shape in _SHAPES],
        }
        for group in trainer.optimizer.param_groups
        if group["params"]
    ]
    optimizer: Any = object.__new__(kind)
    kept = {name: value for name, value in vars(trainer.optimizer).items() if name != "step"}
    vars(optimizer).update({**kept, "state": defaultdict(dict), "param_groups": groups})
    scaler = GradScaler(trainer.device.type, init_scale=_scale(trainer), enabled=trainer.scaler.is_enabled())
    scaler.scale(torch.zeros((), device=trainer.device))
    model = nn.ParameterList([p for group in groups for p in group["params"]])
    return SimpleNamespace(
        model=model, optimizer=optimizer, scaler=scaler, ema=None, device=trainer.device, args=trainer.args
    )


def _scale(trainer: Any) -> float:
    return 1024.0 if trainer.scaler.is_enabled() else 1.0


def _tensors(twin: Any) -> list[Tensor]:
    """All that a step changes."""
    states = [value for p in twin.model for value in twin.optimizer.state.get(p, {}).values()]
    scaled = [twin.scaler._scale, twin.scaler._growth_tracker] if twin.scaler.is_enabled() else []
    return [*twin.model, *states, *scaled]
