"""Optimizer steps on a card: to the bit those of torch and Ultralytics, also where parts of them come from graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import RTDETR, YOLO

from tests.engine.test_telemetry import events, of
from tests.gpu.test_graphs import train
from tests.graphs.test_optimizer import (
    NAMES,
    Saved,
    Switch,
    all_of,
    assert_equal,
    give_gradients,
    run,
    twins,
)
from yolo_flash import patch_model
from yolo_flash.graphs.clipping import CapturedClip, clip
from yolo_flash.graphs.muon import CapturedMuon, muon_update
from yolo_flash.graphs.optimizer import OptimizerPolicy, unlike_stock, why_not_direct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def net() -> Any:
    """As Ultralytics trains it on a card."""
    model: Any = YOLO("yolo12n.yaml").model.cuda().to(memory_format=torch.channels_last).train()
    for name, p in model.named_parameters():
        p.requires_grad_(".dfl" not in name)
    return model


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_stock(name: str, scaled: bool, net: Any) -> None:
    """Through a warm-up, the captures, an overflow, and another momentum at last."""
    ours, stock = twins(net, name, scaled)
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(30), overflow=24, warm_up=6)
    assert policy.why_not == ""
    assert policy.direct == 29
    assert policy._step is not None
    assert [part.why_not for part in policy._step.recurring] == [""] * (3 if name == "MuSGD" else 1)
    assert [part.captures for part in policy._step.recurring] == [1] * (3 if name == "MuSGD" else 1)
    assert all(part.replayed > 10 for part in policy._step.recurring)
    assert_equal(all_of(ours), all_of(stock))
    run(policy, ours, stock, range(30, 34), warm_up=60)
    assert_equal(all_of(ours), all_of(stock))
    if scaled:
        assert ours.scaler.get_scale() == 2.0**15


def test_a_look_changes_nothing(net: Any) -> None:
    (ours, stock) = twins(net, "MuSGD")
    give_gradients((ours, stock), 0)
    torch.cuda.manual_seed(5)
    kept = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert why_not_direct(ours, ours.optimizer_step) == ""
    assert unlike_stock(ours) == ""
    assert torch.equal(torch.get_rng_state(), kept[0])
    assert torch.equal(torch.cuda.get_rng_state(), kept[1])
    ours.optimizer_step()
    stock.optimizer_step()
    assert_equal(all_of(ours), all_of(stock))


def test_a_state_that_is_loaded_is_taken_up(net: Any) -> None:
    """Graphs hold the memory of the buffers that were; a recovery from NaN brings others."""
    ours, stock = twins(net, "MuSGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(14), warm_up=1)
    assert policy._step is not None
    assert [part.captures for part in policy._step.recurring] == [1, 1, 1]
    for trainer in (ours, stock):
        trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    run(policy, ours, stock, range(14, 28), warm_up=1)
    assert [part.captures for part in policy._step.recurring] == [1, 1, 1]
    assert_equal(all_of(ours), all_of(stock))


def a_list(nhwc: bool = True) -> list[Tensor]:
    """Gradients of filters, in either order of memory."""
    source = torch.Generator("cuda").manual_seed(3)
    shapes = [(64, 32, 3, 3), (128, 64, 1, 1), (16, 3, 3, 3), (96, 48, 3, 3)]
    made = [torch.randn(shape, device="cuda", generator=source) for shape in shapes]
    return [g.to(memory_format=torch.channels_last) for g in made] if nhwc else made


@pytest.mark.parametrize("nhwc", [True, False])
def test_clipping_from_a_graph(nhwc: bool) -> None:
    gradients, scale = a_list(nhwc), torch.tensor(1024.0, device="cuda")
    order = [3, 1, 0, 2]
    captured = CapturedClip(gradients, order, 3, scale)
    assert captured.pool_bytes > 0
    for factor in (1.0, 3e4, float("inf"), 7.0):
        given = [g * factor for g in gradients]
        kept = [g.clone() for g in given]
        scale.mul_(0.5)
        found, overflowed = captured(given)
        wanted, wanted_overflow = clip([g.clone() for g in given], order, 3, scale)
        assert_equal([g.nan_to_num() for g in found], [g.nan_to_num() for g in wanted])
        assert overflowed.item() == wanted_overflow.item() == float(factor == float("inf"))
        assert_equal([g.nan_to_num() for g in given], [g.nan_to_num() for g in kept])


@pytest.mark.parametrize("nhwc", [True, False])
def test_muon_from_a_graph(nhwc: bool) -> None:
    gradients = a_list(nhwc)
    mine, theirs = ([torch.zeros_like(g) for g in gradients] for _ in range(2))
    captured = CapturedMuon(gradients, mine, 0.9, True)
    found, wanted = captured.results, muon_update(gradients, theirs, 0.9, True)
    for i in range(4):
        assert_equal(list(found), wanted)
        assert_equal(mine, theirs)
        given = [g * (i + 2) + 0.1 for g in gradients]
        found, wanted = captured(given), muon_update(given, theirs, 0.9, True)


def test_a_graph_that_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**40))
    with pytest.raises(RuntimeError, match="and 0 MiB are free: a smaller batch would do"):
        CapturedClip(a_list(), [0, 1, 2, 3], 4, None)
    momentums = a_list()
    with pytest.raises(RuntimeError, match="are free"):
        CapturedMuon(a_list(), momentums, 0.9, True)
    assert_equal(momentums, a_list())


def test_graphs_give_their_memory_back(net: Any) -> None:
    ours, stock = twins(net, "MuSGD")
    policy = OptimizerPolicy("auto")
    run(policy, ours, stock, range(3), warm_up=1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run(policy, ours, stock, range(3, 14), warm_up=1)
    assert policy._step is not None
    assert policy._step.recurring[1].captures == 1
    assert policy.release()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**27  # cuBLAS keeps some for each stream


# Runs -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "amp"), [("AdamW", True), ("MuSGD", True), ("SGD", "bf16")])
def test_a_run_saves_what_it_saves_with_the_step_of_stock(name: str, amp: Any, tiny_args: dict[str, Any]) -> None:
    """Losses and last.pt of two epochs behind those in which graphs are captured, to the bit."""
    losses: list[list[float]] = [[], []]
    saved = []
    for i, mode in enumerate(("auto", "off")):
        model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
        model.add_callback("on_train_start", Switch(mode))
        model.add_callback("on_train_batch_end", lambda trainer, i=i: losses[i].append(trainer.loss.item()))
        saved.append(Saved(model))
        arguments = {**tiny_args, "device": 0, "imgsz": 128, "epochs": 8, "nbs": 2, "warmup_epochs": 0.0, "amp": amp}
        model.train(**arguments, optimizer=name, deterministic=True)
        assert (model.trainer.flash_run.optimizer.direct > 10) is (mode == "auto")
    assert len(losses[0]) == 16
    assert losses[0] == losses[1]
    assert_equal(saved[0].epochs, saved[1].epochs)


def test_a_run_tells_what_came_from_graphs(tiny_args: dict[str, Any]) -> None:
    model, _ = train({**tiny_args, "epochs": 8, "nbs": 2, "optimizer": "MuSGD"}, "yolo12n.yaml", graphs="on")
    told = of(events(model), "optimizer")
    assert [facts["why_not"] for facts in told] == [""] * len(told)
    assert told[0]["captures"] == 0
    assert told[-1]["captures"] == 3
    assert told[-1]["pool_bytes"] > 0
    assert told[-1]["no_graphs"] == ""


def test_rtdetr_steps_directly_too(tiny_args: dict[str, Any]) -> None:
    model = patch_model(RTDETR("rtdetr-resnet50.yaml"))
    model.train(**{**tiny_args, "device": 0, "imgsz": 160, "epochs": 3, "nbs": 2})
    assert model.trainer.flash_run.optimizer.why_not == ""
    assert model.trainer.flash_run.optimizer.direct > 3
