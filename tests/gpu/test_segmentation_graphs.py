"""Segmentation from CUDA graphs, its loss included: what eager training computes, and the memory that was forecast."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from tests.datasets import create_dataset
from tests.engine.test_telemetry import events, of
from tests.gpu.test_graphs import a_batch, autocast, gradients, network, off, three_steps
from tests.graphs.test_fixed_segmentation import with_masks
from yolo_flash import patch_model
from yolo_flash.graphs.capture import capture_step, loss_error, replay_next_call
from yolo_flash.graphs.fixed_loss import Capacity, FixedShapeLoss, gains, needed, needed_bytes, pad_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = ["yolo12n-seg.yaml", "yolo11n-seg.yaml", "yolo26n-seg.yaml"]
SIDE = (128, 128)
Batch = dict[str, Any]


def segmented(of_image: list[int], seed: int) -> tuple[Batch, Batch]:
    """Boxes on the CPU, and the whole batch with its masks on the device."""
    boxes, batch = a_batch(of_image, seed)
    masks = with_masks({**boxes, "img": batch["img"]}, SIDE[0] // 4, seed)
    return boxes, {**batch, "masks": masks["masks"].cuda(), "sem_masks": masks["sem_masks"].cuda()}


def with_loss(model: Any, dtype: torch.dtype) -> Callable[[Batch, Batch], Any]:
    """Forward of a batch by replay; the loss is in the graphs."""
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    boxes, batch = segmented([0] * 9 + [1] * 4 + [3] * 7, 0)
    capacity = Capacity().grown(needed(boxes, 4, SIDE, model.criterion))
    targets = pad_targets(boxes, 4, capacity.boxes)
    with autocast(dtype):
        print(f"off by {loss_error(model, FixedShapeLoss(model.criterion, capacity), batch, targets):.1e}")
        captured, why_not = capture_step(model, batch, targets, capacity)
    assert why_not == ""

    def run(boxes: Batch, batch: Batch) -> Any:
        assert capacity.holds(needed(boxes, 4, SIDE, model.criterion))
        ended: list[str] = []
        replay_next_call(model, captured, batch, pad_targets(boxes, 4, capacity.boxes), ended.append)
        found = model(batch)
        assert ended == [""]
        return found

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_replays_with_their_loss_are_eager_steps(config: str, dtype: torch.dtype) -> None:
    """Losses, loss items and accumulated gradients, each as near to eager as eager is to itself.

    The first image has boxes, or none has: stock sums in half precision where only the first has none.
    """
    first = network(config)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    replay = with_loss(third, dtype)
    for model in (first, second):
        model.args = get_cfg()
    for seed, of_image in enumerate(([0] * 9 + [1] * 4 + [3] * 7, [0], [], [0] * 12 + [1] * 2)):
        if seed % 2 == 0:
            for model in (first, second, third):
                model.zero_grad()
        boxes, batch = segmented(of_image, seed)
        eager, again, replayed, items = three_steps(first, second, replay, boxes, batch, dtype)
        assert list(items) == ["box_loss", "seg_loss", "cls_loss", list(items)[3], "sem_loss"]
        assert off(replayed, eager) <= max(2 * off(again, eager), 1e-4), items
        if seed % 2:
            noise = off(gradients(second), gradients(first))
            print(f"gradients: {off(gradients(third), gradients(first)):.1e}, eager against itself {noise:.1e}")
            # Convolutions of float32 round their inputs to TF32, which makes much of the last bit of a gradient.
            assert off(gradients(third), gradients(first)) <= max(2 * noise, 5e-3)


def train(args: dict[str, Any], data: str, config: str, **settings: Any) -> tuple[Any, list[float]]:
    """A run without validation; the wrapper, and the sum of its losses at every epoch."""
    losses: list[float] = []
    yolo = patch_model(YOLO(config), **settings)
    yolo.add_callback("on_train_epoch_end", lambda trainer: losses.append(float(sum(trainer.tloss.values()))))
    yolo.train(**{**args, "data": data, "device": 0, "imgsz": 128, "warmup_epochs": 0.0, "val": False})
    return yolo, losses


@pytest.mark.parametrize(
    ("config", "amp"),
    [("yolo12n-seg.yaml", True), ("yolo12n-seg.yaml", "bf16"), ("yolo26n-seg.yaml", True), ("yolo26n-seg.yaml", False)],
)
def test_a_run_from_graphs_is_a_run(config: str, amp: Any, tiny_args: dict[str, Any], tmp_path: Path) -> None:
    data = create_dataset(tmp_path / "data", "segment", side=128)
    arguments = {**tiny_args, "amp": amp, "epochs": 4}
    _, eager = train(arguments, data, config, graphs="off", log=False)
    yolo, replayed = train(arguments, data, config, graphs="on")
    (told,) = of(events(yolo), "graphs")
    assert told["why_not"] == ""
    assert "loss_outside" not in told
    assert told["boxes"] > 0
    assert sum(epoch["graphs"]["replayed"] for epoch in of(events(yolo), "epoch")) == 7
    assert replayed == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("config", ["yolo12n-seg.yaml", "yolo26n-seg.yaml"])
def test_the_memory_of_masks_is_forecast(config: str) -> None:
    """From above, and not by far: of forward and backward of the loss, at 640 pixels with 20 boxes in an image."""
    gc.collect()
    torch.cuda.empty_cache()
    model: Any = YOLO(config).model.cuda().train()
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    images, boxes, side = 16, 20, (640, 640)
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        outputs = model.predict(torch.rand(images, 3, *side, device="cuda"))
    leaves, structure = pytree.tree_flatten(outputs)
    leaves = [leaf.requires_grad_() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    count = images * boxes
    batch = {
        "batch_idx": torch.arange(images).repeat_interleave(boxes).float(),
        "cls": torch.zeros(count, 1),
        "bboxes": torch.rand(count, 4) * 0.2 + 0.3,
        "masks": torch.zeros(images, 160, 160, device="cuda"),
        "sem_masks": torch.zeros(images, 160, 160, device="cuda"),
    }
    capacity = Capacity(boxes, count, 2**20, (boxes,) * images)
    loss = FixedShapeLoss(model.criterion, capacity)
    extra = [pad_targets(batch, images, boxes).cuda(), gains(model.criterion).cuda(), *loss.masks_of(batch)]

    def run() -> None:
        with torch.autocast("cuda", torch.float16):
            losses, _ = loss(pytree.tree_unflatten(leaves, structure), *extra)
        torch.autograd.grad(losses.sum(), [leaf for leaf in leaves if isinstance(leaf, Tensor)], allow_unused=True)

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    used = torch.cuda.max_memory_allocated() - before
    forecast = needed_bytes(capacity, images, side, model.criterion)
    print(f"{config}: {used / 2**20:.0f} MiB used, {forecast / 2**20:.0f} MiB forecast")
    semantic = images * 80 * 160 * 160 * 8 if "26" in config else 0  # whatever the boxes, as the network's own
    assert 0.5 * forecast <= used <= 1.2 * forecast + semantic + 2**28
