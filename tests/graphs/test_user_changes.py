"""What a user changes is run, always: a step that stands for something else ends eager, with a line."""

from __future__ import annotations

import copy
import functools
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import ultralytics.utils.loss as loss_module
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.torch_utils import unwrap_model

from tests.engine.test_telemetry import events, of
from tests.graphs.test_limits import a_trainer
from tests.graphs.test_policy import Replay, losses_of, with_criterion, without_a_card
from tests.versions import loss_in_graphs
from yolo_flash import patch_model
from yolo_flash.graphs import boxes as boxes_module
from yolo_flash.graphs import capture as capture_module
from yolo_flash.graphs import fixed_loss
from yolo_flash.graphs import policy as policy_module
from yolo_flash.graphs.capture import LABELS, NextCall
from yolo_flash.graphs.fixed_loss import Capacity, FixedShapeLoss
from yolo_flash.graphs.graphed_step import FlashGraphError, _Replay
from yolo_flash.graphs.inference import InferenceGraphs
from yolo_flash.graphs.limits import not_supported_reasons
from yolo_flash.graphs.policy import GraphPolicy, Phase
from yolo_flash.graphs.signature import Signature

pytestmark = [pytest.mark.usefixtures("tiny_model"), loss_in_graphs]


class Signed(Replay):
    """In the place of `GraphedStep`, with its look at the model."""

    def __init__(self, model: Any, images: Tensor, loss: Any = None, extra: Any = (), beside: Any = ()) -> None:
        super().__init__(model, images, loss, extra, beside)
        self.signature = Signature(model.modules(), [*model.parameters(), *model.buffers()])

    def stale(self) -> bool:
        return self.signature.changed()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Every run is on a card, for all that forbids graphs but the card; the graphs that there were."""
    on_card = lambda trainer, mode: [r for r in not_supported_reasons(trainer, mode) if "NVIDIA" not in r]  # noqa: E731
    return without_a_card(monkeypatch, Signed, on_card)


def step(graphs: GraphPolicy, trainer: Any, batch: dict[str, Any]) -> None:
    graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))


def mine(self: Any, batch: Any, preds: Any = None) -> Any:
    """A user's loss."""
    return torch.full((3,), -1.0), {"box_loss": torch.tensor(-1.0)}


def doubled(original: Any) -> Any:
    @functools.wraps(original)
    def wrapper(self: Any, preds: Any, batch: Any, **kwargs: Any) -> Any:
        targets, loss, *rest = original(self, preds, batch, **kwargs)
        return (targets, loss * 2, *rest)

    return wrapper


def of_layer(model: Any) -> None:
    model.model[1].forward = MethodType(lambda self, x: type(self).forward(self, x) * 0.5, model.model[1])


def every(model: Any, kind: type, **values: Any) -> None:
    for module in model.modules():
        if isinstance(module, kind):
            vars(module).update(values)


def smaller_ious(*args: Any, **kwargs: Any) -> Any:
    return IOU(*args, **kwargs) * 0.5


IOU = loss_module.bbox_iou

CHANGES: dict[str, Any] = {  # name -> what is done to the model
    "the model's loss": lambda model, patch: setattr(model, "loss", MethodType(mine, model)),
    "the class's loss": lambda model, patch: patch.setattr(BaseModel, "loss", mine),
    "the model's predict": lambda model, patch: setattr(
        model, "predict", lambda x, *args, **more: type(model).predict(model, x * 0.5)
    ),
    "the class's predict": lambda model, patch: patch.setattr(
        BaseModel, "predict", lambda self, x, *args, **more: self._predict_once(x * 0.5)
    ),
    "a layer's forward": lambda model, patch: of_layer(model),
    "a layer class's forward": lambda model, patch: patch.setattr(Conv, "forward", lambda self, x: self.conv(x)),
    "eps of BatchNorm": lambda model, patch: every(model, nn.BatchNorm2d, eps=0.5),
    "momentum of BatchNorm": lambda model, patch: every(model, nn.BatchNorm2d, momentum=0.5),
    "numbers of a convolution": lambda model, patch: every(model.model[0], nn.Conv2d, dilation=(2, 2), padding=(2, 2)),
    "strides of the loss": lambda model, patch: model.criterion.stride.mul_(1.5),
    "reg_max": lambda model, patch: setattr(model.criterion, "reg_max", 17),
    "another head": lambda model, patch: model.model.__setitem__(-1, copy.deepcopy(model.model[-1])),
    "the loss class's function": lambda model, patch: patch.setattr(
        v8DetectionLoss, "get_assigned_targets_and_loss", doubled(v8DetectionLoss.get_assigned_targets_and_loss)
    ),
    "the loss's function": lambda model, patch: setattr(
        model.criterion,
        "get_assigned_targets_and_loss",
        MethodType(doubled(v8DetectionLoss.get_assigned_targets_and_loss), model.criterion),
    ),
    "a small term": lambda model, patch: patch.setattr(
        v8DetectionLoss, "bbox_decode", lambda self, a, d, own=v8DetectionLoss.bbox_decode: own(self, a, d) * (1 + 1e-6)
    ),
    "the cross-entropy": lambda model, patch: setattr(
        model.criterion, "bce", nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full((80,), 5.0))
    ),
    "weight of positives": lambda model, patch: setattr(model.criterion.bce, "pos_weight", torch.full((80,), 5.0)),
    "eps of the assigner": lambda model, patch: setattr(model.criterion.assigner, "eps", 0.1),
    "the box loss": lambda model, patch: setattr(
        model.criterion.bbox_loss,
        "forward",
        lambda *args, own=model.criterion.bbox_loss.forward: tuple(part * 0.5 for part in own(*args)),
    ),
    "a function that the loss calls": lambda model, patch: patch.setattr(loss_module, "bbox_iou", smaller_ious),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_within_a_run_counts_from_the_next_step_on(
    change: str, made: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured anew, with the network alone, or eager: the losses are those of the model as it is."""
    model, graphs, trainer, batch = with_criterion("on")
    for _ in range(3):
        step(graphs, trainer, batch)
        model(batch)
        graphs.after_step(trainer)
    assert [replay.calls for replay in made] == [[2, 2]]
    before = model(batch)[0].detach()
    CHANGES[change](model, monkeypatch)
    wanted = model(batch)[0].detach()
    step(graphs, trainer, batch)
    found = model(batch)[0].detach()
    graphs.after_step(trainer)
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert made[0].calls == [2, 2]  # what was captured before is not used any more
    same = change in ("momentum of BatchNorm", "strides of the loss", "reg_max", "another head", "a small term")
    assert torch.allclose(before, wanted, rtol=1e-3) is same, "the change should be seen in the losses"
    counted = graphs.end_epoch(trainer)
    assert counted["replayed"] in (2, 3)
    assert counted["steps"] == 4


@pytest.mark.parametrize("how", ["given anew", "in place"])
def test_boxes_that_change_behind_preprocess_batch_are_those_of_the_loss(how: str, made: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    for _ in range(2):
        step(graphs, trainer, batch)
        model(batch)
        graphs.after_step(trainer)
    step(graphs, trainer, batch)
    if how == "in place":
        batch["bboxes"] *= 0.2
        given = batch
    else:
        given = {**batch, "bboxes": batch["bboxes"] * 0.2}
    found = model(given)[0]
    assert torch.equal(found, model.criterion(model.predict(given["img"]), given)[0])
    graphs.after_step(trainer)
    assert graphs.end_epoch(trainer)["eager"]["boxes or masks were changed after preprocess_batch"] == 1
    assert made[0].calls == [2]


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_loss_that_a_callback_puts_on_the_model_trains_it(graphs: str, tiny_args: dict[str, Any]) -> None:
    """On any device: nothing of the plugin takes away what it has not put there."""
    calls: list[int] = []
    model = patch_model(YOLO("tiny.yaml"), graphs=graphs)

    def counted(self: Any, batch: Any, preds: Any = None) -> Any:
        calls.append(1)
        return type(self).loss(self, batch, preds)

    def put_on(trainer: Any) -> None:
        own = unwrap_model(trainer.model)
        own.loss = MethodType(counted, own)

    model.add_callback("on_train_start", put_on)
    model.train(**{**tiny_args, "epochs": 2})
    assert len(calls) >= 4
    assert "loss" in vars(model.trainer.model)


def test_auto_says_in_one_line_whose_loss_it_leaves_alone(
    tiny_args: dict[str, Any], made: list[Replay], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "_TIMED", 0)
    model, losses = losses_of("on_train_batch_end", graphs="auto")
    model.add_callback("on_train_start", lambda trainer: CHANGES["the model's loss"](trainer.model, None))
    with pytest.raises(RuntimeError, match="does not require grad"):  # the user's loss is a constant
        model.train(**{**tiny_args, "epochs": 2})
    monkeypatch.setattr(BaseModel, "loss", lambda self, b, p=None, own=BaseModel.loss: own(self, b, p))
    model, losses = losses_of("on_train_batch_end", graphs="auto")
    model.train(**{**tiny_args, "epochs": 2})
    assert len(losses) == 4
    assert made == []
    assert sum("no CUDA graphs: BaseModel.loss is not Ultralytics' own" in line for line in log) == 1
    with pytest.raises(FlashGraphError, match=r"flash\.graphs=on cannot run: BaseModel\.loss is not Ultralytics' own"):
        patch_model(YOLO("tiny.yaml"), graphs="on").train(**tiny_args)


def test_preprocess_batch_wrapped_on_the_instance_keeps_the_loss_outside(
    tiny_args: dict[str, Any], made: list[Replay]
) -> None:
    losses: dict[str, list[float]] = {}

    def wrap(trainer: Any) -> None:
        original = trainer.preprocess_batch

        def smaller(batch: dict[str, Any]) -> dict[str, Any]:
            batch = original(batch)
            batch["bboxes"] = batch["bboxes"] * 0.5
            return batch

        trainer.preprocess_batch = smaller

    for mode in ("off", "on"):
        model, losses[mode] = losses_of("on_train_batch_end", graphs=mode)
        model.add_callback("on_train_start", wrap)
        model.train(**{**tiny_args, "epochs": 2})
    assert losses["on"] == losses["off"]
    assert [replay.loss for replay in made] == [None]


# Modules --------------------------------------------------------------------------------------------------------------
class Aux(nn.Module):
    """Leaves a loss on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.losses = [(x * self.weight).mean()]
        return x


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_module_that_leaves_a_loss_on_itself_is_not_captured(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its class is defined within Ultralytics, as in a fork."""
    monkeypatch.setattr(Aux, "__module__", "ultralytics.nn.modules.block")
    model, _, trainer, batch = with_criterion("auto", device="cuda")
    first = model.model[0]
    model.model[0] = nn.Sequential(first, Aux())
    vars(model.model[0]).update(f=first.f, i=first.i, type="x")
    model(batch["img"])
    reasons = not_supported_reasons(trainer, mode)
    assert any("model.0.1.losses is a tensor of the last step's own" in reason for reason in reasons)
    assert any("Aux" in reason for reason in reasons) is (mode == "auto")


def test_a_callback_that_replaces_a_function_of_a_layer_s_class_is_named() -> None:
    model, _, trainer, _ = with_criterion("auto", device="cuda")
    of_layer(model)
    (reason,) = not_supported_reasons(trainer, "auto")
    assert reason.startswith("Conv.forward is neither torch's nor Ultralytics'")


# Counting -------------------------------------------------------------------------------------------------------------
class OwnLoop(DetectionTrainer):
    """Calls network and loss apart."""

    def _do_train(self) -> None:
        self._setup_train()
        for self.epoch in range(2):
            self.run_callbacks("on_train_epoch_start")
            for batch in self.train_loader:
                self.run_callbacks("on_train_batch_start")
                batch = self.preprocess_batch(batch)
                outputs = self.model(batch["img"])
                self.loss = self.model.loss(batch, outputs)[0].sum()
                self.loss.backward()
                self.optimizer_step()
                self.run_callbacks("on_train_batch_end")
            self.lr: dict[str, float] = {}
            self.run_callbacks("on_train_epoch_end")


def test_a_loop_that_never_replays_is_told(
    tiny_args: dict[str, Any], made: list[Replay], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {**tiny_args, "epochs": 2, "val": False}
    with pytest.raises(
        FlashGraphError, match=r"none of 2 steps of the epoch ran from CUDA graphs .*for something else"
    ):
        patch_model(YOLO("tiny.yaml"), graphs="on").train(trainer=OwnLoop, **args)
    monkeypatch.setattr(policy_module, "_TIMED", 0)
    model = patch_model(YOLO("tiny.yaml"), graphs="auto")
    with pytest.raises(FileNotFoundError):  # the loop saves nothing
        model.train(trainer=OwnLoop, **args)
    assert sum("no CUDA graphs: none of 2 steps of the epoch" in line for line in log) == 1
    assert [replay.calls for replay in made] == [[], []]
    assert [epoch["graphs"]["replayed"] for epoch in of(events(model), "epoch")] == [0, 0]


def test_on_with_multi_scale_that_never_meets_its_shape_is_an_error(
    tiny_args: dict[str, Any], made: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DetectionTrainer.preprocess_batch
    smaller = lambda self, batch: shrunk(original(self, batch))  # noqa: E731
    monkeypatch.setattr(DetectionTrainer, "preprocess_batch", smaller)
    with pytest.raises(FlashGraphError, match=r"none of 2 steps .*2 x images of another shape than \[2, 32, 32\]"):
        patch_model(YOLO("tiny.yaml"), graphs="on").train(**{**tiny_args, "multi_scale": 0.5})


def test_an_epoch_without_a_replay_after_others_is_a_warning(made: list[Replay], log: list[str]) -> None:
    """Of multi_scale: a run does not end by bad luck."""
    model, graphs, trainer, batch = with_criterion("on")
    for _ in range(3):
        step(graphs, trainer, batch)
        model(batch)
        graphs.after_step(trainer)
    assert graphs.end_epoch(trainer)["replayed"] == 2
    other = {**batch, "img": torch.rand(2, 3, 64, 64)}
    step(graphs, trainer, other)
    model(other)
    assert graphs.end_epoch(trainer)["replayed"] == 0
    assert sum("none of 1 steps of the epoch ran from CUDA graphs" in line for line in log) == 1


def shrunk(batch: dict[str, Any]) -> dict[str, Any]:
    batch["img"] = nn.functional.interpolate(batch["img"], scale_factor=2.0)
    return batch


def test_replays_are_counted_in_the_log_and_in_flash_jsonl(
    tiny_args: dict[str, Any], made: list[Replay], log: list[str]
) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    model.train(**{**tiny_args, "batch": 3, "imgsz": 64, "epochs": 3})
    shape = "images of another shape than [3, 64, 64]"
    assert [epoch["graphs"] for epoch in of(events(model), "epoch")] == [
        {"steps": 2, "replayed": 0, "eager": {"before there were graphs": 1, shape: 1}},
        *[{"steps": 2, "replayed": 1, "eager": {shape: 1}}] * 2,
    ]
    assert sum(f"1 of 2 steps from CUDA graphs, 1 not: {shape}" in line for line in log) == 2


def test_a_users_own_loop_gets_its_gradients_through_autograd(made: list[Replay]) -> None:
    _, graphs, trainer, batch = with_criterion("on")
    own = type("OwnTrainer", (type(trainer),), {"_do_train": lambda self: None})(**vars(trainer))
    own.epoch = 1
    for wanted, kind in ((False, trainer), (True, own)):
        for _ in range(2):
            step(graphs, kind, batch)
        assert made[0].through_autograd is wanted


# Boxes and memory -----------------------------------------------------------------------------------------------------
def crowded(batch: dict[str, Any], count: int) -> dict[str, Any]:
    boxes = torch.full((count, 4), 0.5)
    return {**batch, "batch_idx": torch.zeros(count), "cls": torch.zeros(count, 1), "bboxes": boxes}


def test_a_batch_with_too_many_boxes_for_the_memory_runs_eager_and_the_others_from_graphs(
    made: list[Replay], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    need = fixed_loss.needed_bytes(Capacity().grown(Capacity(1500, 1500, 1)), 2, (32, 32), model.criterion)
    assert need > 2 * 1500 * 21 * 4  # of 21 anchors
    monkeypatch.setattr(boxes_module, "free_bytes", lambda device: 3 * need)
    given = [batch, crowded(batch, 1500), batch, crowded(batch, 1500), batch, crowded(batch, 1500), batch]
    for now in given:  # the second would have been the one to capture on
        step(graphs, trainer, now)
        found = model(now)[0].detach()
        assert torch.allclose(found, model.criterion(model.predict(now["img"]), now)[0], rtol=1e-5)
        graphs.after_step(trainer)
    (replay,) = made
    assert isinstance(replay.loss, FixedShapeLoss)
    assert replay.calls == [2, 2, 2]
    assert graphs.end_epoch(trainer)["eager"]["too many boxes in an image for the memory"] == 3
    assert sum("a batch with 1500 boxes in an image runs without CUDA graphs" in line for line in log) == 1


def short_of_memory_once(graphs: GraphPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first capture runs out of memory."""

    def short(*args: Any) -> Any:
        monkeypatch.setattr(graphs, "_capture_step", Signed)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "_capture_step", short)


def test_a_capture_that_ran_out_of_memory_once_is_tried_on_another_batch(
    made: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    short_of_memory_once(graphs, monkeypatch)
    for _ in range(4):
        step(graphs, trainer, batch)
        model(batch)
        graphs.after_step(trainer)
    (replay,) = made
    assert isinstance(replay.loss, FixedShapeLoss)
    assert replay.calls == [2, 2]


def test_on_that_loses_its_graphs_is_an_error_also_behind_a_capture_that_ran_out_of_memory(
    made: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    short_of_memory_once(graphs, monkeypatch)
    monkeypatch.setattr(Signed, "stale", lambda self: True)  # the model changes in every step
    for _ in range(6):
        step(graphs, trainer, batch)
        model(batch)
    assert graphs.end_epoch(trainer)["replayed"] == 3
    assert graphs.phase is Phase.GIVEN_UP
    step(graphs, trainer, batch)
    with pytest.raises(FlashGraphError, match=r"none of 1 steps .* the model changed after each of 3 captures"):
        graphs.end_epoch(trainer)


def test_a_batch_without_boxes_does_not_hide_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared on it were zero and zero; so a few boxes are made."""
    model, _, _, batch = with_criterion("auto")
    empty = crowded(batch, 0)
    monkeypatch.setattr(
        v8DetectionLoss,
        "get_assigned_targets_and_loss",
        doubled(v8DetectionLoss.get_assigned_targets_and_loss),
    )
    loss = FixedShapeLoss(model.criterion, Capacity().grown(Capacity(1, 1, 1)))
    targets = fixed_loss.pad_targets(empty, 2, 8)
    assert capture_module.loss_error(model, loss, *capture_module._labelled(empty, targets)) > 0.1
    assert empty["bboxes"].shape == (0, 4)
    assert not targets.any()


def test_boxes_in_another_order_than_their_images_are_left_to_the_loss_of_stock(made: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    for _ in range(2):
        step(graphs, trainer, batch)
        model(batch)
    (replay,) = made
    assert replay.loss is not None
    for order in ([0, 1], [1, 0]):
        boxes = graphs.before_transfer(trainer, batch | {name: batch[name][order] for name in LABELS})
        assert (boxes.needed is None) is (boxes.targets is None) is (order == [1, 0])


def test_batches_that_all_have_too_many_boxes_leave_the_loss_outside(
    made: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    monkeypatch.setattr(boxes_module, "free_bytes", lambda device: 1000)
    for _ in range(6):
        step(graphs, trainer, crowded(batch, 50))
        model(crowded(batch, 50))
        graphs.after_step(trainer)
    (replay,) = made
    assert replay.loss is None
    assert graphs._facts()["loss_outside"] == "too many boxes in an image for the memory"


def test_parts_with_gains_of_their_own_are_not_captured(made: list[Replay]) -> None:
    model: Any = YOLO("yolo26n.yaml").model
    model.args = with_criterion("auto")[0].args
    criterion = model.init_criterion()
    loss = FixedShapeLoss(criterion, Capacity(8, 64, 4096))
    assert loss.holds(criterion)
    criterion.one2one.hyp = copy.copy(criterion.one2one.hyp)
    assert not loss.holds(criterion)
    assert fixed_loss.not_supported_reason(criterion) == "its parts have gains of their own"


def test_the_retry_of_stock_s_assigner_is_no_change(made: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion("on")
    for _ in range(3):
        step(graphs, trainer, batch)
        model(batch)
        model.criterion.assigner._oom_warned = True
    assert len(made) == 1


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("freq", ("array", "another array")), ("stride", ([8, 16], [8, 4]))],
)
def test_what_cannot_be_compared_and_lists_of_the_loss_count(attribute: str, values: Any) -> None:
    class Part:
        __module__ = "ultralytics.utils.tal"

    part: Any = Part()
    first, second = values
    if first == "array":
        first, second = np.ones(3), np.ones(3) * 2
    setattr(part, attribute, first)
    signature = Signature([part])
    assert not signature.changed()
    if isinstance(first, list):
        first[1] = second[1]
    else:
        setattr(part, attribute, second)
    assert signature.changed()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_on_all_modules_is_called(kind: str) -> None:
    model, _, trainer, _ = with_criterion("auto", device="cuda")
    signature = Signature(model.modules())
    register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda *args: None)
    try:
        assert not_supported_reasons(trainer, "on") == ["a hook on the model would not be called"]
        assert signature.changed()
    finally:
        handle.remove()
    assert not signature.changed()


# The seam -------------------------------------------------------------------------------------------------------------
def test_who_keeps_or_copies_what_stands_in_gets_the_models_own() -> None:
    model, _, _, batch = with_criterion("auto")
    call = NextCall(model, "predict", lambda x: "a replay")
    twin = copy.deepcopy(model)
    assert twin.predict(batch["img"])["boxes"].shape[0] == 2
    assert "predict" in vars(model)
    kept = model.predict
    assert model.predict(batch["img"]) == "a replay"
    assert "predict" not in vars(model)
    assert kept(batch["img"])["boxes"].shape[0] == 2
    assert not call.withdraw()


def test_what_a_user_puts_in_its_place_stays() -> None:
    model, *_ = with_criterion("auto")
    call = NextCall(model, "loss", lambda batch: "a replay")
    model.loss = "the user's"
    assert call.withdraw()
    assert model.loss == "the user's"


def test_a_gradient_of_a_replays_gradient_is_an_error() -> None:
    step: Any = SimpleNamespace(
        outputs=[torch.tensor([4.0])], _upstream=[torch.zeros(1)], replay_forward=lambda inputs: 1
    )
    weight = torch.ones(1, requires_grad=True)
    (loss,) = _Replay.apply(step, True, (), weight)
    with pytest.raises(FlashGraphError, match=r"create_graph=True\): flash\.graphs=off has"):
        torch.autograd.grad(loss, weight, create_graph=True)


# Inference ------------------------------------------------------------------------------------------------------------
def counting(made: list[int]) -> Any:
    """Captures nothing: the network itself answers."""

    class Captured:
        held, room = 0, 0

        def __init__(self, network: nn.Module, images: Tensor, earlier: Any) -> None:
            made.append(1)
            self.network = network

        def __call__(self, images: Tensor) -> Any:
            return self.network(images)

    return Captured


def test_a_network_that_changes_all_the_time_is_captured_three_times() -> None:
    count: list[int] = []
    graphs = InferenceGraphs(capture=counting(count))
    network: Any = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with torch.no_grad():
        for _ in range(10):
            network[0].padding = (network[0].padding[0] + 1, 0)
            for _ in range(3):
                graphs(network, torch.rand(1, 3, 32, 32))
    assert len(count) == 3
    assert graphs.why_not == graphs.outcome == "the network changed 3 times since it was captured"


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (lambda m: m.load_state_dict({name: t * 0.5 for name, t in m.state_dict().items()}), 0),
        (lambda m: m.half(), 1),
        (lambda m: m.__setitem__(0, nn.Conv2d(3, 4, 1)), 1),
        (lambda m: setattr(m[0], "padding", (1, 1)), 1),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.rand(4, 3, 1, 1))), 1),
        (lambda m: setattr(m[1], "factor", 3.0), 1),
        (lambda m: m[1].text.add_(1.0), 1),
    ],
)
def test_a_changed_network_is_captured_anew_for_prediction(change: Any, anew: int) -> None:
    """The captured memory is read where it lies: weights loaded into it are seen without a new capture."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.factor = torch.ones(1), 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.text.to(x) * self.factor

    made: list[int] = []
    graphs = InferenceGraphs(capture=counting(made))
    network: Any = nn.Sequential(nn.Conv2d(3, 4, 1), Text()).eval().requires_grad_(False)
    images = torch.rand(1, 3, 32, 32)
    for _ in range(3):
        graphs(network, images)
    assert len(made) == 1
    change(network)
    images = images.to(network[0].weight.dtype)
    for _ in range(3):
        graphs(network, images)
    assert len(made) == 1 + anew


def test_shapes_in_turn_and_a_fused_model_are_told_apart() -> None:
    """Anchors, which the head writes for every shape, are no change."""
    made: list[int] = []
    graphs = InferenceGraphs(capture=counting(made))
    model: Any = YOLO("yolo12n.yaml").model.eval().requires_grad_(False)
    for _ in range(3):
        for side in (32, 64):
            graphs(model, torch.rand(1, 3, side, side))
    assert len(made) == 2
    model.fuse(verbose=False)
    graphs(model, torch.rand(1, 3, 32, 32))
    assert len(made) == 3


def test_plain_trainers_have_no_loop_of_their_own() -> None:
    model, *_ = with_criterion("auto")
    assert not hasattr(a_trainer(model), "_do_train")
    assert BaseTrainer._do_train is DetectionTrainer._do_train
