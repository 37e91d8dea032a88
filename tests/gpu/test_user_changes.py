"""Trainings of two epochs in which a callback changes something behind the graphs: losses are those of eager steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import BaseModel

from tests.engine.test_telemetry import events, of
from tests.graphs.test_user_changes import CHANGES
from yolo_flash import patch_model
from yolo_flash.graphs import policy as policy_module
from yolo_flash.graphs.capture import _labelled, loss_error
from yolo_flash.graphs.fixed_loss import Capacity, FixedShapeLoss, needed_bytes, pad_targets
from yolo_flash.graphs.graphed_step import FlashGraphError
from yolo_flash.utils.stock_code import foreign

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ANEW = {  # may be captured again: a number that is part of the signature
    "eps of BatchNorm",
    "momentum of BatchNorm",
    "numbers of a convolution",
    "strides of the loss",
    "reg_max",
    "another head",
    "the cross-entropy",
    "weight of positives",
    "eps of the assigner",
}
ALONE = {  # the network alone is: the loss is the user's
    "the loss class's function",
    "the loss's function",
    "a small term",
    "the box loss",
    "a function that the loss calls",
}
LAYERS = {"a layer's forward", "a layer class's forward"}  # `on` captures them as they are
EAGER = {"the model's loss", "the class's loss", "the model's predict", "the class's predict"}


def change_in_second_epoch(
    change: str, graphs: str, config: str, args: dict[str, Any]
) -> tuple[list[float], list[float], Any]:
    """Losses and running variances of four steps; the model. Eager steps are not profiled, to save time."""
    found: list[float] = []
    variances: list[float] = []
    model = patch_model(YOLO(config), graphs=graphs, log=graphs != "off")
    patch = pytest.MonkeyPatch()

    def begin(trainer: Any) -> None:
        if trainer.epoch == 1:
            own = trainer.model
            values = {"pos_weight": torch.full((80,), 5.0, device="cuda")}
            if change == "weight of positives":
                vars(own.criterion.bce).update(values)
            elif change == "the cross-entropy":
                own.criterion.bce = nn.BCEWithLogitsLoss(reduction="none", **values)
            elif change.endswith("'s loss"):
                half = lambda self, batch, preds=None: scaled(LOSS(self, batch, preds))  # noqa: E731
                if "class" in change:
                    patch.setattr(BaseModel, "loss", half)
                else:
                    own.loss = half.__get__(own)
            else:
                CHANGES[change](own, patch)

    def end(trainer: Any) -> None:
        found.append(trainer.loss.item())
        variances.append(trainer.model.model[0].bn.running_var.sum().item())

    model.add_callback("on_train_epoch_start", begin)
    model.add_callback("on_train_batch_end", end)
    try:
        model.train(**{**args, "device": 0, "imgsz": 128, "epochs": 2, "warmup_epochs": 0.0, "val": False})
    except FlashGraphError as error:
        assert "none of 2 steps of the epoch ran from CUDA graphs" in str(error)  # noqa: PT017
        assert graphs == "on"
        assert change in EAGER
    else:
        assert graphs == "off" or change not in EAGER
    finally:
        patch.undo()
    return found, variances, model


LOSS = BaseModel.loss


def scaled(given: Any) -> Any:
    losses, items = given
    return losses * 0.5, items


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_second_epoch_counts(change: str, tiny_model: str, tiny_args: dict[str, Any]) -> None:
    wanted, variances, _ = change_in_second_epoch(change, "off", tiny_model, tiny_args)
    found, moved, model = change_in_second_epoch(change, "on", tiny_model, tiny_args)
    assert len(found) == len(wanted) == 4
    assert found == pytest.approx(wanted, rel=0.01)  # eps of BatchNorm, unseen, would be off by 0.018
    assert moved == pytest.approx(variances, rel=1e-3)  # which a momentum that is not seen would leave far off
    told = of(events(model), "graphs")
    assert told[0]["why_not"] == ""
    if change in ALONE:
        assert "loss_outside" in told[-1]
    assert bool(told[-1]["why_not"]) is (change in EAGER)
    assert {*ANEW, *ALONE, *LAYERS, *EAGER} == set(CHANGES)


def test_auto_and_on_count_their_replays(tiny_model: str, tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO(tiny_model), graphs="on")
    model.train(**{**tiny_args, "device": 0, "imgsz": 128, "epochs": 2, "val": False})
    counts = [epoch["graphs"] for epoch in of(events(model), "epoch")]
    assert [(count["steps"], count["replayed"]) for count in counts] == [(2, 1), (2, 2)]
    assert sum("2 of 2 steps from CUDA graphs" in line for line in log) == 1


def test_multi_scale_under_on_that_never_replays_is_an_error(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.randrange", lambda *args: 192)
    model = patch_model(YOLO(tiny_model), graphs="on")
    with pytest.raises(FlashGraphError, match="another shape than"):
        model.train(**{**tiny_args, "device": 0, "imgsz": 128, "epochs": 2, "multi_scale": 0.5})


def test_the_memory_of_many_boxes_is_forecast() -> None:
    """From above, and not by far: what the assignment of 64 images with 200 boxes each takes at 640 pixels."""
    model: Any = YOLO("yolo12n.yaml").model.cuda().train()
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    images, boxes = 16, 200
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        outputs = model.predict(torch.rand(images, 3, 640, 640, device="cuda"))
    capacity = Capacity(boxes, images * boxes, 2**20)
    loss = FixedShapeLoss(model.criterion, capacity)
    count = images * boxes
    batch = {
        "batch_idx": torch.arange(images).repeat_interleave(boxes).float(),
        "cls": torch.zeros(count, 1),
        "bboxes": torch.rand(count, 4) * 0.05 + 0.3,
    }
    targets, gains = pad_targets(batch, images, boxes).cuda(), torch.ones(5, device="cuda")
    with torch.no_grad():
        loss(outputs, targets, gains)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(outputs, targets, gains)
    used = torch.cuda.max_memory_allocated() - before
    forecast = needed_bytes(capacity, images, (640, 640), model.criterion)
    print(f"assignment: {used / 2**20:.0f} MiB used, {forecast / 2**20:.0f} MiB forecast")
    assert 0.5 * forecast <= used <= 1.1 * forecast


def test_what_is_shipped_is_stock_on_the_card(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes graphs for a patched model: nothing of ours counts as somebody else's."""
    monkeypatch.setattr(policy_module, "_GAIN", 0.0)
    seen: list[str] = []
    model = patch_model(YOLO(tiny_model), graphs="auto")
    model.add_callback("on_train_batch_end", lambda trainer: seen.append(foreign(trainer.model.modules())))
    model.train(**{**tiny_args, "device": 0, "imgsz": 128, "epochs": 5, "val": False})
    assert set(seen) == {""}
    assert of(events(model), "graphs")[-1]["why_not"] == ""
    assert sum(epoch["graphs"]["replayed"] for epoch in of(events(model), "epoch")) >= 5


def test_a_batch_without_boxes_compares_losses_that_are_not_zero() -> None:
    model: Any = YOLO("yolo12n.yaml").model.cuda().train()
    model.args = get_cfg()
    model.criterion = model.init_criterion()
    empty = {"batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    batch = {**{k: v.cuda() for k, v in empty.items()}, "img": torch.rand(2, 3, 128, 128, device="cuda")}
    loss = FixedShapeLoss(model.criterion, Capacity().grown(Capacity(1, 1, 1)))
    given, targets = _labelled(batch, pad_targets(empty, 2, 8))
    assert len(given["bboxes"]) == 2
    assert loss_error(model, loss, given, targets) < 1e-3
