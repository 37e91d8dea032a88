"""The segmentation loss in fixed shapes: what the criterion gives, for any boxes and masks, in runs too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_leaves
from ultralytics import YOLO
from ultralytics.utils import YAML
from ultralytics.utils.loss import E2ELoss, v8SegmentationLoss
from ultralytics.utils.ops import xywh2xyxy

from tests.datasets import create_dataset
from tests.engine.test_telemetry import events, of
from tests.graphs.test_fixed_loss import BATCHES, SIDE, Batch, Captured, a_model, of_criterion
from tests.graphs.test_fixed_loss import a_batch as boxes_only
from tests.graphs.test_limits import a_trainer
from tests.graphs.test_policy import Replay, without_a_card
from tests.graphs.test_user_changes import Signed
from tests.graphs.test_user_changes import step as take_step
from tests.versions import loss_in_graphs
from yolo_flash import patch_model
from yolo_flash.graphs import boxes as boxes_module
from yolo_flash.graphs.capture import _labelled, capture_step, loss_error, with_gradients
from yolo_flash.graphs.fixed_loss import (
    Capacity,
    FixedShapeLoss,
    gains,
    needed,
    needed_bytes,
    not_supported_reason,
    pad_targets,
)
from yolo_flash.graphs.fixed_segmentation import MASK_ASSIGNER, Assigned, Masks, mask_loss
from yolo_flash.graphs.policy import GraphPolicy

pytestmark = loss_in_graphs


assigned_by_masks = pytest.mark.skipif(MASK_ASSIGNER is None, reason="this ultralytics assigns YOLO26 by boxes alone")


@pytest.fixture(scope="module", params=["yolo12n-seg.yaml", "yolo11n-seg.yaml", "yolo26n-seg.yaml"])
def model(request: pytest.FixtureRequest) -> Any:
    return a_model(request.param)


def with_masks(batch: Batch, side: int = SIDE // 4, seed: int = 0) -> Batch:
    """The batch, with a ragged mask in each of its boxes; the next box of an image lies on those before."""
    source = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(batch["img"]), side, side, dtype=torch.uint8)
    number = [0] * len(masks)
    for image, box in zip(batch["batch_idx"].long().tolist(), batch["bboxes"] * side, strict=True):
        number[image] += 1
        x, y, w, h = box.tolist()
        part = masks[image, int(y - h / 2) : int(y + h / 2) + 1, int(x - w / 2) : int(x + w / 2) + 1]
        part[torch.rand(part.shape, generator=source) < 0.7] = number[image]
    classes = torch.randint(0, 80, masks.shape, generator=source)
    return {**batch, "masks": masks, "sem_masks": classes.float()}


def a_batch(*args: Any, **kwargs: Any) -> Batch:
    return with_masks(boxes_only(*args, **kwargs))


def at_borders() -> Batch:
    batch = boxes_only([0] * 4 + [1] * 2, 8, images=2)
    corners = [[0.0, 0.0, 0.4, 0.3], [0.6, 0.7, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 0.75]]
    xyxy = torch.tensor([*corners, [0.0, 0.2, 0.1, 1.0], [0.9, 0.0, 1.0, 0.05]])
    batch["bboxes"] = torch.cat(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), 1)
    return with_masks(batch)


SEGMENTED = {name: with_masks(batch) for name, batch in BATCHES.items()} | {
    "small masks": with_masks(boxes_only([0] * 5 + [2] * 8, 9), SIDE // 8),
    "large masks": with_masks(boxes_only([0] * 2 + [2] * 3, 9), SIDE),
    "at borders": at_borders(),
    "all alike": with_masks(
        {**(alike := boxes_only([0] * 6 + [1] * 6, 10)), "bboxes": alike["bboxes"][:1].repeat(12, 1)}
    ),
}


def of_fixed(model: Any, outputs: Any, batch: Batch, capacity: Capacity | None = None) -> list[Tensor]:
    images = len(batch["img"])
    capacity = capacity or Capacity().grown(needed(batch, images, (SIDE, SIDE), model.criterion))
    loss, targets = FixedShapeLoss(model.criterion, capacity), pad_targets(batch, images, capacity.boxes)
    masks = loss.masks_of(batch)
    return with_gradients(lambda inputs: loss(inputs, targets, gains(model.criterion), *masks), outputs)


def outputs_of(model: Any, batch: Batch) -> Any:
    with torch.no_grad():
        return model.predict(batch["img"])


def same(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-5, atol: float = 1e-7) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# Against the criterion ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SEGMENTED)
def test_values_and_gradients_are_those_of_the_criterion(name: str, model: Any) -> None:
    batch = SEGMENTED[name]
    outputs = outputs_of(model, batch)
    wanted, found = of_criterion(model, outputs, batch), of_fixed(model, outputs, batch)
    same(found, wanted)
    assert list(model.criterion(outputs, batch)[1]) == list(FixedShapeLoss(model.criterion, Capacity()).names)
    assert wanted[1][1] > 0 or name in ("none", "one", "tiny")  # whose boxes may cover no pixel of a mask


def test_masks_count_and_so_do_their_numbers(model: Any) -> None:
    """What the comparison above would not notice if the loss asked for nothing but the boxes."""
    batch = SEGMENTED["some"]
    outputs = outputs_of(model, batch)
    found = of_fixed(model, outputs, batch)
    for masks in (torch.zeros_like(batch["masks"]), (batch["masks"] > 0).to(torch.uint8)):
        other = of_fixed(model, outputs, {**batch, "masks": masks})
        assert not torch.allclose(other[1][1], found[1][1], rtol=1e-3)
        assigned_by_masks = isinstance(model.criterion, E2ELoss) and MASK_ASSIGNER is not None  # YOLO26
        assert torch.equal(other[1][[0, 2, 3]], found[1][[0, 2, 3]]) is not assigned_by_masks


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("side", [24, 32])
def test_in_float64_nothing_differs_but_the_order_of_sums(share: float, side: int) -> None:
    """The mask term alone, for any foreground: of a share of the anchors, each with any box of its image."""
    criterion, batch = a_model("yolo11n-seg.yaml").criterion, with_masks(BATCHES["some"], side)
    source = torch.Generator().manual_seed(0)
    images, anchors, size = 3, 189, torch.full((4,), float(SIDE))
    targets = pad_targets(batch, images, 9)[..., 1:]
    of_box = (torch.rand(images, anchors, generator=source) * torch.tensor([[5.0], [2.0], [9.0]])).long()
    boxes = xywh2xyxy(targets.gather(1, of_box.unsqueeze(2).expand(-1, -1, 4))).double() * SIDE
    foreground = torch.rand(images, anchors, generator=source) < share
    coefficients = torch.randn(images, anchors, 32, dtype=torch.float64, generator=source).requires_grad_()
    proto = torch.randn(images, 32, 24, 24, dtype=torch.float64, generator=source).requires_grad_()
    masks = batch["masks"].double()
    stock_proto = interpolate(proto, (side, side), mode="bilinear") if side != 24 else proto
    found = Assigned(boxes, torch.empty(0), foreground, of_box)
    order = torch.tensor([2, 0, 1])
    mine = mask_loss(criterion, Masks(coefficients, proto, masks, size.double(), order, (12, 8, 7)), found)
    if share:
        given = (foreground, masks, of_box, boxes, batch["batch_idx"], stock_proto, coefficients, size[:2])
        stock = criterion.calculate_segmentation_loss(*given)
    else:
        stock = (coefficients * 0).sum() + (proto * 0).sum()  # as stock has it
    leaves = coefficients, proto
    wanted = stock, *torch.autograd.grad(stock, leaves)
    for a, b in zip((mine, *torch.autograd.grad(mine, leaves)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_criterion(dtype: torch.dtype, model: Any) -> None:
    """Under autocast, as a GPU trains: the products of an image's masks are one product here as there."""
    batch = SEGMENTED["some"]
    with torch.autocast("cpu", dtype=dtype):
        outputs = outputs_of(model, batch)
        wanted, found = of_criterion(model, outputs, batch), of_fixed(model, outputs, batch)
    same(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "capacity",
    [
        Capacity(9, 16, 4096, (9, 5, 2)),
        Capacity(100, 512, 2**15, (100, 40, 30)),
        Capacity(16, 64, 4096, (1000, 1000, 1000)),  # more rows than there are anchors
    ],
)
def test_room_that_is_not_used_changes_nothing(capacity: Capacity, model: Any) -> None:
    batch = SEGMENTED["some"]
    outputs = outputs_of(model, batch)
    same(of_fixed(model, outputs, batch, capacity), of_criterion(model, outputs, batch))


def test_rows_too_many_are_zero_even_where_numbers_are_infinite() -> None:
    """Coefficients of the background that overflow: stock never multiplies them with the prototypes."""
    model, batch = a_model("yolo11n-seg.yaml"), SEGMENTED["some"]
    outputs = outputs_of(model, batch)
    before = of_criterion(model, outputs, batch)
    (place,) = [i for i, leaf in enumerate(tree_leaves(outputs)) if leaf is outputs["mask_coefficient"]]
    background = ~before[2 + place].any(1, keepdim=True)
    assert 0 < background.sum() < background.numel()
    outputs["mask_coefficient"] = outputs["mask_coefficient"].masked_fill(background, float("inf"))
    found = of_fixed(model, outputs, batch)
    assert all(gradient.isfinite().all() for gradient in found)
    same(found, of_criterion(model, outputs, batch))


def test_gains_are_the_runs(model: Any) -> None:
    batch = SEGMENTED["some"]
    outputs = outputs_of(model, batch)
    before = of_fixed(model, outputs, batch)
    model = copy.deepcopy(model)
    model.args.box = 3.0
    model.criterion = model.init_criterion()
    found = of_fixed(model, outputs, batch)
    same(found, of_criterion(model, outputs, batch))
    assert float(found[1][1]) == pytest.approx(float(before[1][1]) * 3.0 / 7.5)


def test_two_parts_with_a_loss_of_their_own() -> None:
    """End to end: the second part has one anchor a box, and prototypes that it does not train."""
    model, batch = a_model("yolo11n-seg.yaml"), SEGMENTED["some"]
    many, one = outputs_of(model, batch), outputs_of(model, {**batch, "img": batch["img"].flip(3)})
    model.criterion = E2ELoss(model, v8SegmentationLoss)
    assert not_supported_reason(model.criterion) == ""
    outputs = {"one2many": many, "one2one": one}
    same(of_fixed(model, outputs, batch), of_criterion(model, outputs, batch))


# What a batch needs ---------------------------------------------------------------------------------------------------
def test_images_are_ranked_by_their_boxes() -> None:
    criterion = a_model("yolo11n-seg.yaml").criterion
    batch = boxes_only([0] * 3 + [1] * 9 + [3] * 4, images=4)
    assert needed(batch, 4, (SIDE, SIDE), criterion).ranked == (9, 4, 3, 0)
    assert needed(boxes_only([], images=4), 4, (SIDE, SIDE), criterion).ranked == (0, 0, 0, 0)
    assert needed(batch, 4, (SIDE, SIDE), a_model("yolo11n.yaml").criterion).ranked == ()


def test_room_for_ranks_grows_and_never_shrinks() -> None:
    first = Capacity().grown(Capacity(9, 16, 5000, (9, 4, 0)))
    assert first == Capacity(16, 64, 8192, (16, 8, 4))
    assert first.holds(Capacity(9, 16, 5000, (16, 8, 4)))
    assert not first.holds(Capacity(9, 16, 5000, (9, 9, 0)))
    assert not Capacity(16, 64, 8192).holds(Capacity(1, 1, 1, (1, 0, 0)))
    assert first.grown(Capacity(1, 1, 1, (1, 1, 20))).ranked == (16, 8, 32)


def test_the_memory_of_masks_is_in_the_forecast() -> None:
    """Of ten rows a box, and two numbers in float32 for each of their pixels."""
    model = a_model("yolo11n-seg.yaml")
    ranked = Capacity(16, 64, 4096, (16, 8, 4))
    masks = [
        needed_bytes(capacity, 3, (SIDE, 2 * SIDE), model.criterion)
        - needed_bytes(capacity._replace(ranked=()), 3, (SIDE, 2 * SIDE), model.criterion)
        for capacity in (ranked, ranked._replace(ranked=(32, 16, 8)))
    ]
    assert masks[1] == 2 * masks[0]
    assert masks[0] >= 28 * 10 * 24 * 48 * 8
    before = needed_bytes(ranked, 3, (SIDE, SIDE), model.criterion)
    model.args.mask_ratio = 2
    assert needed_bytes(ranked, 3, (SIDE, SIDE), model.criterion) - before == pytest.approx(1.5 * masks[0])


@assigned_by_masks
def test_the_memory_of_compared_masks_is_in_the_forecast() -> None:
    """Of the first image, 30 and 21 for each of its boxes."""
    ranked = Capacity(16, 64, 4096, (16, 8, 4))
    both = [
        needed_bytes(ranked, 3, (SIDE, SIDE), a_model(config).criterion)
        for config in ("yolo11n-seg.yaml", "yolo26n-seg.yaml")
    ]
    assert both[1] - both[0] > 16 * (30 + 21) * 24 * 24 * 5


# Refusals -------------------------------------------------------------------------------------------------------------
def test_what_stays_outside_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = a_model("yolo11n-seg.yaml").criterion
    assert not_supported_reason(criterion) == ""
    monkeypatch.setattr(criterion, "overlap", False)
    found = not_supported_reason(criterion)
    assert found == "overlap_mask=False has a mask for each box, of which every batch has another number"
    monkeypatch.setattr(criterion, "overlap", True)

    class Mine(v8SegmentationLoss):
        pass

    assert (
        not_supported_reason(Mine(a_model("yolo11n-seg.yaml"))) == "Mine is not the loss of detection or segmentation"
    )
    assert not_supported_reason(a_model("yoloe-11n-seg.yaml").criterion) == ""
    monkeypatch.setattr(v8SegmentationLoss, "single_mask_loss", staticmethod(lambda *args: torch.zeros(())))
    assert not_supported_reason(criterion) == "v8SegmentationLoss.single_mask_loss is not Ultralytics' own"


@assigned_by_masks
def test_an_assigner_of_a_users_leaves_the_loss_of_yolo26_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = a_model("yolo26n-seg.yaml").criterion
    assert not_supported_reason(criterion) == ""
    kind = type(criterion.one2one.assigner)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "pair_overlaps", lambda self, *args, **kwargs: None)
        assert not_supported_reason(criterion) == "SegTaskAlignedAssigner.pair_overlaps is not Ultralytics' own"
    criterion.one2one.assigner = a_model("yolo11n-seg.yaml").criterion.assigner
    assert not_supported_reason(criterion) == "TaskAlignedAssigner is not the loss of detection or segmentation"


def test_what_changes_is_noticed() -> None:
    criterion = a_model("yolo11n-seg.yaml").criterion
    loss = FixedShapeLoss(criterion, Capacity())
    assert loss.holds(criterion)
    criterion.overlap = False
    assert not loss.holds(criterion)


def test_a_loss_that_differs_is_noticed_and_left_outside(model: Any) -> None:
    batch = SEGMENTED["some"]
    capacity = Capacity().grown(needed(batch, 3, (SIDE, SIDE), model.criterion))
    targets = pad_targets(batch, 3, capacity.boxes)
    assert loss_error(model, FixedShapeLoss(model.criterion, capacity), batch, targets) < 1e-6
    step, why_not = capture_step(model, batch, targets, capacity, capture=Captured)  # type: ignore[arg-type]
    assert (isinstance(step.loss, FixedShapeLoss), why_not) == (True, "")
    few = capacity._replace(ranked=(2, 1, 1))
    step, why_not = capture_step(model, batch, targets, few, capture=Captured)  # type: ignore[arg-type]
    assert step.loss is None
    assert why_not.startswith("in fixed shapes it is off by ")


def test_a_batch_without_boxes_compares_masks_too(model: Any) -> None:
    batch = SEGMENTED["none"]
    capacity = Capacity().grown(needed(batch, 3, (SIDE, SIDE), model.criterion))
    loss = FixedShapeLoss(model.criterion, capacity)
    given, targets = _labelled(batch, pad_targets(batch, 3, capacity.boxes))
    assert loss_error(model, loss, given, targets) < 1e-6
    assert loss_error(model, loss, given | {"masks": batch["masks"]}, targets) < 1e-6
    assert model.criterion(outputs_of(model, given), given)[1]["seg_loss"] > 0
    assert not batch["masks"].any()


def test_where_stock_sums_in_half_precision_the_comparison_is_on_other_boxes(model: Any) -> None:
    """Its sum has the dtype of the prototypes where the first image has no foreground; ours is more exact."""
    batch = SEGMENTED["one image"]
    batch = with_masks({**batch, "batch_idx": batch["batch_idx"] + 1, "img": torch.rand(2, 3, SIDE, SIDE)})
    capacity = Capacity().grown(needed(batch, 2, (SIDE, SIDE), model.criterion))
    loss, targets = FixedShapeLoss(model.criterion, capacity), pad_targets(batch, 2, capacity.boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = outputs_of(model, batch)
        found, stock = of_fixed(model, outputs, batch)[1][1], of_criterion(model, outputs, batch)[1][1]
        assert float(stock) / 7.5 != pytest.approx(float(found) / 7.5, rel=1e-5)
        assert float(stock) == pytest.approx(float(found), rel=1e-2)
        given, made = _labelled(batch, targets)
        assert loss_error(model, loss, given, made) < 1e-4
    assert len(given["bboxes"]) == 2
    assert (made != 0).sum() == 2 * 4


# Runs -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Every run is one that could have graphs; those it had, which are eager."""
    return without_a_card(monkeypatch, Signed, lambda trainer, mode: [])


def train(args: dict[str, Any], config: str, graphs: str, data: str, **more: Any) -> tuple[Any, list[list[float]]]:
    """A run of four steps; its loss items at each of them, without the plugin where `graphs` is empty."""
    items: list[list[float]] = []
    model: Any = patch_model(YOLO(config), graphs=graphs) if graphs else YOLO(config)
    model.add_callback("on_train_batch_end", lambda t: items.append([float(v) for v in t.loss_items.values()]))
    model.train(
        **{**args, "data": data, "imgsz": 64, "epochs": 2, "nbs": 2, "warmup_epochs": 0.0, "val": False, **more}
    )
    return model, items


def tiny_segmenter(head: str = "Segment") -> str:
    """A model that trains in a third of the time of those that are shipped; `Segment26` is end to end."""
    layers = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 16, 32, 64, 128)] + [[-1, 1, "C2PSA", [128]]]
    of_head = [[[2, 3, 5], 1, head, ["nc", 32, 32]]]
    more = {"end2end": True, "reg_max": 1} if head == "Segment26" else {}
    YAML.save(
        "tiny-seg.yaml", {"nc": 80, "scales": {"n": [1.0, 1.0, 1024]}, "backbone": layers, "head": of_head, **more}
    )
    return "tiny-seg.yaml"


@pytest.mark.parametrize("head", ["Segment", "Segment26"])
def test_a_training_with_its_loss_from_graphs_is_an_unpatched_one(
    head: str, tiny_args: dict[str, Any], tmp_path: Path, made: list[Replay], log: list[str]
) -> None:
    data, config = create_dataset(tmp_path / "data", "segment"), tiny_segmenter(head)
    _, wanted = train(tiny_args, config, "", data)
    model, found = train(tiny_args, config, "on", data)
    (replay,) = made
    assert isinstance(replay.loss, FixedShapeLoss)
    assert (type(replay.loss.criterion) is E2ELoss) is (head == "Segment26")
    assert replay.calls == [2] * 3
    assert len(found) == len(wanted) == 4
    assert all(items[1] > 0 for items in wanted)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=1e-5)
    (told,) = of(events(model), "graphs")
    assert told["boxes"] == replay.loss.capacity.boxes > 0
    assert not [line for line in log if "stays outside" in line]


def test_a_mask_for_each_box_leaves_the_loss_outside(
    tiny_args: dict[str, Any], tmp_path: Path, made: list[Replay], log: list[str]
) -> None:
    data = create_dataset(tmp_path / "data", "segment")
    train(tiny_args, tiny_segmenter(), "on", data, overlap_mask=False)
    (replay,) = made
    assert replay.loss is None
    assert len(replay.calls) == 3
    assert (
        sum("the loss stays outside of them: overlap_mask=False has a mask for each box" in line for line in log) == 1
    )


def with_criterion() -> tuple[Any, GraphPolicy, Any, Batch]:
    """A model whose next forward is a replay, its policy and trainer, and the batch."""
    model = a_model("yolo11n-seg.yaml")
    graphs, trainer = GraphPolicy("on"), a_trainer(model)
    batch = a_batch([0] * 3 + [1] * 2, images=2)
    trainer.args.imgsz = SIDE
    graphs.prepare(trainer)
    for _ in range(2):
        take_step(graphs, trainer, batch)
        model(batch)
        graphs.after_step(trainer)
    return model, graphs, trainer, batch


@pytest.mark.parametrize("how", ["given anew", "in place", "another shape"])
def test_masks_that_change_behind_preprocess_batch_are_those_of_the_loss(how: str, made: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion()
    assert [replay.calls for replay in made] == [[2]]
    if how == "another shape":
        batch = with_masks(batch, SIDE // 2)
    take_step(graphs, trainer, batch)
    given = batch
    if how == "in place":
        batch["masks"].zero_()
    elif how == "given anew":
        given = {**batch, "masks": torch.zeros_like(batch["masks"])}
    found = model(given)[0]
    assert torch.equal(found, model.criterion(model.predict(given["img"]), given)[0])
    graphs.after_step(trainer)
    (why_not,) = graphs.end_epoch(trainer)["eager"].keys() - {"before there were graphs"}
    wanted = "masks of another shape than" if how == "another shape" else "boxes or masks were changed after"
    assert why_not.startswith(wanted)
    assert made[0].calls == [2]


def test_more_boxes_in_the_smaller_image_than_there_is_room_for_are_captured_anew(made: list[Replay]) -> None:
    model, graphs, trainer, _ = with_criterion()
    assert made[0].loss.capacity.ranked == (8, 4)
    for of_image, captures in (([0] * 4 + [1] * 8, 1), ([0] * 7 + [1] * 7, 2), ([0] * 12 + [1] * 8, 2)):
        crowd = a_batch(of_image, images=2)
        take_step(graphs, trainer, crowd)
        found = model(crowd)[0].detach()
        torch.testing.assert_close(found, model.criterion(model.predict(crowd["img"]), crowd)[0].detach())
        graphs.after_step(trainer)
        assert len(made) == captures
    assert [replay.calls for replay in made] == [[2, 2], [2, 2]]


def test_masks_for_which_memory_is_short_leave_the_step_eager(
    made: list[Replay], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    model, graphs, trainer, _ = with_criterion()
    need = needed_bytes(Capacity().grown(Capacity(60, 60, 1, (60, 0))), 2, (SIDE, SIDE), model.criterion)
    boxes = needed_bytes(Capacity(96, 96), 2, (SIDE, SIDE), model.criterion)
    monkeypatch.setattr(boxes_module, "free_bytes", lambda device: 4 * boxes)
    assert need > boxes
    crowd = a_batch([0] * 60, images=2)
    take_step(graphs, trainer, crowd)
    model(crowd)
    graphs.after_step(trainer)
    assert graphs.end_epoch(trainer)["eager"]["too many boxes in an image for the memory"] == 1
    assert sum("a batch with 60 boxes in an image runs without CUDA graphs" in line for line in log) == 1
    assert [replay.calls for replay in made] == [[2]]
