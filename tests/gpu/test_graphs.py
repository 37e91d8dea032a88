"""Training from CUDA graphs: what eager training computes, without a trace of the capture."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from ultralytics import ASSETS, YOLO
from ultralytics.cfg import get_cfg

from tests.counting import randomise, run_out_of_memory_once
from tests.engine.test_telemetry import events
from tests.patching.test_patch import load_without_plugin, patched_layers
from yolo_flash import FlashConfig, patch_model
from yolo_flash.engine.predictor import FlashPredictorMixin
from yolo_flash.graphs.capture import capture_step, replay_next_call
from yolo_flash.graphs.fixed_loss import Capacity, needed, pad_targets
from yolo_flash.graphs.graphed_step import EarlyCopy, GraphedStep
from yolo_flash.graphs.policy import FlashGraphError
from yolo_flash.patching.patch import patch_modules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Batches = list[Tensor]


@functools.cache
def stock(config: str) -> nn.Module:
    """Built once a process, and copied."""
    return randomise(YOLO(config).model)


def network(config: str = "yolo12n.yaml") -> Any:
    model: Any = copy.deepcopy(stock(config)).cuda().to(memory_format=torch.channels_last).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    patch_modules(model, FlashConfig())
    return model


def batches(count: int, batch: int = 4, side: int = 128) -> Batches:
    source = torch.Generator("cuda").manual_seed(3)
    return [torch.rand(batch, 3, side, side, device="cuda", generator=source) for _ in range(count)]


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32)


def flat(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def step(run: Any, images: Tensor, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Forward and backward of a smooth loss, which adds to the gradients; the outputs."""
    with autocast(dtype):
        outputs = [out for out in flat(run(images)) if out.requires_grad]
    loss = sum(out.float().square().mean() for out in outputs)
    (loss * scale).backward()  # type: ignore[union-attr]
    return [out.detach().clone() for out in outputs]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def buffers(model: nn.Module) -> Tensor:
    return torch.cat([b.double().flatten() for b in model.buffers()])


def off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def capture(model: nn.Module, images: Tensor, dtype: torch.dtype) -> GraphedStep:
    with autocast(dtype):
        return GraphedStep(model, images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_capture_leaves_no_trace(dtype: torch.dtype) -> None:
    model, (images,) = network(), batches(1)
    step(model, images, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.grad is not None]
    kept = [p.grad.clone() for p in trained]
    torch.cuda.manual_seed(5)
    generators = torch.get_rng_state(), torch.cuda.get_rng_state()
    graphed = capture(model, images, dtype)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, kept, strict=True))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert torch.equal(torch.cuda.get_rng_state(), generators[1])
    with autocast(dtype):
        assert not graphed.stale()
    assert graphed.stale()  # without autocast it would be another step
    assert "predict" not in vars(model)


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml"])
def test_replays_are_eager_steps(config: str) -> None:
    """Outputs, gradients of one step and of four, and BatchNorm, each as near to eager as eager is to itself."""
    data, first = batches(6), network(config)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    graphed = capture(third, data[0], torch.float16)
    for accumulated in (data[:1], data[1:5], data[5:]):
        for model in (first, second, third):
            model.zero_grad()
        for images in accumulated:
            runs = (first, second, graphed)
            eager, again, replayed = (step(run, images, torch.float16) for run in runs)
            for a, b, c in zip(eager, again, replayed, strict=True):
                assert off(c, a) <= max(2 * off(b, a), 1e-3)
        noise = off(gradients(second), gradients(first))
        assert off(gradients(third), gradients(first)) <= max(2 * noise, 1e-3)
    assert off(buffers(third), buffers(first)) <= max(2 * off(buffers(second), buffers(first)), 1e-5)


def test_an_overflow_is_gone_with_its_step() -> None:
    model, data = network(), batches(2)
    graphed = capture(model, data[0], torch.float16)
    step(graphed, data[0], torch.float16, scale=float("inf"))
    assert not gradients(model).isfinite().all()
    model.zero_grad()
    step(graphed, data[1], torch.float16)
    assert gradients(model).isfinite().all()


def test_gradients_are_not_the_memory_of_the_graph() -> None:
    model, data = network(), batches(2)
    graphed = capture(model, data[0], torch.float16)
    step(graphed, data[0], torch.float16)
    kept = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    step(graphed, data[1], torch.float16)
    assert all(torch.equal(grad, before) for grad, before in kept)


def test_frozen_layers_stay_frozen() -> None:
    model, (images,) = network(), batches(1)
    for parameter in model.model[:6].parameters():
        parameter.requires_grad_(False)
    for module in model.model[:6].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    still = model.model[0].bn.running_mean.clone()
    graphed = capture(model, images, torch.float16)
    step(graphed, images, torch.float16)
    assert all(p.grad is None for p in model.model[:6].parameters())
    assert torch.equal(model.model[0].bn.running_mean, still)
    with autocast(torch.float16):
        assert not graphed.stale()
        model.model[5].conv.weight.requires_grad_(True)
        assert graphed.stale()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.conv(x))


def test_dropout_draws_anew_and_as_eager_does() -> None:
    model, (images,) = Dropping().cuda().train(), batches(1)
    graphed = capture(model, images, torch.float32)
    torch.cuda.manual_seed(7)
    eager = [model(images).detach().clone() for _ in range(2)]
    torch.cuda.manual_seed(7)
    replayed = [graphed(images).detach().clone() for _ in range(2)]
    assert not torch.equal(replayed[0] == 0, replayed[1] == 0)
    for a, b in zip(eager, replayed, strict=True):
        torch.testing.assert_close(a, b)


class Synchronising(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.sum().item() > -1)


def test_what_cannot_be_captured_raises_and_changes_nothing() -> None:
    model, (images,) = Synchronising().cuda().train(), batches(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        capture(model, images, torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(model, images, torch.float32)
    assert all(p.grad is not None for p in model.parameters())
    capture(Dropping().cuda().train(), images, torch.float32)  # the device is as good as new


def test_a_backward_after_another_replay_is_refused() -> None:
    model, (images,) = network(), batches(1)
    graphed = capture(model, images, torch.float16)
    outputs = flat(graphed(images))
    graphed(images)
    with pytest.raises(FlashGraphError, match="replayed again"):
        sum(out.float().sum() for out in outputs if out.requires_grad).backward()  # type: ignore[union-attr]


# With the loss --------------------------------------------------------------------------------------------------------
def a_batch(of_image: list[int], seed: int, images: int = 4, side: int = 128) -> tuple[dict[str, Any], dict[str, Any]]:
    """Boxes on the CPU, and the whole batch on the device."""
    source = torch.Generator().manual_seed(seed)
    count = len(of_image)
    boxes = {
        "batch_idx": torch.tensor(of_image, dtype=torch.float32),
        "cls": torch.randint(0, 80, (count, 1), generator=source).float(),
        "bboxes": torch.rand(count, 4, generator=source) * 0.4 + 0.3,
    }
    pictures = torch.rand(images, 3, side, side, generator=source)
    return boxes, {**{name: value.cuda() for name, value in boxes.items()}, "img": pictures.cuda()}


def with_loss(model: Any, dtype: torch.dtype) -> tuple[Callable[[dict[str, Any], dict[str, Any]], Any], GraphedStep]:
    """Forward of a batch by replay."""
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    boxes, batch = a_batch([0] * 9 + [1] * 4 + [3] * 7, 0)
    capacity = Capacity().grown(needed(boxes, 4, (128, 128), model.criterion))
    with autocast(dtype):
        targets = pad_targets(boxes, 4, capacity.boxes)
        captured, why_not = capture_step(model, batch, targets, capacity)
    assert why_not == ""

    def run(boxes: dict[str, Any], batch: dict[str, Any]) -> Any:
        assert capacity.holds(needed(boxes, 4, (128, 128), model.criterion))
        replay_next_call(model, captured, batch, pad_targets(boxes, 4, capacity.boxes))
        return model(batch)

    return run, captured


def three_steps(
    first: Any, second: Any, replay: Callable[..., Any], boxes: dict[str, Any], batch: dict[str, Any], dtype: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Losses and loss items of two eager models and of a replay, each behind its backward; and the items."""
    found = []
    for run in (lambda *given: first(given[1]), lambda *given: second(given[1]), replay):
        with autocast(dtype):
            losses, items = run(boxes, batch)
        (losses.sum() * 32).backward()
        found.append(torch.cat((losses.detach(), torch.stack(list(items.values())))))
    eager, again, replayed = found
    return eager, again, replayed, items


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ("yolo12n.yaml", torch.float16),
        ("yolo12n.yaml", torch.bfloat16),
        ("yolo12n.yaml", torch.float32),
        ("yolo26n.yaml", torch.float16),
    ],
    ids=str,
)
def test_replays_with_their_loss_are_eager_steps(config: str, dtype: torch.dtype) -> None:
    """Losses, loss items and accumulated gradients, each as near to eager as eager is to itself."""
    first = network(config)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    replay, _ = with_loss(third, dtype)
    for model in (first, second):
        model.args = get_cfg()
    crowds = [[0] * 9 + [1] * 4 + [3] * 7, [2], [], [0] * 12 + [1] * 2]
    for seed, of_image in enumerate(crowds):
        if seed % 2 == 0:
            for model in (first, second, third):
                model.zero_grad()
        boxes, batch = a_batch(of_image, seed)
        eager, again, replayed, items = three_steps(first, second, replay, boxes, batch, dtype)
        assert list(items) == list(first(batch)[1])
        assert off(replayed, eager) <= max(2 * off(again, eager), 1e-5)
        if seed % 2:
            noise = off(gradients(second), gradients(first))
            assert off(gradients(third), gradients(first)) <= max(2 * noise, 1e-5)


def test_hooks_of_parameters_are_called() -> None:
    model = network()
    replay, _ = with_loss(model, torch.float16)
    weight = model.model[0].conv.weight
    seen: list[Tensor] = []
    handles = [
        weight.register_hook(lambda gradient: seen.append(gradient.clone())),
        model.model[1].conv.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    replay(*a_batch([0, 1], 1))[0].sum().backward()
    assert len(seen) == 2
    assert any(torch.equal(value, weight.grad) for value in seen)
    for handle in handles:
        handle.remove()
    replay(*a_batch([0, 1], 1))[0].sum().backward()
    assert len(seen) == 2


def test_a_second_backward_is_refused() -> None:
    model = network()
    replay, _ = with_loss(model, torch.float16)
    losses, _ = replay(*a_batch([0, 1], 1))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(FlashGraphError, match="differentiated twice"):
        losses.sum().backward()


def test_numbers_are_on_the_cpu_before_later_work_is_done() -> None:
    values = {"box": torch.tensor(1.5, device="cuda"), "cls": torch.tensor(2.5, device="cuda")}
    assert EarlyCopy.possible(values)
    copied = EarlyCopy(values)
    torch.cuda._sleep(10**9)  # half a second
    values["box"].fill_(7)
    found = copied.read()
    assert not torch.cuda.current_stream().query()
    assert {name: float(value) for name, value in found.items()} == {"box": 1.5, "cls": 2.5}
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert not EarlyCopy.possible({"box": 1.5})
    assert not EarlyCopy.possible(None)


# Runs -----------------------------------------------------------------------------------------------------------------
def train(args: dict[str, Any], model: str, graphs: str) -> tuple[Any, list[float]]:
    """A run; the wrapper and its loss at every epoch. Eager steps are not profiled, to save time."""
    losses: list[float] = []
    yolo = patch_model(YOLO(model), graphs=graphs, log=graphs != "off")
    yolo.add_callback("on_train_epoch_end", lambda trainer: losses.append(float(sum(trainer.tloss.values()))))
    yolo.train(**{**args, "device": 0, "imgsz": 128, "warmup_epochs": 0.0})
    return yolo, losses


@pytest.mark.parametrize(
    ("model", "amp"),
    [
        pytest.param("yolo12n.yaml", True, marks=pytest.mark.slow),
        pytest.param("yolo26n.yaml", True, marks=pytest.mark.slow),
        ("tiny", "bf16"),
        ("tiny", False),
    ],
)
def test_a_run_from_graphs_is_a_run(model: str, amp: Any, tiny_model: str, tiny_args: dict[str, Any]) -> None:
    """Of eight steps; that of yolo12n also validates in between, and its checkpoint is a plain one."""
    whole, config = model == "yolo12n.yaml", tiny_model if model == "tiny" else model
    arguments = {**tiny_args, "amp": amp, "epochs": 4, "val": whole}
    eager = train(arguments, config, "off")[1]
    gc.collect()
    before = torch.cuda.memory_allocated()
    yolo, replayed = train(arguments, config, "on")
    written = events(yolo)
    (told,) = [event for event in written if event["event"] == "graphs"]
    assert told["why_not"] == ""
    assert told["pool_bytes"] > 0
    assert told["boxes"] > 0
    first, second = [event for event in written if event["event"] == "kernels"]
    assert (first["graphs"], second["graphs"]) == (False, True)
    launched = first["counts"].keys() & second["counts"].keys()  # of kernels; operators are Python's
    assert [name for name in launched if not name.startswith(("aten::", "yolo_flash::"))]
    assert replayed == pytest.approx(eager, rel=0.02)
    assert patched_layers(yolo.model)
    if whole:
        load_without_plugin(yolo.trainer.last)
    assert yolo.trainer.flash_run.graphs.step is None
    del yolo
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**28


def test_accumulation_in_a_run_is_that_of_eager(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    arguments = {**tiny_args, "nbs": 8, "epochs": 4, "val": False}  # of batches of 2
    eager, replayed = (train(arguments, tiny_model, mode)[1] for mode in ("off", "on"))
    assert replayed == pytest.approx(eager, rel=0.02)


def test_auto_compares_and_says_what_it_found(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    yolo, _ = train({**tiny_args, "epochs": 8, "val": False}, tiny_model, "auto")
    (told,) = [event for event in events(yolo) if event["event"] == "graphs"]
    assert told["why_not"] or told["eager_ms"] >= 1.05 * told["graph_ms"]


def test_out_of_memory_halving_captures_again(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo = patch_model(YOLO(tiny_model), graphs="on")
    seen: list[int] = []
    original = GraphedStep.__call__

    def call(self: Any, images: Tensor, *extra: Tensor) -> Any:
        seen.append(len(images))
        return original(self, images, *extra)

    monkeypatch.setattr(GraphedStep, "__call__", call)
    run_out_of_memory_once(yolo)
    yolo.train(**{**tiny_args, "device": 0, "imgsz": 128, "epochs": 3, "val": False})
    assert yolo.trainer.batch_size == 1
    assert set(seen) == {1}


def test_validation_without_memory_frees_the_graphs(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    yolo = patch_model(YOLO(tiny_model), graphs="on")
    failed: list[bool] = []

    def fail(validator: Any) -> None:
        if validator.training and yolo.trainer.flash_run.graphs.step is not None:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")

    yolo.add_callback("on_val_start", fail)
    yolo.train(**{**tiny_args, "device": 0, "imgsz": 128, "epochs": 3})
    assert failed == [True]
    assert "validation" in yolo.trainer.flash_run.graphs.why_not


def test_a_pose_runs_from_graphs_without_its_loss() -> None:
    """Of other tasks than detection and segmentation the network alone is captured."""
    model = YOLO("yolo11n-pose.yaml").model.cuda().train()
    captured = capture(model, torch.rand(2, 3, 64, 64, device="cuda"), torch.float16)
    outputs = [out for out in flat(captured(torch.rand(2, 3, 64, 64, device="cuda"))) if out.requires_grad]
    sum(out.float().mean() for out in outputs).backward()  # type: ignore[union-attr]
    assert gradients(model).isfinite().all()


# Prediction -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml", "yolo11n-seg.yaml"])
def test_predictions_from_graphs_are_those_without(config: str, half: bool) -> None:
    torch.manual_seed(0)
    model = patch_model(YOLO(config))
    say: dict[str, Any] = {"conf": 1e-5, "verbose": False, "device": 0, "quantize": 16 if half else None}
    pictures = [str(ASSETS / name) for name in ("bus.jpg", "zidane.jpg")]  # one batch
    wanted = [result.boxes.data for result in model.predict(pictures, imgsz=320, **say)]
    patch_model(model, graphs="on")
    for side in (320, 160, 320, 160, 320):  # the head's anchors are other ones in between
        found = [result.boxes.data for result in model.predict(pictures, imgsz=side, **say)]
        if side == 320:
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)
    predictor: Any = model.predictor
    assert isinstance(predictor, FlashPredictorMixin)
    assert predictor._flash_graphs.why_not == ""
    assert [key[2] for key in predictor._flash_graphs._graphs] == [320, 160]
