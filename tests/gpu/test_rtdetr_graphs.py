"""On a CUDA device: RT-DETR's training step from graphs is an eager step, and its host waits for no step under way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import RTDETR

from tests.engine.test_telemetry import events
from tests.gpu.test_graphs import a_batch, autocast, buffers, gradients, off
from tests.graphs.test_assignment import by_the_host
from yolo_flash import FlashConfig, patch_model
from yolo_flash.graphs import rtdetr
from yolo_flash.graphs.assignment import assign
from yolo_flash.graphs.fixed_loss import Capacity
from yolo_flash.graphs.rtdetr_loss import MatchedLoss, pad_targets
from yolo_flash.patching.patch import patch_modules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIDE, IMAGES, BOXES = 320, 4, 40
CROWDS = ([0] * 9 + [1] * 4 + [3] * 7, [2], [0] * 30 + [2] * 3, [0, 1, 2, 3], [1] * 17 + [3] * 2, [0] * 40 + [1] * 40)


@pytest.fixture(scope="module")
def network() -> Any:
    """Patched, with weights that move boxes: those of a fresh decoder's heads are zero."""
    torch.manual_seed(0)
    model: Any = RTDETR("rtdetr-l.yaml").model.cuda().to(memory_format=torch.channels_last).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.data += 0.01 * torch.randn_like(parameter)
    patch_modules(model, FlashConfig())
    model.nc = 80
    model.criterion = model.init_criterion()
    return model


def crowd(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return a_batch(CROWDS[number % len(CROWDS)], number, IMAGES, SIDE)


def captured(model: Any, dtype: torch.dtype, inside: bool = True) -> Any:
    boxes, batch = crowd(0)
    targets = pad_targets(boxes, IMAGES, BOXES) if inside else None
    with autocast(dtype):
        model(batch)  # as the first step of a run
        step, why_not = rtdetr.capture_step(model, batch, targets, Capacity(BOXES if inside else 0))
    assert bool(why_not) is not inside, why_not
    assert isinstance(step.loss, MatchedLoss) is inside
    return step


def trained(model: Any, batch: dict[str, Any], dtype: torch.dtype, seed: int) -> Tensor:
    """Losses of a step with the random numbers of a seed; gradients are added."""
    torch.manual_seed(seed)
    with autocast(dtype):
        loss, items = model(batch)
    (loss.sum() * 8).backward()
    return torch.stack([loss.detach().sum(), *items.values()]).double()


@pytest.mark.parametrize("inside", [True, False], ids=["with its loss", "network alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_replays_are_eager_steps(dtype: torch.dtype, inside: bool, network: Any) -> None:
    """Losses, accumulated gradients, BatchNorm and random numbers. Rounding may exchange two queries of one box."""
    bound = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    first = copy.deepcopy(network)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    step = captured(third, dtype, inside)
    third.load_state_dict(first.state_dict())  # BatchNorm as before the first step
    for number in range(2 * len(CROWDS)):
        if number % 2 == 0:
            for model in (first, second, third):
                model.zero_grad()
        boxes, batch = crowd(number)
        wanted, again = (trained(model, batch, dtype, number) for model in (first, second))
        generator = torch.cuda.get_rng_state(), torch.get_rng_state()
        ended: list[str] = []
        with autocast(dtype):
            rtdetr.replay_next_call(third, step, batch, pad_targets(boxes, IMAGES, BOXES), ended.append)
        found = trained(third, batch, dtype, number)
        assert ended == [""]
        assert torch.equal(torch.cuda.get_rng_state(), generator[0])
        assert torch.equal(torch.get_rng_state(), generator[1])
        assert off(found, wanted) <= max(2 * off(again, wanted), bound), number
        if number % 2:
            noise = off(gradients(second), gradients(first))
            assert off(gradients(third), gradients(first)) <= max(2 * noise, 10 * bound), number
    assert off(buffers(third), buffers(first)) <= max(2 * off(buffers(second), buffers(first)), 1e-5)


def test_a_capture_leaves_no_trace(network: Any) -> None:
    model = copy.deepcopy(network)
    with autocast(torch.float16):
        model(crowd(0)[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.cuda.manual_seed(5)
    generators = torch.get_rng_state(), torch.cuda.get_rng_state()
    boxes, batch = crowd(0)
    with autocast(torch.float16):
        step, _ = rtdetr.capture_step(model, batch, pad_targets(boxes, IMAGES, BOXES), Capacity(BOXES))
        assert not step.stale()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(torch.cuda.get_rng_state(), generators[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_host_waits_for_no_step_under_way(network: Any) -> None:
    """The stream of the step has half a second of work before it when the forward is asked for."""
    model = copy.deepcopy(network)
    step = captured(model, torch.float16)
    boxes, batch = crowd(0)
    targets = pad_targets(boxes, IMAGES, BOXES)
    for number in range(3):  # streams and memory are there from the first ones on
        torch.cuda.synchronize()
        if number == 2:
            torch.cuda._sleep(10**9)
        with autocast(torch.float16):
            rtdetr.replay_next_call(model, step, batch, targets)
            loss, _ = model(batch)
        loss.backward()
    assert not torch.cuda.current_stream().query()
    assert not step.stale()  # what replays make for themselves is no change of the network


@pytest.mark.parametrize("contested", [False, True])
@pytest.mark.parametrize(("boxes", "queries"), [(1, 300), (40, 300), (120, 300), (300, 300), (8, 84)])
def test_assignments_of_real_sizes_are_those_of_the_host(boxes: int, queries: int, contested: bool) -> None:
    layers = 1 if boxes > 100 else 7  # without SciPy the host takes a second for a large one
    costs = torch.rand(layers, 3, boxes, queries)
    if contested:
        costs = costs * 0.05 + torch.rand(queries)
    counts = torch.tensor([boxes, boxes // 2, 0], dtype=torch.int32)
    assert torch.equal(assign(costs.cuda(), counts.cuda()).cpu(), by_the_host(costs, counts))


@pytest.mark.parametrize("amp", [True, False, "bf16"])
def test_a_run_from_graphs_is_a_run(amp: Any, tiny_args: dict[str, Any]) -> None:
    arguments = {**tiny_args, "amp": amp, "epochs": 3, "device": 0, "imgsz": SIDE, "mosaic": 0.0, "warmup_epochs": 0.0}
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = patch_model(RTDETR("rtdetr-resnet50.yaml"), graphs=mode)
        found = losses[mode] = []
        model.add_callback("on_train_batch_end", lambda trainer, found=found: found.append(trainer.loss.item()))
        model.train(**arguments)
    (facts,) = [event for event in events(model) if event["event"] == "graphs"]
    assert facts["why_not"] == ""
    assert facts["boxes"] > 0
    epochs = [event["graphs"] for event in events(model) if event["event"] == "epoch"]
    assert [epoch["replayed"] for epoch in epochs] == [1, 2, 2], epochs
    # AdamW's first steps are signs of gradients, which rounding decides where they are next to nothing.
    assert losses["on"][:2] == pytest.approx(losses["off"][:2], rel=1e-2)
    assert losses["on"] == pytest.approx(losses["off"], rel=0.2)
