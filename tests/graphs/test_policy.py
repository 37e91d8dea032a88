"""When steps run from graphs: decisions, refusals and routing, with a graph that is none; `tests/gpu` has real ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, YAML
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from tests.counting import run_out_of_memory_once
from tests.engine.test_telemetry import events, of
from tests.graphs.test_limits import a_trainer, among_ranks
from tests.versions import loss_in_graphs
from yolo_flash import FlashConfig, FlashConfigError, patch_model
from yolo_flash.graphs import boxes as boxes_module
from yolo_flash.graphs import policy as policy_module
from yolo_flash.graphs.ddp import RankAverage
from yolo_flash.graphs.fixed_loss import Capacity, FixedShapeLoss
from yolo_flash.graphs.graphed_step import FlashGraphError, GraphedStep
from yolo_flash.graphs.limits import not_supported_reasons
from yolo_flash.graphs.policy import GraphPolicy

pytestmark = pytest.mark.usefixtures("tiny_model")  # writes tiny.yaml


class Replay:
    """In the place of `GraphedStep`: runs the network and its loss eager, and counts."""

    made: list[Replay] = []
    pool_bytes = 2**30
    through_autograd = False
    seconds = 0.5

    def __init__(self, model: Any, images: Tensor, loss: Any = None, extra: Any = (), beside: Any = ()) -> None:
        self.network = self.model = model
        self.shape, self.loss, self.beside = images.shape, loss, len(beside)
        self.extra = [tensor.shape for tensor in (*beside, *extra)]
        self.calls: list[int] = []
        self.changed = False
        Replay.made.append(self)

    def __call__(self, images: Tensor, *extra: Tensor) -> Any:
        assert not {"predict", "loss"} & vars(self.model).keys()
        assert [tensor.shape for tensor in extra] == self.extra
        self.calls.append(len(images))
        beside, extra = extra[: self.beside], extra[self.beside :]
        outputs = self.model(images, *beside) if beside else self.model._predict_once(images)
        return outputs if self.loss is None else self.loss(outputs, *extra)

    def fits(self, images: Tensor, *extra: Tensor) -> bool:
        return images.shape == self.shape and all(a.shape == b for a, b in zip(extra, self.extra, strict=False))

    def stale(self) -> bool:
        return self.changed


def without_a_card(
    monkeypatch: pytest.MonkeyPatch, kind: type[Replay], reasons: Callable[[Any, str], list[str]]
) -> list[Replay]:
    """Every run is one that could have graphs, but for `reasons`; those it had, of a `kind`."""
    monkeypatch.setattr(GraphPolicy.__init__, "__defaults__", (kind,))
    monkeypatch.setattr(policy_module, "not_supported_reasons", reasons)
    for module in (policy_module, boxes_module):
        monkeypatch.setattr(module, "free_bytes", lambda device: 2**32)
    monkeypatch.setattr(Replay, "made", [])
    return Replay.made


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Every run is one that could have graphs; those it had."""
    return without_a_card(monkeypatch, Replay, lambda trainer, mode: [])


def clock_of(monkeypatch: pytest.MonkeyPatch, eager: float, replayed: float) -> None:
    """Steps take so many seconds: the clock is read before and after each timed one, three of either kind."""
    times: list[float] = []
    for i, seconds in enumerate([eager] * 3 + [replayed] * 3):
        times += [10.0 * i, 10.0 * i + seconds]
    left = iter(times * 4)
    monkeypatch.setattr(policy_module, "_now", lambda: next(left))


def train(args: dict[str, Any], **settings: Any) -> Any:
    model = patch_model(YOLO("tiny.yaml"), **settings)
    model.train(**args)
    return model


def test_full_batches_are_replayed_from_the_second_step_on(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    model = train({**tiny_args, "batch": 3, "imgsz": 64, "epochs": 3}, graphs="on")  # batches of 3 and 1
    (replay,) = replays
    assert replay.calls == [3, 3]  # of three epochs: the first one is eager, and so are the batches of 1
    (told,) = of(events(model), "graphs")
    assert (told["why_not"], told["pool_bytes"]) == ("", 2**30)


def losses_of(event: str, **settings: Any) -> tuple[Any, list[float]]:
    """A patched model, and the loss at every such event of its run to come."""
    losses: list[float] = []
    model = patch_model(YOLO("tiny.yaml"), **settings)
    model.add_callback(event, lambda trainer: losses.append(trainer.loss.item()))
    return model, losses


def test_losses_are_those_of_eager_steps(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        model, losses[mode] = losses_of("on_train_epoch_end", graphs=mode)
        model.train(**{**tiny_args, "epochs": 2, "deterministic": True})
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-6)  # the loss in fixed shapes may sum in another order
    assert len(replays) == 1


# The loss -------------------------------------------------------------------------------------------------------------
@loss_in_graphs
@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_loss_of_detection_is_in_the_graphs(
    end_to_end: bool, tiny_args: dict[str, Any], replays: list[Replay], log: list[str]
) -> None:
    if end_to_end:  # as YOLO26
        YAML.save("tiny.yaml", {**YAML.load("tiny.yaml"), "end2end": True, "reg_max": 1})
    model = train({**tiny_args, "epochs": 2}, graphs="on")
    assert (type(model.trainer.model.criterion) is E2ELoss) is end_to_end
    (replay,) = replays
    assert isinstance(replay.loss, FixedShapeLoss)
    assert len(replay.calls) == 3
    (told,) = of(events(model), "graphs")
    assert told["boxes"] == replay.loss.capacity.boxes > 0
    assert not [line for line in log if "stays outside" in line]


def test_another_loss_stays_outside(tiny_args: dict[str, Any], replays: list[Replay], log: list[str]) -> None:
    class Loss(v8DetectionLoss):
        pass

    def mine(trainer: Any) -> None:
        trainer.model.criterion = Loss(trainer.model)

    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    model.add_callback("on_train_start", mine)
    model.train(**{**tiny_args, "epochs": 2})
    (replay,) = replays
    assert replay.loss is None
    assert len(replay.calls) == 3
    assert sum("the loss stays outside of them: Loss is not the loss of detection" in line for line in log) == 1


class ChangesBoxes(DetectionTrainer):
    """A user's trainer."""

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        batch["bboxes"] = batch["bboxes"] * 0.5
        return batch


def test_boxes_that_a_trainer_changes_are_those_of_the_loss(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        model, losses[mode] = losses_of("on_train_batch_end", graphs=mode)
        model.train(trainer=ChangesBoxes, **{**tiny_args, "epochs": 2})
    assert losses["on"] == losses["off"]
    assert [replay.loss for replay in replays] == [None]


@loss_in_graphs
def test_more_boxes_than_there_is_room_for_are_captured_anew_and_then_run_eager(
    tiny_args: dict[str, Any], replays: list[Replay], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """Losses are those of eager steps throughout."""
    monkeypatch.setattr(Capacity, "grown", lambda mine, other: Capacity(*map(max, mine, other)))
    counts = [2, 5, 9, 4, 20, 21, 22, 3, 30, 8]  # boxes of the first image in each step
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        left = iter(counts)

        def crowd(trainer: Any, batch: dict[str, Any], left: Iterator[int] = left) -> dict[str, Any]:
            count = next(left)
            batch["batch_idx"], batch["cls"] = torch.zeros(count), torch.zeros(count, 1)
            batch["bboxes"] = torch.linspace(0.2, 0.5, count).view(-1, 1).expand(count, 4).contiguous()
            return batch

        model, losses[mode] = losses_of("on_train_batch_end", graphs=mode)
        original = DetectionTrainer.preprocess_batch
        with monkeypatch.context() as patch:
            before = GraphPolicy.before_transfer
            patch.setattr(
                GraphPolicy, "before_transfer", lambda s, t, b, crowd=crowd, before=before: before(s, t, crowd(t, b))
            )
            model.train(**{**tiny_args, "epochs": 5, "mosaic": 0.0, "plots": False})
        assert DetectionTrainer.preprocess_batch is original
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-6)
    # Captured for 5, 9, 20 and 21 boxes; 22 and 30 run eager.
    assert [replay.calls for replay in replays] == [[2], [2, 2], [2], [2, 2, 2]]
    assert [told.get("again") for told in of(events(model), "graphs")] == [
        None,
        *(f"a batch had up to {count} boxes an image, {count} in all" for count in (9, 20, 21)),
    ]
    assert sum("captured again" in line for line in log) == 3


@loss_in_graphs
def test_a_batch_of_another_call_is_its_own(replays: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion()
    for _ in range(2):
        graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    assert "loss" in vars(model)
    other = {**batch, "img": torch.rand(2, 3, 32, 32)}
    model(other)
    graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    model(dict(batch))  # as DDP hands it on
    model(batch)
    assert replays[0].calls == [2]


def with_criterion(mode: str = "on", device: str = "cpu") -> tuple[Any, GraphPolicy, Any, dict[str, Any]]:
    model: Any = DetectionModel("yolo12n.yaml", verbose=False).train()
    model.args = DEFAULT_CFG
    model.criterion = model.init_criterion()
    graphs, trainer = GraphPolicy(mode), a_trainer(model, device)
    graphs.prepare(trainer)
    batch = {
        "img": torch.rand(2, 3, 32, 32),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.zeros(2, 1),
        "bboxes": torch.full((2, 4), 0.5),
    }
    return model, graphs, trainer, batch


def test_a_changed_loss_is_captured_anew(replays: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion()
    for _ in range(3):
        graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    model.criterion.assigner.topk = 5
    graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    assert len(replays) == 2


def test_a_changed_model_and_more_boxes_at_once(replays: list[Replay]) -> None:
    model, graphs, trainer, batch = with_criterion()
    for _ in range(2):
        graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    replays[0].changed = True
    crowd = {**batch, "batch_idx": torch.zeros(50), "cls": torch.zeros(50, 1), "bboxes": torch.full((50, 4), 0.5)}
    graphs.before_forward(trainer, crowd, graphs.before_transfer(trainer, crowd))
    model(crowd)
    assert [replay.calls for replay in replays] == [[], [2]]
    assert replays[1].loss.capacity.boxes >= 50


def test_hooks_that_came_after_the_pipeline_was_built_are_called(
    monkeypatch: pytest.MonkeyPatch, replays: list[Replay]
) -> None:
    monkeypatch.setattr(policy_module, "not_supported_reasons", not_supported_reasons)
    model, graphs, trainer, batch = with_criterion("auto", device="cuda")
    model.model[0].register_forward_hook(lambda *args: None)
    for _ in range(5):
        facts = graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
    assert facts["why_not"] == "a hook on model.0 would not be called"
    assert replays == []


def test_a_rank_that_has_still_to_vote_captures_nothing_anew(
    replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks have to count the same steps until then, whatever batches they have; see how one of them votes."""
    votes: list[int] = []

    def gather(into: list[Any], mine: bool) -> None:
        votes.append(steps[-1])
        into[:] = [mine, mine]

    monkeypatch.setattr(policy_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(policy_module.dist, "all_gather_object", gather)
    clock_of(monkeypatch, 2.0, 1.0)
    model, graphs, trainer, batch = with_criterion("auto")
    among_ranks(trainer)
    crowd = {**batch, "batch_idx": torch.zeros(50), "cls": torch.zeros(50, 1), "bboxes": torch.full((50, 4), 0.5)}
    steps: list[int] = []
    for number in range(1, 10):
        steps.append(number)
        now = crowd if number in (6, 9) else batch
        graphs.before_forward(trainer, now, graphs.before_transfer(trainer, now))
        model(now)
        graphs.after_step(trainer)
    assert votes == [5, 8]  # of the capture, and of the times of the three steps behind it
    assert [replay.calls for replay in replays] == [[2, 2, 2], [2]]  # steps 5, 7 and 8; captured anew in step 9


def test_nothing_of_it_reaches_the_model_a_copy_or_a_checkpoint(
    tiny_args: dict[str, Any], replays: list[Replay]
) -> None:
    seen: list[set[str]] = []

    def look(trainer: Any) -> None:
        seen.append({"predict", "loss"} & vars(trainer.model).keys())
        copy.deepcopy(trainer.model)
        pickle.dumps(trainer.model)

    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    for event in ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_model_save"):
        model.add_callback(event, look)
    model.train(**{**tiny_args, "epochs": 2})
    assert replays
    assert len(seen) == 2 * (2 + 2 + 1 + 1)
    assert not set.union(*seen)


def before_a_replay() -> tuple[DetectionModel, GraphPolicy, Any, dict[str, Any]]:
    """A model whose next forward is to be a replay, its policy and trainer, and the batch."""
    model = DetectionModel("tiny.yaml", verbose=False).train()
    graphs, trainer = GraphPolicy("on"), a_trainer(model)
    graphs.prepare(trainer)
    batch = {"img": torch.rand(2, 3, 32, 32)}
    for _ in range(2):
        graphs.before_forward(trainer, batch)
    return model, graphs, trainer, batch


def test_a_forward_that_never_came_leaves_nothing(replays: list[Replay]) -> None:
    model, graphs, trainer, _ = before_a_replay()
    assert "predict" in vars(model)
    graphs.after_step(trainer)
    assert "predict" not in vars(model)


def test_another_call_of_the_network_is_its_own(replays: list[Replay]) -> None:
    model, graphs, trainer, batch = before_a_replay()
    images = batch["img"]
    model(torch.rand(1, 3, 64, 64))  # a callback that looks at something
    assert replays[0].calls == []
    graphs.before_forward(trainer, batch)
    with torch.no_grad():
        model(images)
    graphs.before_forward(trainer, batch)
    model(images)
    model(images)
    assert replays[0].calls == [2]


@pytest.mark.parametrize(("eager", "replayed", "pays"), [(2.0, 1.0, True), (1.04, 1.0, False), (1.0, 3.0, False)])
def test_auto_keeps_graphs_that_pay(
    eager: float,
    replayed: float,
    pays: bool,
    tiny_args: dict[str, Any],
    replays: list[Replay],
    monkeypatch: pytest.MonkeyPatch,
    log: list[str],
) -> None:
    clock_of(monkeypatch, eager, replayed)
    model = train(
        {**tiny_args, "epochs": 5}, graphs="auto"
    )  # ten steps: 1, then 3 eager, a capture, 3 from graphs, 2 more
    (replay,) = replays
    assert len(replay.calls) == (6 if pays else 4)
    (told,) = of(events(model), "graphs")
    assert (told["eager_ms"], told["graph_ms"]) == pytest.approx((eager * 1e3, replayed * 1e3))
    assert bool(told["why_not"]) is not pays
    line = (
        f"steps run from CUDA graphs: {eager * 1e3:.1f} -> {replayed * 1e3:.1f} ms"
        if pays
        else "no CUDA graphs: a step"
    )
    assert sum(line in message for message in log) == 1


def test_auto_refuses_where_the_batches_beside_the_graphs_would_not_fit(
    tiny_args: dict[str, Any], replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "free_bytes", lambda device: 2**29 + 2**30)  # with that of the graphs
    clock_of(monkeypatch, 2.0, 1.0)
    model = train({**tiny_args, "epochs": 4}, graphs="auto")
    assert [replay.calls for replay in replays] == [[]]
    (told,) = of(events(model), "graphs")
    assert "hold 1.0 GiB" in told["why_not"]
    assert "512 MiB are free" in told["why_not"]


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_capture_that_fails(
    error: Exception, tiny_args: dict[str, Any], replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With auto training goes on, at its batch; with on it ends with an error that no trainer takes for another."""

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(GraphPolicy.__init__, "__defaults__", (fail,))
    monkeypatch.setattr(policy_module, "_TIMED", 0)
    model = train({**tiny_args, "epochs": 2}, graphs="auto")
    assert model.trainer.batch_size == 2
    assert [str(error) in told["why_not"] for told in of(events(model), "graphs")] == [True]
    with pytest.raises(FlashGraphError, match=str(error)):
        train({**tiny_args, "epochs": 2}, graphs="on")


def test_a_model_that_changes_is_captured_again_and_then_left_alone(
    tiny_args: dict[str, Any], replays: list[Replay], log: list[str]
) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")

    def change(trainer: Any) -> None:
        for replay in replays[-1:]:
            replay.changed = True

    model.add_callback("on_train_batch_end", change)
    with pytest.raises(FlashGraphError, match="after each of 3 captures"):
        model.train(**{**tiny_args, "epochs": 9})
    assert [replay.calls for replay in replays] == [[2]] * 3
    assert sum("capturing again" in line for line in log) == 3


def test_out_of_memory_halving_frees_and_captures_the_new_batch(
    tiny_args: dict[str, Any], replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    run_out_of_memory_once(model)
    model.train(**{**tiny_args, "batch": 4, "epochs": 3})
    assert [set(replay.calls) for replay in replays] == [{2}]


def test_validation_that_runs_out_of_memory_is_run_again_without_the_graphs(
    tiny_args: dict[str, Any], replays: list[Replay], log: list[str]
) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    failed: list[int] = []

    def fail(validator: Any) -> None:
        if validator.training and model.trainer.flash_run.graphs.step is not None:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.add_callback("on_val_start", fail)
    model.train(**{**tiny_args, "epochs": 3})
    assert failed == [1]
    assert len(replays) == 1
    assert sum("validation ran out of memory" in line for line in log) == 2  # a warning, and the fact
    assert of(events(model), "graphs")[-1]["why_not"]


def test_validation_is_not_repeated_on_one_rank_alone(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")

    def fail(validator: Any) -> None:
        model.trainer.world_size = 2
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.add_callback("on_val_start", fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.train(**tiny_args)


def test_another_error_of_validation_is_the_users(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")

    def fail(validator: Any) -> None:
        raise RuntimeError("mine")

    model.add_callback("on_val_start", fail)
    with pytest.raises(RuntimeError, match="mine"):
        model.train(**tiny_args)


def test_graphs_are_free_before_the_final_evaluation_and_after_a_run(
    tiny_args: dict[str, Any], replays: list[Replay]
) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    held: list[bool] = []
    model.add_callback("on_val_start", lambda v: held.append(model.trainer.flash_run.graphs.step is not None))
    model.train(**{**tiny_args, "epochs": 2})
    assert held == [True, True, False]
    left = weakref.ref(replays[0])
    replays.clear()
    gc.collect()
    assert left() is None


# A run ----------------------------------------------------------------------------------------------------------------
def test_a_resumed_run_captures_its_own(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    class KilledError(Exception):
        pass

    def kill(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise KilledError

    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    model.add_callback("on_train_epoch_end", kill)
    with pytest.raises(KilledError):
        model.train(**{**tiny_args, "epochs": 4})
    again = patch_model(YOLO(str(model.trainer.last)), graphs="on")
    again.train(resume=True, **{name: tiny_args[name] for name in ("device", "workers")})
    assert again.trainer.epoch == 3
    assert [replay.calls for replay in replays] == [[2] * 3, [2] * 5]  # two epochs, and the three that were left
    assert of(events(again), "graphs")[-1]["why_not"] == ""


def test_recovery_from_nan_keeps_the_graphs(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    """The trainer loads weights into the tensors that were captured, and an EMA of which the copy has no graph."""
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    spoiled: list[int] = []

    def spoil(trainer: Any) -> None:
        if trainer.epoch == 1 and not spoiled:
            spoiled.append(trainer.model.model[0].conv.weight.data_ptr())
            trainer.loss = torch.tensor(float("nan"))

    model.add_callback("on_train_epoch_end", spoil)
    model.train(**{**tiny_args, "epochs": 3})
    (replay,) = replays
    assert len(replay.calls) == 7  # four epochs of two steps, one of them twice, but for the first step
    assert spoiled == [model.trainer.model.model[0].conv.weight.data_ptr()]


@pytest.mark.parametrize("how", ["time", "stop"])
def test_a_run_that_ends_early_frees_its_graphs(how: str, tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    epochs: list[int] = []

    def stop(trainer: Any) -> None:
        epochs.append(trainer.epoch)
        if how == "time" and len(epochs) == 2:
            trainer.args.time = 1e-9
        if how == "stop" and trainer.epoch == 1:
            trainer.stop = True  # as early stopping does

    model.add_callback("on_train_epoch_end", stop)
    more = {"time": 1.0} if how == "time" else {}  # hours, until the callback
    model.train(**{**tiny_args, "epochs": 50, **more})
    assert 2 <= len(epochs) < 50
    assert model.trainer.flash_run.graphs.step is None
    assert len(replays) == 1


def test_two_runs_in_one_process_have_graphs_of_their_own(tiny_args: dict[str, Any], replays: list[Replay]) -> None:
    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    for _ in range(2):
        model.train(**{**tiny_args, "epochs": 2})
    first, second = replays
    assert first.calls == second.calls == [2] * 3
    assert first.model is not second.model


@pytest.mark.parametrize(("batch", "given"), [(-1, 0.3), (0.8, 0.4), (4, None)])
def test_auto_batch_leaves_the_graphs_their_memory(
    batch: float, given: float | None, tiny_args: dict[str, Any], replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[float]] = {"on": [], "off": []}
    for mode, found in asked.items():
        estimate = lambda found=found, **keys: found.append(keys["batch"]) or 2  # noqa: E731
        monkeypatch.setattr("ultralytics.engine.trainer.check_train_batch_size", estimate)
        train({**tiny_args, "batch": batch}, graphs=mode)
    assert asked == {"on": [] if given is None else [given], "off": [] if given is None else [batch]}


@pytest.mark.parametrize(("ranks", "room", "fits"), [(1, 1.5, True), (2, 1.5, False), (2, 2.5, True)])
def test_ranks_want_room_for_their_validation_too(
    ranks: int, room: float, fits: bool, detector: Any, replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "free_bytes", lambda device: int((room + 1.0) * 2**30))
    monkeypatch.setattr(policy_module, "everywhere", lambda trainer, mine: mine)
    graphs, trainer = GraphPolicy("auto"), a_trainer(copy.deepcopy(detector))
    if ranks > 1:
        among_ranks(trainer)
    graphs.prepare(trainer)
    for _ in range(5):
        graphs.before_forward(trainer, {"img": torch.rand(2, 3, 32, 32)})
        graphs.after_step(trainer)
    assert (graphs.step is not None) is fits
    if ranks > 1:
        assert trainer.model.require_backward_grad_sync is not fits  # DDP averages where there are no graphs
        graphs.release(trainer)
        assert trainer.model.require_backward_grad_sync
    assert fits or "the batches beside them need up to 2.0 GiB" in graphs.why_not


def test_ranks_that_graphs_do_not_pay_for_give_their_gradients_back_behind_a_step(
    detector: Any, replays: list[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two DDP would average what it has not seen all of."""
    monkeypatch.setattr(policy_module, "everywhere", lambda trainer, mine: mine)
    monkeypatch.setattr(policy_module.dist, "get_rank", lambda: 0)
    averaged: list[int] = []
    monkeypatch.setattr(RankAverage, "average", lambda self: averaged.append(1))
    clock_of(monkeypatch, 1.0, 1.0)
    graphs, trainer = GraphPolicy("auto"), among_ranks(a_trainer(copy.deepcopy(detector)))
    graphs.prepare(trainer)
    for _ in range(8):
        assert trainer.model.require_backward_grad_sync is (graphs.step is None)
        graphs.before_forward(trainer, {"img": torch.rand(2, 3, 32, 32)})
        graphs.after_step(trainer)
    assert "a step takes" in graphs.why_not
    assert graphs.step is None
    assert not trainer.model.require_backward_grad_sync
    for _ in range(2):
        graphs.before_optimizer()
        assert trainer.model.require_backward_grad_sync
    assert averaged == [1]


def test_on_is_refused_before_the_first_step_and_auto_says_why_once(tiny_args: dict[str, Any], log: list[str]) -> None:
    with pytest.raises(FlashGraphError, match=r"flash\.graphs=on cannot run: needs an NVIDIA GPU, the device is cpu"):
        train(tiny_args, graphs="on")
    model = train(tiny_args, graphs="auto")
    assert [line for line in log if "CUDA graphs" in line] == [
        "yolo-flash: no CUDA graphs: needs an NVIDIA GPU, the device is cpu"
    ]
    assert len(of(events(model), "graphs")) == 1


def test_off_says_nothing(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = train(tiny_args, graphs="off")
    assert not [line for line in log if "graphs" in line]
    assert not of(events(model), "graphs")


def test_the_default_says_in_one_line_why_a_cpu_has_none(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = train(tiny_args)
    assert [line for line in log if "graphs" in line] == [
        "yolo-flash: no CUDA graphs: needs an NVIDIA GPU, the device is cpu"
    ]
    assert [told["why_not"] for told in of(events(model), "graphs")] == ["needs an NVIDIA GPU, the device is cpu"]


@pytest.mark.parametrize(("value", "mode"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_yaml_reads_on_and_off_as_booleans(value: Any, mode: str) -> None:
    assert FlashConfig(graphs=value).graphs == mode


def test_other_values_are_refused() -> None:
    with pytest.raises(FlashConfigError, match="Valid: off, on, auto"):
        FlashConfig(graphs="always")  # type: ignore[arg-type]


def test_the_real_one_has_the_same_interface() -> None:
    for name in ("__call__", "fits", "stale"):
        assert callable(getattr(GraphedStep, name))
        assert callable(getattr(Replay, name))
