"""Direct optimizer steps: to the bit those of torch and Ultralytics, and refused where they might not be.

A CPU has no graphs: where a test takes one, the captured work runs eager, on memory that stays where it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import ultralytics.optim.muon as ultralytics_muon
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils import _pytree as pytree
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from tests.engine.test_telemetry import events, of
from tests.versions import ULTRALYTICS
from yolo_flash import FlashConfig, patch_model
from yolo_flash.engine.run import FlashRun
from yolo_flash.graphs import clipping, direct_step, muon, optimizer
from yolo_flash.graphs.clipping import CapturedClip
from yolo_flash.graphs.muon import CapturedMuon
from yolo_flash.graphs.optimizer import OptimizerPolicy, unlike_stock, why_not_direct
from yolo_flash.graphs.recurring import Recurring, SmallGraph

NAMES = ("AdamW", "Adam", "SGD", "MuSGD")


class Recorded:
    """In the place of `SmallGraph`: a capture runs its warm-up alone, a replay works on the memory that it had."""

    wrong = 0.0  # what a replay adds to its first result
    pool_bytes = 2**20

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], object], device: torch.device) -> None:
        warm_up()
        cells = [cell.cell_contents for cell in work.__closure__ or ()]
        cells += [value for cell in cells if hasattr(cell, "__dict__") for value in vars(cell).values()]
        held = [leaf for leaf in pytree.tree_leaves(cells) if isinstance(leaf, Tensor)]
        before = [tensor.clone() for tensor in held]
        self.work, self.results = work, work()
        torch._foreach_copy_(held, before)

    def replay(self) -> None:
        results, found = ([*pytree.tree_leaves(tree)] for tree in (self.results, self.work()))
        for mine, new in zip(results, found, strict=True):
            if mine is not new and mine is not None:
                mine.copy_(new)
        results[0].add_(self.wrong)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    for module in (clipping, muon):
        monkeypatch.setattr(module, "SmallGraph", Recorded)
    return Recorded


class Trainer(BaseTrainer):
    """With what an optimizer step needs, and nothing else."""

    model: Any
    ema: Any
    loaded: dict[str, Any]

    def __init__(self, net: nn.Module, name: str = "AdamW", scaled: bool = True) -> None:
        self.model, self.epoch, self.world_size = net, 0, 1
        self.args = SimpleNamespace(lr0=0.01, optimizer=name, warmup_bias_lr=0.1)
        self.data, self.device = {"nc": 80}, next(net.parameters()).device
        made = self.build_optimizer(net, name, lr=0.01, momentum=0.9, decay=5e-4)
        if name.startswith("Adam"):  # as Ultralytics makes them for a GPU
            groups = [{k: v for k, v in group.items() if k != "fused"} for group in made.param_groups]
            made = type(made)(groups, fused=True)
        self.optimizer = made
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda epoch: 1.0)  # wraps `step`
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.scaler.scale(torch.zeros((), device=self.device))
        self.ema = ModelEMA(net)
        self.stopper, self.best_fitness = SimpleNamespace(), None


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_DEVICES", ("cuda", "cpu"))


@pytest.fixture
def net(tiny_model: str) -> Any:
    """A detector with a frozen layer, beside the one that is always frozen."""
    model = DetectionModel(tiny_model, verbose=False)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("model.1.") and ".dfl" not in name)
    return model


def twins(net: nn.Module, name: str = "AdamW", scaled: bool = True) -> tuple[Trainer, Trainer]:
    return Trainer(copy.deepcopy(net), name, scaled), Trainer(copy.deepcopy(net), name, scaled)


def give_gradients(trainers: tuple[Trainer, ...], step: int, overflows: bool = False) -> None:
    """The same to each; the third parameter that is trained gets none."""
    source = torch.Generator().manual_seed(step)
    scale = 2.0**16 if trainers[0].scaler.is_enabled() else 1.0
    size = (0.001, 1.0)[step % 2]  # clipped or not
    trained = [[p for p in trainer.model.parameters() if p.requires_grad] for trainer in trainers]
    for i, same in enumerate(zip(*trained, strict=True)):
        gradient = torch.randn(same[0].shape, generator=source) * size * scale
        if overflows and i == 7:
            gradient.view(-1)[0] = torch.inf
        for p in same:
            p.grad = torch.empty_like(p, requires_grad=False).copy_(gradient) if i != 2 else None


def set_numbers(trainers: tuple[Trainer, ...], step: int, warm_up: int) -> None:
    """Other learning rates in every step, and another momentum in the warm-up."""
    for trainer in trainers:
        for i, group in enumerate(trainer.optimizer.param_groups):
            group["lr"] = float(np.interp(step, [0, 10], [0.1 if i else 0.0, 0.01 + 0.001 * i])) / (step + 1)
            if "momentum" in group:
                group["momentum"] = float(np.interp(step, [0, warm_up], [0.8, 0.937]))


def run(
    policy: OptimizerPolicy, ours: Trainer, stock: Trainer, steps: range, overflow: int = 5, warm_up: int = 99
) -> None:
    for step in steps:
        set_numbers((ours, stock), step, warm_up)
        give_gradients((ours, stock), step, overflows=step == overflow and ours.scaler.is_enabled())
        policy(ours, ours.optimizer_step)
        stock.optimizer_step()


def all_of(trainer: Trainer) -> dict[str, Any]:
    """What a training saves, and the weights."""
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "gradients": [p.grad is None for p in trainer.model.parameters()],
    }


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    """To the bit, and in the types."""
    assert type(found) is type(wanted), where
    if isinstance(found, dict):
        assert list(found) == list(wanted), where
        for key in found:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(wanted), where
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(a, b, f"{where}.{i}")
    elif isinstance(found, Tensor):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


# What it computes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_stock(name: str, scaled: bool, net: Any) -> None:
    ours, stock = twins(net, name, scaled)
    before = copy.deepcopy(ours.model.state_dict())
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(8))
    assert (policy.why_not, policy.direct) == ("", 7)  # the first one makes the states
    assert_equal(all_of(ours), all_of(stock))
    changed = {key for key, value in ours.model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == sum(p.requires_grad for p in net.parameters()) - 1
    if scaled:
        assert ours.scaler.get_scale() == 2.0**15  # after the overflow
    assert ours.optimizer._opt_called


@pytest.mark.parametrize("name", NAMES)
def test_steps_from_graphs_are_those_of_stock(name: str, net: Any, graphs: Any) -> None:
    ours, stock = twins(net, name)
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(24), overflow=20, warm_up=6)
    assert_equal(all_of(ours), all_of(stock))
    assert policy._step is not None
    clipped, *updates = policy._step.recurring
    assert (clipped.captures, clipped.replayed) == (1, 23 - 7)
    assert [update.captures for update in updates] == ([1, 1] if name == "MuSGD" else [])
    assert all(0 < update.replayed < 12 for update in updates)  # once the momentum has settled, but for the overflow


def test_a_momentum_that_changes_again_is_that_of_the_update(net: Any, graphs: Any) -> None:
    ours, stock = twins(net, "MuSGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(12), warm_up=1)
    assert policy._step is not None
    _, *updates = policy._step.recurring
    assert [update.captures for update in updates] == [1, 1]
    for step in range(12, 16):
        give_gradients((ours, stock), step)
        for trainer in (ours, stock):
            for group in trainer.optimizer.param_groups:
                group["momentum"] = 0.5 + 0.01 * step
        replayed = [update.replayed for update in updates]
        policy(ours, ours.optimizer_step)
        stock.optimizer_step()
        assert [update.replayed for update in updates] == replayed
    assert_equal(all_of(ours), all_of(stock))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_gradients_come_and_go(name: str, net: Any) -> None:
    """A layer that is frozen in the middle, and woken."""
    ours, stock = twins(net, name)
    policy = OptimizerPolicy("auto")
    for step in range(9):
        if step in (3, 6):
            for trainer in (ours, stock):
                trainer.model.model[3].requires_grad_(step == 6)
        run(policy, ours, stock, range(step, step + 1))
    assert_equal(all_of(ours), all_of(stock))
    assert policy.direct == 8


def test_a_model_that_gets_another_parameter(net: Any) -> None:
    """Its gradient counts in the norm, whether the optimizer knows it or not."""
    ours, stock = twins(net, "SGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(3))
    for trainer in (ours, stock):
        trainer.model.model[-1].extra = nn.Parameter(torch.ones(4))
    for step in range(3, 6):
        give_gradients((ours, stock), step)
        for trainer in (ours, stock):
            trainer.model.model[-1].extra.grad = torch.full((4,), 1e7)
        policy(ours, ours.optimizer_step)
        stock.optimizer_step()
    assert_equal(all_of(ours), all_of(stock))
    assert policy.direct == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_loaded_replaces_the_lists(name: str, net: Any, tmp_path: Path) -> None:
    """As NaN recovery does it, with another EMA; what is loaded was saved by the other of the two."""
    ours, stock = twins(net, name)
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(4))
    for trainer in (ours, stock):
        other = stock if trainer is ours else ours
        saved = {"optimizer": other.optimizer.state_dict(), "scaler": other.scaler.state_dict()}
        file = tmp_path / "last.pt"
        torch.save({**saved, "ema": copy.deepcopy(other.ema.ema).half(), "updates": 3}, file)
        trainer.loaded = torch.load(file, weights_only=False)
    for trainer in (ours, stock):
        trainer._load_checkpoint_state(trainer.loaded)
    run(policy, ours, stock, range(4, 8), overflow=6)
    assert policy.direct == 7
    assert_equal(all_of(ours), all_of(stock))


def test_groups_that_are_loaded_are_read(net: Any) -> None:
    """Of a state dict of its own an optimizer takes over the tensors, and makes other groups."""
    ours, stock = twins(net, "SGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(3))
    for trainer in (ours, stock):
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    run(policy, ours, stock, range(3, 5))
    assert policy.direct == 4
    assert_equal(all_of(ours), all_of(stock))


def test_another_optimizer_scaler_and_ema_are_taken_up(net: Any) -> None:
    ours, stock = twins(net, "AdamW")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(3))
    for trainer in (ours, stock):
        fresh = Trainer(trainer.model, "SGD")
        trainer.optimizer, trainer.scaler, trainer.ema = fresh.optimizer, fresh.scaler, fresh.ema
    run(policy, ours, stock, range(3, 6), overflow=4)
    assert_equal(all_of(ours), all_of(stock))
    assert policy.direct == 2 + 2


def test_another_optimizer_of_the_same_scaler_is_heard(net: Any) -> None:
    """Its overflow halves the scale too."""
    ours, stock = twins(net, "SGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(3))
    for trainer in (ours, stock):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), torch.inf)
        trainer.scaler.unscale_(torch.optim.SGD([p]))
    run(policy, ours, stock, range(3, 4))
    assert policy.direct == 3
    assert_equal(all_of(ours), all_of(stock))
    assert ours.scaler.get_scale() == 2.0**15


def test_users_own_averages_are_called(net: Any) -> None:
    (ours, _), policy = twins(net), OptimizerPolicy("auto")
    calls: list[Any] = []
    ours.ema = SimpleNamespace(update=calls.append)
    for step in range(3):
        give_gradients((ours,), step)
        policy(ours, ours.optimizer_step)
    assert policy.direct == 2
    assert calls == [ours.model] * 3


# When it is refused ---------------------------------------------------------------------------------------------------
def hook(*args: Any) -> None:
    """Of a user."""


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def half_precision(trainer: Trainer) -> None:
    for p in trainer.model.parameters():
        p.data = p.data.bfloat16()
        if p.grad is not None:
            p.grad = None
            p.grad = torch.zeros_like(p)


class OwnScaler(torch.amp.GradScaler):
    pass


class OwnParameter(nn.Parameter):
    pass


class OwnModule(nn.Module):
    def parameters(self, recurse: bool = True) -> Any:
        return iter(())


CHANGES: dict[str, tuple[str, Callable[[Trainer], Any]]] = {
    "RMSprop is none of AdamW, Adam, SGD": (
        "SGD",
        lambda t: setattr(t, "optimizer", torch.optim.RMSprop(t.model.parameters())),
    ),
    "GradScaler.step was replaced": ("SGD", lambda t: setattr(t.scaler, "step", wrapped(t.scaler.step))),
    "GradScaler.unscale_ was replaced": ("SGD", lambda t: setattr(t.scaler, "unscale_", wrapped(t.scaler.unscale_))),
    "the scaler is a OwnScaler": ("SGD", lambda t: setattr(t, "scaler", OwnScaler("cpu", enabled=False))),
    "SGD.step was replaced": ("SGD", lambda t: setattr(t.optimizer, "step", wrapped(t.optimizer.step))),
    "SGD.zero_grad was replaced": ("SGD", lambda t: setattr(t.optimizer, "zero_grad", hook)),
    "AdamW.found_inf was replaced": ("AdamW", lambda t: setattr(t.optimizer, "found_inf", torch.zeros(()))),
    "a hook on the step of SGD": ("SGD", lambda t: t.optimizer.register_step_pre_hook(hook)),
    "a hook on the step of MuSGD": ("MuSGD", lambda t: t.optimizer.register_step_post_hook(hook)),
    "OwnModule.parameters is not torch's own": ("SGD", lambda t: t.model.model.append(OwnModule())),
    "DetectionModel.parameters is not torch's own": (
        "SGD",
        lambda t: setattr(t.model, "parameters", wrapped(t.model.parameters)),
    ),
    "AdamW has amsgrad=True": ("AdamW", lambda t: t.optimizer.param_groups[0].update(amsgrad=True)),
    "Adam has maximize=True": ("Adam", lambda t: t.optimizer.param_groups[0].update(maximize=True)),
    "SGD has differentiable=True": ("SGD", lambda t: t.optimizer.param_groups[1].update(differentiable=True)),
    "AdamW has capturable=True": ("AdamW", lambda t: t.optimizer.param_groups[1].update(capturable=True)),
    "AdamW: it is not fused": ("AdamW", lambda t: t.optimizer.param_groups[1].update(fused=None)),
    "SGD: it has no momentum": ("SGD", lambda t: t.optimizer.param_groups[1].update(momentum=0.0)),
    "SGD: it was asked for fused or one by one": (
        "SGD",
        lambda t: t.optimizer.param_groups[1].update(foreach=False),
    ),
    "a number of AdamW is a tensor": ("AdamW", lambda t: t.optimizer.param_groups[0].update(lr=torch.tensor(0.01))),
    "takes overflows of gradients in another way": (
        "AdamW",
        lambda t: delattr(t.optimizer, "_step_supports_amp_scaling"),
    ),
    "gradients were unscaled before": ("SGD", lambda t: t.scaler.unscale_(t.optimizer)),
    "the loss was not scaled": ("SGD", lambda t: setattr(t.scaler, "_scale", None)),
    "a parameter is torch.bfloat16": ("SGD", half_precision),
}


@pytest.mark.parametrize("when", ["from the start", "later"])
@pytest.mark.parametrize("reason", CHANGES)
def test_what_refuses_a_direct_step(reason: str, when: str, net: Any) -> None:
    name, change = CHANGES[reason]
    (ours, _), policy = twins(net, name), OptimizerPolicy("auto")
    if when == "later":
        for step in range(2):
            give_gradients((ours,), step)
            policy(ours, ours.optimizer_step)
        assert policy.direct == 1
    give_gradients((ours,), 2)
    assert why_not_direct(ours, ours.optimizer_step) == ""
    change(ours)
    assert reason in why_not_direct(ours, ours.optimizer_step)
    stock: Any = Stock()
    facts = policy(ours, stock)
    assert reason in policy.why_not
    assert facts["why_not"] == policy.why_not
    assert (stock.calls, policy.direct) == (1, int(when == "later"))
    assert policy(ours, stock) == {}
    assert stock.calls == 2


class Stock:
    """A trainer's own step, which is only counted."""

    def __init__(self) -> None:
        self.calls, self.__func__ = 0, BaseTrainer.optimizer_step

    def __call__(self) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BaseTrainer, "optimizer_step"),
        (torch.amp.GradScaler, "_unscale_grads_"),
        (torch.amp.GradScaler, "step"),
        (torch.optim.SGD, "step"),
        (torch.optim.Optimizer, "zero_grad"),
        (torch.nn.utils, "clip_grad_norm_"),
        (nn.Module, "parameters"),
        (ultralytics_muon, "muon_update"),
        (ultralytics_muon, "zeropower_via_newtonschulz5"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_replaced_function_is_noticed_at_once(
    owner: Any, name: str, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours, _), policy = twins(net, "SGD"), OptimizerPolicy("auto")
    calls: list[str] = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return own(*args, **kwargs)

    own = getattr(owner, name)
    for step in range(3):
        if step == 2:
            assert (policy.direct, policy.why_not) == (1, "")
            monkeypatch.setattr(owner, name, mine)
        give_gradients((ours,), step)
        policy(ours, ours.optimizer_step)
    assert policy.direct == 1
    assert name in policy.why_not
    # SGD does not call Muon, and a scheduler calls the step that it has wrapped.
    assert bool(calls) == (owner not in (ultralytics_muon, torch.optim.SGD))


def test_a_hook_of_all_optimizers_is_called(net: Any) -> None:
    (ours, _), policy, calls = twins(net, "SGD"), OptimizerPolicy("auto"), list[Any]()
    for step in range(4):
        if step == 2:
            handle = torch_optimizer.register_optimizer_step_post_hook(lambda *args: calls.append(args[0]))
        give_gradients((ours,), step)
        policy(ours, ours.optimizer_step)
    handle.remove()
    assert calls == [ours.optimizer] * 2
    assert "a hook" in policy.why_not
    ours.epoch += 1  # looked at again
    give_gradients((ours,), 4)
    policy(ours, ours.optimizer_step)
    assert (policy.why_not, policy.direct) == ("", 2)


def test_a_parameter_of_a_users_class_refuses_it(net: Any) -> None:
    net.model[0].conv.weight = OwnParameter(net.model[0].conv.weight.detach())
    ours = Trainer(net, "SGD")
    give_gradients((ours,), 0)
    assert why_not_direct(ours, ours.optimizer_step) == "a parameter is a OwnParameter"


def test_a_step_of_a_users_class_is_its_own(net: Any) -> None:
    class Mine(Trainer):
        steps = 0

        def optimizer_step(self) -> None:
            self.steps += 1
            super().optimizer_step()

    ours, policy = Mine(net), OptimizerPolicy("auto")
    give_gradients((ours,), 0)
    policy(ours, ours.optimizer_step)
    assert (
        policy.why_not.startswith("test_a_step_of_a_users_class_is_its_own.<locals>.Mine") or "Mine" in policy.why_not
    )
    assert ours.steps == 1


def test_off_and_other_devices_leave_it_to_the_trainer(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, _), stock = twins(net), Stock()
    for mode, devices in (("off", ("cuda", "cpu")), ("auto", ("cuda",))):
        monkeypatch.setattr(optimizer, "_DEVICES", devices)
        policy = OptimizerPolicy(mode)
        assert policy(ours, stock) == {}
        assert (policy.why_not, policy._step) == ("", None)
    assert stock.calls == 2


@pytest.mark.parametrize("name", NAMES)
def test_another_arithmetic_of_torch_or_ultralytics_is_found(
    name: str, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new release may have it: the step of a twin tells."""
    (ours, _), policy = twins(net, name), OptimizerPolicy("auto")
    give_gradients((ours,), 0)
    assert unlike_stock(ours) == ""
    rule = direct_step.RULES[type(ours.optimizer)]

    def off(*args: Any) -> None:
        rule.update(*args)
        args[1].parameters[0].mul_(1 + 2**-23)

    monkeypatch.setitem(direct_step.RULES, type(ours.optimizer), rule._replace(update=off))
    assert unlike_stock(ours) == "a step of a twin differs from Ultralytics' own"
    monkeypatch.undo()
    monkeypatch.setattr(optimizer, "_DEVICES", ("cpu",))
    monkeypatch.setattr(clipping, "MAX_NORM", 9.99)
    for step in range(3):
        give_gradients((ours,), step)
        policy(ours, ours.optimizer_step)
    assert (policy.direct, policy.why_not) == (0, "a step of a twin differs from Ultralytics' own")


def test_a_twin_leaves_no_trace(net: Any) -> None:
    (ours, other), kept = twins(net, "MuSGD"), torch.get_rng_state()
    give_gradients((ours, other), 0)
    assert unlike_stock(ours) == ""
    assert torch.equal(torch.get_rng_state(), kept)
    ours.optimizer_step()
    other.optimizer_step()
    assert_equal(all_of(ours), all_of(other))


def test_an_error_of_the_look_leaves_it_to_the_trainer(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, _), policy, stock = twins(net), OptimizerPolicy("auto"), Stock()

    def broken(trainer: Any) -> str:
        raise AttributeError("'AdamW' object has no attribute 'param_groups'")

    monkeypatch.setattr(optimizer, "unlike_stock", broken)
    give_gradients((ours,), 0)
    facts = policy(ours, stock)
    assert facts["why_not"] == "AttributeError: 'AdamW' object has no attribute 'param_groups'"
    assert stock.calls == 1


# Graphs of its parts --------------------------------------------------------------------------------------------------
class Captured:
    pool_bytes = 7

    def __init__(self, value: int) -> None:
        self.results = f"captured {value}"

    def __call__(self, value: int) -> str:
        return f"replayed {value}"


def calls_of(part: Recurring, values: list[int]) -> list[str]:
    return [part(value).split()[0] for value in values]


def recurring(capture: Callable[..., Any] = Captured, key: Callable[..., Any] = lambda value: value) -> Recurring:
    return Recurring("eager {}".format, key, capture)


def test_what_recurs_is_captured_each_time_after_twice_as_many_calls() -> None:
    part = recurring()
    assert calls_of(part, [1] * 10) == ["eager"] * 7 + ["captured"] + ["replayed"] * 2
    assert calls_of(part, [2, 1, 2, 1]) == ["eager", "replayed"] * 2
    assert calls_of(part, [2] * 17) == ["eager"] * 15 + ["captured", "replayed"]
    assert (part.captures, part.replayed, part.pool_bytes) == (2, 7, 7)


def test_what_never_recurs_is_never_captured() -> None:
    part = recurring(key=lambda value: object())
    assert calls_of(part, [1] * 40) == ["eager"] * 40
    assert part.captures == 0


def test_a_capture_that_fails_is_not_tried_again() -> None:
    def fails(value: int) -> None:
        raise RuntimeError("too much\nof it")

    part = recurring(fails)
    assert calls_of(part, [1] * 40) == ["eager"] * 40
    assert (part.why_not, part.captures) == ("RuntimeError: too much", 0)


def test_graphs_need_a_card() -> None:
    with pytest.raises(RuntimeError, match="a CUDA graph needs an NVIDIA GPU, the device is cpu"):
        SmallGraph(list, list, torch.device("cpu"))


def test_gradients_that_lie_elsewhere_are_clipped_eager() -> None:
    """The kernel of the norm sums in another order where memory is not aligned."""
    key = clipping._key
    memory = torch.zeros(64)
    there, elsewhere = memory[:16], memory[1:17]
    assert key([there], [0], 1, None) == key([memory[16:32]], [0], 1, None)
    assert key([elsewhere], [0], 1, None) != key([elsewhere], [0], 1, None)
    assert key([there.view(4, 4)], [0], 1, None) != key([there.view(4, 4).t()], [0], 1, None)
    first, second = torch.ones(()), torch.ones(())  # of which a graph reads one
    assert key([there], [0], 1, first) == key([there], [0], 1, first)
    assert key([there], [0], 1, first) not in (key([there], [0], 1, second), key([there], [0], 1, None))


def test_a_replay_that_differs_in_a_bit_is_refused(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, momentums = ([torch.full((4, 3), value)] for value in (1.0, 0.5))
    CapturedClip(gradients, [0], 1, torch.ones(()))
    CapturedMuon(gradients, momentums, 0.9, True)
    monkeypatch.setattr(graphs, "wrong", 1e-6)
    kept = momentums[0].clone()
    with pytest.raises(RuntimeError, match="a replay differs from torch's own clipping"):
        CapturedClip(gradients, [0], 1, torch.ones(()))
    with pytest.raises(RuntimeError, match="a replay differs from Ultralytics' own updates"):
        CapturedMuon(gradients, momentums, 0.9, True)
    assert torch.equal(momentums[0], kept)
    assert torch.equal(gradients[0], torch.ones(4, 3))


def test_graphs_that_are_refused_leave_steps_direct(net: Any, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "wrong", 1e-6)
    (ours, stock), policy = twins(net, "MuSGD"), OptimizerPolicy("auto")
    run(policy, ours, stock, range(20), warm_up=1)
    assert policy.direct == 19
    assert policy._told["no_graphs"] == "RuntimeError: a replay differs from torch's own clipping"
    assert_equal(all_of(ours), all_of(stock))


def test_graphs_are_freed(net: Any, graphs: Any) -> None:
    (ours, stock), policy = twins(net, "AdamW"), OptimizerPolicy("auto")
    run(policy, ours, stock, range(10))
    assert policy.release()
    assert not policy.release()
    run(policy, ours, stock, range(10, 19))
    assert policy.release("validation ran out of memory")
    told = []
    for step in range(19, 30):
        give_gradients((ours, stock), step)
        told.append(policy(ours, ours.optimizer_step))
        stock.optimizer_step()
    assert not policy.release()
    assert [facts["no_graphs"] for facts in told if facts] == ["validation ran out of memory"]
    assert policy.direct == 29
    assert_equal(all_of(ours), all_of(stock))


# In a training --------------------------------------------------------------------------------------------------------
def train(args: dict[str, Any], trainer: Any = None, **settings: Any) -> Any:
    model = patch_model(YOLO("tiny.yaml"), **settings)
    model.train(**args, trainer=trainer)
    return model


class Saved:
    """What each epoch saved; the last one's optimizer is gone once the run has ended."""

    def __init__(self, model: Any) -> None:
        self.epochs: list[dict[str, Any]] = []
        model.add_callback("on_model_save", self)

    def __call__(self, trainer: Any) -> None:
        found = torch.load(trainer.last, weights_only=False)
        kept = {name: found[name] for name in ("epoch", "updates", "optimizer", "scaler", "best_fitness")}
        self.epochs.append({**kept, "ema": found["ema"].state_dict()})


class FusedTrainer(DetectionTrainer):
    """With the optimizer of a GPU, and a scaler."""

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = super().build_optimizer(*args, **kwargs)
        groups = [{k: v for k, v in group.items() if k != "fused"} for group in made.param_groups]
        return type(made)(groups, fused=True)


def with_a_scaler(trainer: Any) -> None:
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(("name", "nbs"), [("AdamW", 2), ("MuSGD", 2), ("SGD", 4)])
def test_a_training_saves_what_it_saves_without(name: str, nbs: int, tiny_args: dict[str, Any]) -> None:
    """Losses and last.pt, to the bit; `nbs=4` accumulates over two batches once it is warm."""
    epochs = 3 if nbs == 2 else 4
    args = {**tiny_args, "epochs": epochs, "optimizer": name, "nbs": nbs, "warmup_epochs": 1.0, "deterministic": True}
    found, losses = [], []
    if ULTRALYTICS < (8, 4, 180):  # whose first run in a process is another one, with and without the plugin
        YOLO("tiny.yaml").train(**tiny_args)
    for direct in (True, False):
        model = patch_model(YOLO("tiny.yaml"), graphs="auto")
        model.add_callback("on_train_start", with_a_scaler)
        mine: list[float] = []
        losses.append(mine)
        model.add_callback("on_train_batch_end", lambda trainer, mine=mine: mine.append(trainer.loss.item()))
        if not direct:
            model.add_callback("on_train_start", lambda trainer: setattr(trainer.flash_run.optimizer, "_mode", "off"))
        found.append(Saved(model))
        model.train(**args, trainer=FusedTrainer if name == "AdamW" else None)
        steps = model.trainer.flash_run.optimizer.direct
        assert (steps > 2) is direct
    assert len(losses[0]) == 2 * epochs
    assert losses[0] == losses[1]
    assert_equal(found[0].epochs, found[1].epochs)
    assert len(found[0].epochs) == epochs
    told = of(events(model), "optimizer")
    assert told == []  # of the run without


@pytest.mark.usefixtures("tiny_model")
def test_a_run_says_why_its_steps_stay_stock(tiny_args: dict[str, Any], log: list[str]) -> None:
    class MyTrainer(DetectionTrainer):
        def optimizer_step(self) -> None:
            super().optimizer_step()

    model = train({**tiny_args, "epochs": 2, "nbs": 2}, MyTrainer)
    (line,) = [line for line in log if "optimizer step stays" in line]
    (told,) = of(events(model), "optimizer")
    assert "MyTrainer.optimizer_step is not torch's or Ultralytics' own" in line
    assert told["why_not"] in line


@pytest.mark.usefixtures("tiny_model")
def test_a_run_resumes_as_stock(tiny_args: dict[str, Any]) -> None:
    """What a run with direct steps saved, resumed with and without them, and the other way round."""
    args = {**tiny_args, "epochs": 3, "optimizer": "SGD", "nbs": 2, "deterministic": True}
    found = []
    for first, then in ((True, False), (False, True), (False, False)):
        model = patch_model(YOLO("tiny.yaml"))
        modes = {False: "off", True: "auto"}
        model.add_callback("on_train_start", Switch(modes[first]))
        model.add_callback("on_model_save", stop_after_two)
        with pytest.raises(KilledError):
            model.train(**args)
        assert (model.trainer.flash_run.optimizer.direct > 0) is first
        last = Path(model.trainer.save_dir) / "weights" / "last.pt"
        resumed = patch_model(YOLO(last))
        resumed.add_callback("on_train_start", Switch(modes[then]))
        found.append(Saved(resumed))
        resumed.train(resume=True)
        assert (resumed.trainer.flash_run.optimizer.direct > 0) is then
    for other in found:
        assert_equal(other.epochs, found[0].epochs)
        assert len(other.epochs) == 1


class Switch:
    """Sets whether steps are direct."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(self, trainer: Any) -> None:
        trainer.flash_run.optimizer._mode = self.mode


class KilledError(Exception):
    pass


def stop_after_two(trainer: Any) -> None:
    if trainer.epoch == 1:
        raise KilledError


def test_a_validation_without_memory_frees_these_graphs_too(net: Any, graphs: Any) -> None:
    """Also where no others are held."""
    (ours, stock), error = twins(net, "AdamW"), RuntimeError("CUDA out of memory")
    assert not FlashRun(FlashConfig()).frees_memory(ours, error)
    flash_run = FlashRun(FlashConfig())
    flash_run.optimizer = OptimizerPolicy("auto")
    run(flash_run.optimizer, ours, stock, range(10))
    assert not flash_run.frees_memory(ours, RuntimeError("something else"))
    assert flash_run.frees_memory(ours, error)
    assert not flash_run.frees_memory(ours, error)
