"""The detection loss in fixed shapes: what the criterion gives, for any boxes, and noticed where it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.loss import v8DetectionLoss

from tests.versions import loss_in_graphs
from yolo_flash.graphs import fixed_loss
from yolo_flash.graphs.capture import capture_step, loss_error, with_gradients
from yolo_flash.graphs.fixed_loss import Capacity, FixedShapeLoss, gains, needed, not_supported_reason, pad_targets

SIDE = 96
Batch = dict[str, Any]


def a_model(config: str) -> Any:
    model: Any = YOLO(config).model.train()
    model.args = copy.copy(DEFAULT_CFG)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.criterion = model.init_criterion()
    return model


@pytest.fixture(scope="module", params=["yolo12n.yaml", "yolo26n.yaml"])
def model(request: pytest.FixtureRequest) -> Any:
    return a_model(request.param)


def a_batch(of_image: list[int], seed: int = 0, images: int = 3, largest: float = 0.6) -> Batch:
    source = torch.Generator().manual_seed(seed)
    count = len(of_image)
    sizes = torch.rand(count, 2, generator=source) * (largest - 0.01) + 0.01
    centres = sizes / 2 + torch.rand(count, 2, generator=source) * (1 - sizes)
    return {
        "img": torch.rand(images, 3, SIDE, SIDE, generator=source),
        "batch_idx": torch.tensor(of_image, dtype=torch.float32),
        "cls": torch.randint(0, 80, (count, 1), generator=source).float(),
        "bboxes": torch.cat((centres, sizes), 1),
    }


BATCHES = {
    "some": a_batch([0] * 5 + [1] * 2 + [2] * 9),
    "an image without": a_batch([0] * 4 + [2] * 3, 1),
    "none": a_batch([], 2),
    "one": a_batch([1], 3),
    "one image": a_batch([0] * 7, 4, images=1),
    "crowded": a_batch([0] * 60 + [1] * 50, 6),
    "tiny": a_batch([0] * 6 + [1] * 6, 7, largest=0.02),
}


def of_criterion(model: Any, outputs: Any, batch: Batch) -> list[Tensor]:
    def run(inputs: Any) -> tuple[Tensor, Tensor]:
        losses, items = model.criterion(inputs, batch)
        return losses, torch.stack(list(items.values()))

    return with_gradients(run, outputs)


def of_fixed(model: Any, outputs: Any, batch: Batch, capacity: Capacity | None = None) -> list[Tensor]:
    images = len(batch["img"])
    capacity = capacity or Capacity().grown(needed(batch, images, (SIDE, SIDE), model.criterion))
    loss, targets = FixedShapeLoss(model.criterion, capacity), pad_targets(batch, images, capacity.boxes)
    return with_gradients(lambda inputs: loss(inputs, targets, gains(model.criterion)), outputs)


@loss_in_graphs
@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients_are_those_of_the_criterion(name: str, model: Any) -> None:
    batch = BATCHES[name]
    with torch.no_grad():
        outputs = model.predict(batch["img"])
    wanted, found = of_criterion(model, outputs, batch), of_fixed(model, outputs, batch)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert wanted[0].sum() > 0
    assert any(gradient.any() for gradient in found[2:])


@loss_in_graphs
def test_room_that_is_not_used_changes_nothing(model: Any) -> None:
    batch = BATCHES["some"]
    with torch.no_grad():
        outputs = model.predict(batch["img"])
    small, large = of_fixed(model, outputs, batch), of_fixed(model, outputs, batch, Capacity(100, 512, 2**15))
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@loss_in_graphs
def test_weights_of_classes_and_gains_are_the_runs(model: Any) -> None:
    batch = BATCHES["some"]
    with torch.no_grad():
        outputs = model.predict(batch["img"])
    before = of_fixed(model, outputs, batch)
    model = copy.deepcopy(model)
    model.class_weights = torch.linspace(0.5, 2.0, 80)
    model.args.box, model.args.dfl = 3.0, 0.7
    model.criterion = model.init_criterion()
    if hasattr(model.criterion, "update"):
        model.criterion.update()  # as after an epoch: the parts weigh otherwise
        assert gains(model.criterion)[3] != gains(model.init_criterion())[3]
    wanted, found = of_criterion(model, outputs, batch), of_fixed(model, outputs, batch)
    for a, b, other in zip(found[:2], wanted[:2], before[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(a, other, rtol=1e-3)


@loss_in_graphs
def test_half_precision_is_that_of_the_criterion() -> None:
    """Under autocast, as a GPU trains; there the same was seen to the bit."""
    model, batch = a_model("yolo12n.yaml"), BATCHES["some"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            outputs = model.predict(batch["img"])
        wanted, found = of_criterion(model, outputs, batch), of_fixed(model, outputs, batch)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_box_without_height_in_the_background_gives_no_nan() -> None:
    """Stock never looks at it; in float16 its gradient would be infinite, times the padding's weight, which is 0."""
    model, batch = a_model("yolo12n.yaml"), BATCHES["some"]
    with torch.no_grad():
        outputs = model.predict(batch["img"])
    outputs = {name: v if isinstance(v, list) else v.half() for name, v in outputs.items()}
    outputs["feats"] = [feature.half() for feature in outputs["feats"]]
    flat = outputs["boxes"].view(len(batch["img"]), 4, 16, -1)
    flat[0, 1::2, :, 0] = -1e4  # top and bottom of the first anchor: nothing but the first bin
    flat[0, 1::2, 0, 0] = 1e4
    for gradient in of_fixed(model, outputs, batch):
        assert gradient.isfinite().all()


# What a batch needs ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_batch_has_more_pairs_than_are_counted_on_the_cpu(dtype: torch.dtype) -> None:
    criterion = a_model("yolo12n.yaml").criterion
    features = [torch.zeros(1, 1, SIDE // stride, SIDE // stride, dtype=dtype) for stride in (8, 16, 32)]
    loss = FixedShapeLoss(criterion, Capacity())
    anchors, strides, _, scale = loss._constants_of(criterion, features, dtype)
    for seed in range(40):
        batch = a_batch([0] * 8 + [1] * 3, seed, images=2, largest=1.0 if seed % 2 else 0.1)
        batch["bboxes"][:4] = (batch["bboxes"][:4] * 12).round() / 12  # on the edges of cells
        counted = needed(batch, 2, (SIDE, SIDE), criterion)
        targets = pad_targets(batch, 2, counted.boxes)
        boxes = fixed_loss.xywh2xyxy(targets[..., 1:] * scale)
        exists = boxes.sum(2, keepdim=True).gt(0.0)
        actual = criterion.assigner.select_candidates_in_gts(anchors * strides, boxes, exists.float())
        torch.testing.assert_close(fixed_loss._inside(anchors * strides, boxes, exists, 16), actual)
        pairs = int((actual & exists).sum())
        assert pairs <= counted.pairs <= 5 * pairs + 100
        assert (counted.boxes, counted.total) == (8, 11)


@pytest.mark.parametrize("name", BATCHES)
def test_boxes_are_padded_in_the_order_of_the_criterion(name: str) -> None:
    batch, criterion = BATCHES[name], a_model("yolo12n.yaml").criterion
    images = len(batch["img"])
    flat = torch.cat((batch["batch_idx"].view(-1, 1), batch["cls"], batch["bboxes"]), 1)
    wanted = criterion.preprocess(flat, images, torch.ones(4))
    boxes = max(wanted.shape[1], 1)
    padded = pad_targets(batch, images, boxes)
    padded[..., 1:] = fixed_loss.xywh2xyxy(padded[..., 1:])
    torch.testing.assert_close(padded[:, : wanted.shape[1]], wanted)


def test_capacity_has_room_and_never_shrinks() -> None:
    first = Capacity().grown(Capacity(10, 100, 5000))
    assert first == Capacity(16, 192, 8192)
    assert first.holds(Capacity(16, 192, 8192))
    assert not first.holds(Capacity(17, 1, 1))
    assert not first.holds(Capacity(1, 193, 1))
    assert not first.holds(Capacity(1, 1, 8193))
    assert first.grown(Capacity(20, 1, 1)) == Capacity(32, 192, 8192)


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("yolo11n-pose.yaml", "v8PoseLoss"),
        ("yolo11n-obb.yaml", "v8OBBLoss"),
        ("yolo26n-pose.yaml", "PoseLoss26"),
    ],
)
def test_losses_of_other_tasks_stay_outside(config: str, name: str) -> None:
    assert not_supported_reason(a_model(config).criterion) == f"{name} is not the loss of detection or segmentation"


def test_an_older_ultralytics_keeps_its_loss_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fixed_loss.TaskAlignedAssigner, "pair_overlaps", raising=False)
    assert not_supported_reason(a_model("yolo12n.yaml").criterion) == "it needs ultralytics >= 8.4.180"


@loss_in_graphs
def test_a_users_loss_stays_outside(model: Any) -> None:
    assert not_supported_reason(model.criterion) == ""

    class Mine(v8DetectionLoss):
        pass

    assert not_supported_reason(Mine(a_model("yolo12n.yaml"))) == "Mine is not the loss of detection or segmentation"
    assert not_supported_reason(None) == "NoneType is not the loss of detection or segmentation"
    other: Any = a_model("yolo12n.yaml").criterion
    other.assigner = torch.nn.Identity()
    assert not_supported_reason(other) == "Identity is not the loss of detection or segmentation"


class Captured:
    """In the place of the graphs."""

    def __init__(self, model: Any, images: Tensor, loss: Any, extra: Any) -> None:
        self.loss = loss


@loss_in_graphs
def test_a_loss_that_differs_is_noticed_and_left_outside(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = BATCHES["some"]
    capacity = Capacity().grown(needed(batch, 3, (SIDE, SIDE), model.criterion))
    targets = pad_targets(batch, 3, capacity.boxes)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert loss_error(model, FixedShapeLoss(model.criterion, capacity), batch, targets) < 1e-6
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    step, why_not = capture_step(model, batch, targets, capacity, capture=Captured)  # type: ignore[arg-type]
    assert (isinstance(step.loss, FixedShapeLoss), why_not) == (True, "")

    few = Capacity(capacity.boxes, capacity.total, 8)
    step, why_not = capture_step(model, batch, targets, few, capture=Captured)  # type: ignore[arg-type]
    assert step.loss is None
    assert why_not.startswith("in fixed shapes it is off by ")

    def gone(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("nonzero_static")

    monkeypatch.setattr(torch, "nonzero_static", gone)
    step, why_not = capture_step(model, batch, targets, capacity, capture=Captured)  # type: ignore[arg-type]
    assert (step.loss, why_not) == (None, "NotImplementedError: nonzero_static")


@loss_in_graphs
def test_a_capture_that_fails_with_its_loss_is_one_of_the_network_alone(model: Any) -> None:
    class Refuses(Captured):
        def __init__(self, model: Any, images: Tensor, loss: Any, extra: Any) -> None:
            if loss is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
            super().__init__(model, images, loss, extra)

    batch = BATCHES["some"]
    capacity = Capacity().grown(needed(batch, 3, (SIDE, SIDE), model.criterion))
    targets = pad_targets(batch, 3, capacity.boxes)
    step, why_not = capture_step(model, batch, targets, capacity, capture=Refuses)  # type: ignore[arg-type]
    assert step.loss is None
    assert why_not == "RuntimeError: operation not permitted when stream is capturing"
