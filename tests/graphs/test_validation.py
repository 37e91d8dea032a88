"""Validation from graphs: the metrics of stock to every digit, refusals, and what others meet; graphs that are none."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO, YOLOE
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import BaseModel, DetectionModel

from tests.counting import settle
from tests.datasets import create_dataset
from tests.engine.test_telemetry import events, of
from tests.graphs.conftest import Forward
from yolo_flash import FlashConfig, patch_model
from yolo_flash.engine import run as run_module
from yolo_flash.engine import validator as validator_module
from yolo_flash.engine.run import FlashRun
from yolo_flash.engine.validator import FlashValidatorMixin, with_graphs
from yolo_flash.graphs import inference, validation
from yolo_flash.graphs.limits import why_validation_is_eager
from yolo_flash.graphs.validation import ValidationGraphs

Stats = list[dict[str, list[Any]]]
pytestmark = pytest.mark.usefixtures("tiny_model")  # writes tiny.yaml


@pytest.fixture(scope="session")
def ten_pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five batches of two, all of one shape."""
    return create_dataset(tmp_path_factory.mktemp("ten"), "detect", train=2, val=10)


@pytest.fixture
def args(tiny_args: dict[str, Any], ten_pictures: str) -> dict[str, Any]:
    """A training of two steps an epoch and five validation batches, all of one shape."""
    return {**tiny_args, "data": ten_pictures, "batch": 1, "epochs": 2, "imgsz": 64, "conf": 1e-6}


@pytest.fixture(autouse=True)
def _steps_run_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of validation alone are looked at, without the times of a machine."""
    monkeypatch.setattr(run_module, "GraphPolicy", lambda mode: run_module_policy("off"))
    monkeypatch.setattr(inference, "_milliseconds", lambda run, images: 1.0 if isinstance(run, Forward) else 1e6)


run_module_policy = run_module.GraphPolicy


class Watch:
    """What a validation put into the metrics, batch by batch, and its losses."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[Any, ...]] = []
        model.add_callback("on_val_batch_end", self.batch)

    def batch(self, validator: Any) -> None:
        stats = validator.metrics.stats
        numbers = [array for name in ("conf", "pred_cls", "tp") for array in stats[name]]
        self.seen.append(tuple(np.concatenate([np.ravel(n).astype(float) for n in numbers]).tolist()))
        if validator.training:
            self.seen.append(tuple(float(value) for value in validator.loss.values()))


def settled(config: str = "tiny.yaml") -> Any:
    """A model whose predictions differ from picture to picture."""
    model = YOLO(config)
    settle(model.model)
    return model


def train(args: dict[str, Any], prepare: Callable[[Any], object] = bool, **settings: Any) -> tuple[Any, Watch]:
    """Train from weights that say something; `prepare` gets the model before."""
    model = patch_model(YOLO("tiny.yaml"), backend="stock", **settings)
    watch = Watch(model)
    model.add_callback("on_train_start", lambda trainer: settle(trainer.model))
    prepare(model)
    model.train(**args)
    return model, watch


def in_training(model: Any) -> list[dict[str, Any]]:
    return [epoch["validation"] for epoch in of(events(model), "epoch")]


# In a training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_metrics_and_losses_of_a_training_are_those_without(
    mode: str, args: dict[str, Any], captured: list[Forward], log: list[str]
) -> None:
    """Weights of the EMA change in place between replays."""
    wanted, stock = train(args, graphs="off")
    assert captured == []
    model, watch = train(args, graphs=mode)
    assert len(watch.seen) == 2 * 2 * 5 + 5  # of two epochs with losses and the final evaluation
    assert any(len(set(numbers)) > 4 for numbers in watch.seen)
    assert watch.seen == stock.seen
    assert model.trainer.metrics == wanted.trainer.metrics
    ema, final = captured
    assert (ema.calls, final.calls) == (1 + 4 + 5, 1 + 4)  # one compares; all but the first batch are replayed
    eager = {"a shape that has come too seldom": 1}
    held = {"shapes": 1, "held_bytes": 2**20}
    assert in_training(model) == [
        {"batches": 5, "replayed": 4, "eager": eager, **held},
        {"batches": 5, "replayed": 5, "eager": {}, **held},
    ]
    (line,) = (line for line in log if "validation runs from CUDA graphs" in line)  # the final one has nothing new
    assert "2 x 3 x 96 x 96" in line
    assert "1 shapes hold 1 MiB" in line
    assert sum("5 of 5 validation batches from CUDA graphs" in line for line in log) == 1


def test_the_validator_is_the_users_to_look_at(args: dict[str, Any], captured: list[Forward]) -> None:
    model, _ = train(args, graphs="on")
    validator = model.trainer.validator
    assert isinstance(validator, DetectionValidator)
    assert type(validator).__name__ == "DetectionValidator"
    for settings in ({"graphs": "off"}, {"enabled": False}):
        model, _ = train({**args, "epochs": 1}, **settings)
        assert type(model.trainer.validator) is DetectionValidator


def test_the_network_that_others_meet_is_stock(args: dict[str, Any], captured: list[Forward]) -> None:
    """Callbacks in the middle of a validation copy, pickle and call it."""
    stock: set[bytes] = set()

    def meet(validator: Any) -> None:
        if validator.training:
            ema = model.trainer.ema.ema
            assert "forward" not in vars(ema)
            assert "forward" not in vars(copy.deepcopy(ema))
            stock.add(pickle.dumps(pickle.loads(pickle.dumps(ema)).model[0].conv.weight.shape))
            ema(torch.zeros(1, 3, 64, 64))

    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    for event in ("on_val_start", "on_val_batch_start", "on_val_batch_end", "on_val_end"):
        model.add_callback(event, meet)
    model.train(**args)
    assert len(stock) == 1
    assert [counts["replayed"] for counts in in_training(model)] == [4, 5]


def test_graphs_are_free_before_the_final_evaluation_and_after_a_run(
    args: dict[str, Any], captured: list[Forward]
) -> None:
    held: list[int] = []

    def note(model: Any) -> None:
        model.add_callback("on_val_start", lambda v: held.append(len(v._flash_graphs._graphs)))

    model, _ = train(args, note, graphs="on")
    assert held == [0, 1, 0]
    left = [weakref.ref(graph) for graph in captured]
    captured.clear()
    gc.collect()
    assert [ref() for ref in left] == [None, None]
    assert model.trainer.flash_run.validation._graphs._network is None


def test_another_ema_is_captured_anew(args: dict[str, Any], captured: list[Forward]) -> None:
    """As the trainer makes one when it recovers from NaN."""

    def replace(trainer: Any) -> None:
        if trainer.epoch == 1:
            trainer.ema.ema = copy.deepcopy(trainer.ema.ema)

    prepare = methodcaller("add_callback", "on_train_epoch_end", replace)
    _, stock = train(args, prepare, graphs="off")
    _, watch = train(args, prepare, graphs="on")
    assert watch.seen == stock.seen
    assert [graph.calls for graph in captured] == [1 + 4, 1 + 5, 1 + 4]
    assert captured[0].network is not captured[1].network


def test_a_hook_on_the_ema_is_called(args: dict[str, Any], captured: list[Forward], log: list[str]) -> None:
    calls: list[int] = []

    def hook(trainer: Any) -> None:
        if trainer.epoch == 1:
            handles.append(trainer.ema.ema.model[0].register_forward_hook(lambda *_: calls.append(1)))
        elif trainer.epoch == 2:
            handles[0].remove()

    handles: list[Any] = []
    prepare = methodcaller("add_callback", "on_train_epoch_end", hook)
    model, _ = train({**args, "epochs": 3, "save": False}, prepare, graphs="on")
    assert len(calls) == 5
    assert [counts["replayed"] for counts in in_training(model)] == [4, 0, 5]
    reason = "batches ran without CUDA graphs: a hook on the network would not be called"
    assert any(reason in line for line in log)


def test_normalisation_in_training_mode_is_not_counted_by_a_capture(
    args: dict[str, Any], captured: list[Forward]
) -> None:
    def count(validator: Any) -> None:
        if validator.training:
            model.trainer.ema.ema.train()

    model = patch_model(settled(), graphs="on", backend="stock")
    graphs, network = inference.InferenceGraphs(), model.model.train()
    network.model[0].bn.reset_running_stats()
    for _ in range(3):
        graphs(network, torch.rand(2, 3, 64, 64))
    assert network.model[0].bn.num_batches_tracked == 3
    assert "in training mode" in graphs.outcome
    assert captured == []


def test_shapes_of_a_rectangular_loader_take_turns(
    tmp_path: Path, args: dict[str, Any], captured: list[Forward]
) -> None:
    """Every shape comes once an epoch, and from the second one on from its graph."""
    from PIL import Image

    sides = {"train": [(64, 64)] * 2, "val": [(192, 96), (192, 192), (96, 192)] * 2}  # two of each make a batch
    for split, sizes in sides.items():
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"data/images/{split}/{number}.jpg")
            (tmp_path / f"data/labels/{split}/{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}/data\ntrain: images/train\nval: images/val\nnames: [a]\n")
    model, _ = train({**args, "data": str(tmp_path / "data.yaml"), "epochs": 4, "imgsz": 192}, graphs="on")
    counts = in_training(model)
    assert [c["replayed"] for c in counts] == [0, 3, 3, 3]
    assert counts[-1]["shapes"] == 3
    assert len(captured) == 3  # of the final evaluation none: a shape came once
    assert [graph.calls for graph in captured] == [1 + 3] * 3
    assert len({graph.shape for graph in captured}) == 3


def test_a_run_without_a_gpu_says_nothing_twice(args: dict[str, Any], log: list[str]) -> None:
    model, _ = train({**args, "epochs": 1})
    assert FlashConfig().graphs == "auto"
    (counts,) = in_training(model)
    assert counts == {"batches": 5, "replayed": 0, "eager": {"needs an NVIDIA GPU, the device is cpu": 5}}
    assert not [line for line in log if "validation" in line and "CUDA graphs" in line]


# By itself ------------------------------------------------------------------------------------------------------------
VAL: dict[str, Any] = {"imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False}


def validate(model: Any, data: str, validator: Any = None, **more: Any) -> tuple[dict[str, float], list[Any]]:
    watch = Watch(model)
    metrics = model.val(validator, data=data, **{**VAL, "conf": 0.3, **more})
    return metrics.results_dict, watch.seen


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ("yolo12n.yaml", "detect"),
        ("yolo26n.yaml", "detect"),  # end to end: its head cuts to max_det
        ("yolo11n-seg.yaml", "segment"),
        ("yolo26n-sem.yaml", "semantic"),
        ("yolo12n-cls.yaml", "classify"),
        ("yolo26n-depth.yaml", "depth"),
    ],
)
def test_a_validation_by_itself_has_the_metrics_of_stock(
    config: str, task: str, tmp_path: Path, captured: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validator_module, "_DEVICES", ("cpu",))  # those of a detector are compared here
    data = create_dataset(tmp_path / "data", task, val=8)
    model = settled(config)
    say = {**VAL, "data": data}
    wanted = model.val(**say).results_dict
    found = patch_model(model, graphs="on", backend="stock").val(**say).results_dict
    assert found == wanted
    (graph,) = captured
    assert graph.calls == 1 + 3
    left = weakref.ref(graph)
    captured.clear()
    del graph
    gc.collect()
    assert left() is None  # also while the model lives


def test_detections_of_a_validation_by_itself_are_those_of_stock(ten_pictures: str, captured: list[Forward]) -> None:
    model = settled()
    wanted = validate(model, ten_pictures)
    model.reset_callbacks()
    for _ in range(2):  # each captures the network that Ultralytics makes for it
        found = validate(patch_model(model, backend="stock"), ten_pictures)
        assert found == wanted
        model.reset_callbacks()
    assert len(set(wanted[1][-1])) > 4
    assert [graph.calls for graph in captured] == [1 + 4] * 2


# Metrics --------------------------------------------------------------------------------------------------------------
class OwnMatching(DetectionValidator):
    def match_predictions(self, *args: Any, **kwargs: Any) -> Any:
        return super().match_predictions(*args, **kwargs)


@pytest.mark.parametrize(
    ("more", "here"),
    [
        ({}, True),
        ({"plots": True}, True),  # with the confusion matrix
        ({"single_cls": True}, False),  # which changes the predictions themselves
        ({"save_txt": True}, False),
        ({"validator": OwnMatching}, False),
    ],
)
def test_predictions_are_compared_where_nobody_waits_for_the_device(
    more: dict[str, Any], here: bool, ten_pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validator_module, "_DEVICES", ("cpu",))  # as if it were one that has to be waited for
    looked: list[bool] = []
    compares = FlashValidatorMixin._compares_as_stock

    def look(validator: Any) -> bool:
        looked.append(compares(validator))
        return looked[-1]

    monkeypatch.setattr(FlashValidatorMixin, "_compares_as_stock", look)
    for drawing in ("ConfusionMatrix.plot", "plot_pr_curve", "plot_mc_curve"):
        monkeypatch.setattr(f"ultralytics.utils.metrics.{drawing}", lambda *args, **kwargs: None)
    for drawing in ("plot_predictions", "plot_val_samples"):
        monkeypatch.setattr(DetectionValidator, drawing, lambda *args: None)
    stock, ours = (settled() for _ in range(2))
    wanted = validate(stock, ten_pictures, **more)
    assert looked == []
    assert validate(patch_model(ours, backend="stock", graphs="on"), ten_pictures, **more) == wanted
    assert set(looked) == {here}
    assert any(len(set(numbers)) > 4 for numbers in wanted[1])


def test_a_validation_without_graphs_says_so_only_if_asked(ten_pictures: str, log: list[str]) -> None:
    for settings, told in (({}, 0), ({"graphs": "on"}, 1), ({"graphs": "on", "log": False}, 0)):
        log.clear()
        validate(patch_model(settled(), backend="stock", **settings), ten_pictures)
        reason = "5 of 5 validation batches ran without CUDA graphs: needs an NVIDIA GPU, the device is cpu"
        assert sum(reason in line for line in log) == told


def test_off_leaves_the_validator_alone(ten_pictures: str, captured: list[Forward]) -> None:
    kinds: list[type] = []
    for settings in ({"graphs": "off"}, {"enabled": False}, {}):
        model = patch_model(settled(), backend="stock", **settings)
        model.add_callback("on_val_start", lambda validator: kinds.append(type(validator)))
        model.val(data=ten_pictures, **VAL)
    assert [issubclass(kind, FlashValidatorMixin) for kind in kinds] == [False, False, True]
    assert len(captured) == 1


def test_prompts_reach_models_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """YOLOE's validation has arguments of its own."""
    given: list[Any] = []
    monkeypatch.setattr(YOLOE, "val", lambda self, *args, **kwargs: given.append((args, kwargs)))
    model = patch_model(YOLOE("yoloe-11s.yaml"))
    model.val(load_vp=True, data="a.yaml")
    assert given == [((None,), {"load_vp": True, "data": "a.yaml"})]


# What a user wrote ----------------------------------------------------------------------------------------------------
class OwnPreprocess(DetectionValidator):
    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess(batch)
        batch["img"] = batch["img"].flip(-1)
        return batch


class OwnLoop(DetectionValidator):
    def __call__(self, trainer: Any = None, model: Any = None) -> Any:
        return super().__call__(trainer, model)


class OwnInit(DetectionValidator):
    def init_metrics(self, model: Any) -> None:
        super().init_metrics(model)
        model.backend.model.model[0].conv.weight.data *= 1.5


@pytest.mark.parametrize(("validator", "replayed"), [(OwnPreprocess, 4), (OwnLoop, 0), (OwnInit, 4)])
def test_a_validator_of_a_users(
    validator: Any, replayed: int, ten_pictures: str, captured: list[Forward], log: list[str]
) -> None:
    model = settled()
    plain = validate(model, ten_pictures)
    model.reset_callbacks()
    wanted = validate(model, ten_pictures, validator)
    model.reset_callbacks()
    found = validate(patch_model(model, graphs="on", backend="stock"), ten_pictures, validator)
    assert found == wanted
    assert (found == plain) is (validator is OwnLoop)
    assert sum(graph.calls - 1 for graph in captured) == replayed
    reason = "5 of 5 validation batches ran without CUDA graphs: OwnLoop.__call__ is not Ultralytics' own"
    assert sum(reason in line for line in log) == (not replayed)


def test_preprocess_on_the_instance_leaves_validation_stock(ten_pictures: str, captured: list[Forward]) -> None:
    def mine(validator: Any) -> None:
        stock = validator.preprocess
        validator.preprocess = lambda batch: BaseValidator.preprocess(validator, prepared(stock(batch)))

    def prepared(batch: Any) -> Any:
        network = networks[-1]
        assert "forward" in vars(network)
        twin = copy.deepcopy(network)
        assert twin(batch["img"])[0].shape == network(batch["img"])[0].shape
        assert "forward" not in vars(network)  # a call of a user's own is the next one
        return {**batch, "img": batch["img"] * 0.5}

    networks: list[Any] = []
    model = settled()
    patch_model(model, graphs="on", backend="stock")
    stock_begin = ValidationGraphs.begin

    def begin(self: Any, validator: Any, network: Any) -> None:
        networks.append(network)
        stock_begin(self, validator, network)

    model.add_callback("on_val_start", mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationGraphs, "begin", begin)
        found = validate(model, ten_pictures)
    model.reset_callbacks()
    assert found != validate(model, ten_pictures)


def reasons(validator: Any, network: Any, mode: str = "auto") -> str:
    return why_validation_is_eager(validator, network, mode)


def a_validator(training: bool = True, **args: Any) -> Any:
    validator = DetectionValidator(args={"imgsz": 64, **args})
    validator.training, validator.device = training, torch.device("cuda")
    return with_graphs(validator, ValidationGraphs("auto"))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = YOLO("tiny.yaml").model
    assert reasons(a_validator(), model) == ""
    assert reasons(a_validator(compile=True), model) == "compile=True has graphs of its own"
    assert reasons(a_validator(training=False, augment=True), model) == "augment=True runs the network at several sizes"
    assert reasons(a_validator(augment=True), model) == ""  # Ultralytics ignores it in a training
    exported = SimpleNamespace(format="onnx", model=object())
    assert reasons(a_validator(), exported) == "a model of format onnx runs as it was exported"
    with monkeypatch.context() as patch:
        patch.setattr(BaseModel, "predict", lambda self, x: x)
        for mode in ("auto", "on"):
            assert reasons(a_validator(), model, mode) == "BaseModel.predict is not Ultralytics' own"
    with monkeypatch.context() as patch:
        patch.setitem(vars(model), "forward", lambda x: x)
        assert reasons(a_validator(), model, "on") == "DetectionModel.forward is not Ultralytics' own"
    with monkeypatch.context() as patch:
        patch.setattr(DetectionValidator, "__call__", lambda self, *args: {})
        assert reasons(a_validator(), model, "on") == "DetectionValidator.__call__ is not Ultralytics' own"


def test_a_layer_of_a_users_is_captured_by_on_alone() -> None:
    class Mine(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model: Any = YOLO("tiny.yaml").model
    model.model[0].__class__ = Mine
    assert reasons(a_validator(), model) == (
        "Mine is neither torch's nor Ultralytics': flash.graphs=on captures it as it is"
    )
    assert reasons(a_validator(), model, "on") == ""


def test_networks_of_ultralytics_and_of_ours_are_not_foreign(ten_pictures: str, captured: list[Forward]) -> None:
    """AutoBackend and its backend included."""
    for config in ("yolo12n.yaml", "yolo26n.yaml", "yolo11n-seg.yaml"):
        assert reasons(a_validator(), patch_model(YOLO(config)).model) == ""
    why: list[str] = []
    model = patch_model(settled())
    with pytest.MonkeyPatch.context() as patch:
        original = inference.InferenceGraphs.__call__

        def call(self: Any, network: nn.Module, images: Tensor) -> Any:
            why.append(type(network).__name__)
            return original(self, network, images)

        patch.setattr(inference.InferenceGraphs, "__call__", call)
        validate(model, ten_pictures)
    assert why == ["AutoBackend"] * 5


class Loop:
    """A validation in small: what is called around the forwards."""

    def __init__(self, network: nn.Module, mode: str = "on") -> None:
        self.network, self.graphs = network, ValidationGraphs(mode)
        self.graphs.begin(a_validator(), network)

    def batch(self, images: Tensor, given: Any = None, **kwargs: Any) -> Any:
        self.graphs.before_forward(images)
        with torch.no_grad():
            return self.network(images if given is None else given, **kwargs)


def test_another_call_of_the_network_is_its_own(captured: list[Forward], detector: DetectionModel) -> None:
    images = torch.rand(1, 3, 64, 64)
    ValidationGraphs("on").before_forward(images)  # as YOLOE's validator, which prepares batches before its validation
    loop = Loop(detector.eval())
    for _ in range(3):
        loop.batch(images, augment=False)
    assert captured[0].calls == 1 + 2
    loop.batch(images, given=images.clone())
    loop.batch(images, augment=True)
    loop.graphs.before_forward(images)
    assert detector(images)[0].requires_grad  # not under no_grad
    loop.graphs.before_forward(images)
    loop.graphs.before_forward({"no": "tensor"})
    assert "forward" not in vars(detector)
    loop.graphs.end()
    assert captured[0].calls == 1 + 2
    assert loop.graphs.facts["eager"] == {
        "a shape that has come too seldom": 1,
        "the network was called for something else": 3,
        "the network was not called with what preprocess gave": 1,
    }


def test_a_validation_that_fails_leaves_no_replay_behind(ten_pictures: str, captured: list[Forward]) -> None:
    class Failing(DetectionValidator):
        def postprocess(self, preds: Any) -> Any:
            raise KeyError("mine")

    networks: list[Any] = []

    class FailsBefore(DetectionValidator):
        def init_metrics(self, model: Any) -> None:
            networks.append(model)
            super().init_metrics(model)

        @property
        def training(self) -> bool:
            return False

        @training.setter
        def training(self, value: bool) -> None:
            pass

        def preprocess(self, batch: Any) -> Any:
            return {}

    model = patch_model(settled(), graphs="on", backend="stock")
    for validator, error in ((Failing, "mine"), (FailsBefore, "img")):
        with pytest.raises(KeyError, match=error):
            model.val(validator, data=ten_pictures, **VAL)
    assert "forward" not in vars(networks[0])


# Memory ---------------------------------------------------------------------------------------------------------------
def test_a_capture_that_runs_out_of_memory_ends_eager(
    args: dict[str, Any], captured: list[Forward], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    class NoMemory(Forward):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            raise torch.OutOfMemoryError("CUDA out of memory")

    _, stock = train(args, graphs="off")
    monkeypatch.setattr(inference, "CapturedForward", NoMemory)
    model, watch = train(args)
    assert watch.seen == stock.seen
    reason = "there is too little memory for them: OutOfMemoryError: CUDA out of memory"
    assert [counts["eager"] for counts in in_training(model)] == [
        {"a shape that has come too seldom": 1, reason: 4},
        {reason: 5},
    ]
    assert len(captured) == 2  # one try in the training, and one in the final evaluation
    assert sum(reason in line for line in log if "validation batches ran without" in line) == 1


def test_validation_that_runs_out_of_memory_beside_graphs_runs_again_without(
    args: dict[str, Any], captured: list[Forward], log: list[str]
) -> None:
    def prepare(model: Any) -> None:
        def fail(validator: Any) -> None:
            if len(validator._flash_graphs._graphs) and validator.training:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.add_callback("on_val_batch_end", fail)

    wanted, _ = train(args, graphs="off")
    model, _ = train(args, prepare, graphs="on")
    assert model.trainer.metrics == wanted.trainer.metrics
    why_not = "validation ran out of memory beside its CUDA graphs"
    assert [counts["eager"] for counts in in_training(model)] == [{why_not: 5}] * 2
    assert sum("they are freed, and it is run again" in line for line in log) == 1
    assert not [line for line in log if "validation runs from CUDA graphs" in line and "0 shapes" in line]


@pytest.mark.parametrize(
    ("error", "rank", "tries"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), -1, 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 0, 1),  # another rank waits for this one
        (RuntimeError("mine"), -1, 1),
    ],
)
def test_what_is_not_run_again(
    error: Exception,
    rank: int,
    tries: int,
    ten_pictures: str,
    captured: list[Forward],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validator_module, "RANK", rank)
    starts: list[int] = []
    model = patch_model(settled(), graphs="on", backend="stock")

    def fail(validator: Any) -> None:
        if validator.batch_i == 3:
            raise error

    model.add_callback("on_val_start", lambda validator: starts.append(1))
    model.add_callback("on_val_batch_end", fail)
    with pytest.raises(type(error)):
        model.val(data=ten_pictures, **VAL)
    assert len(starts) == tries


@pytest.mark.parametrize(("pool", "needed_again", "beside"), [(None, 5, 5), (4, 5, 4), (4, 11, 7)])
def test_graphs_of_a_training_leave_room_for_its_steps(
    pool: int | None, needed_again: int, beside: int, monkeypatch: pytest.MonkeyPatch, captured: list[Forward]
) -> None:
    """For what steps have reserved beside their graphs, and for as much as these hold."""
    monkeypatch.setattr(run_module, "needed_again", lambda device: needed_again)
    run = FlashRun(FlashConfig(graphs="on"))
    run.graphs.step = None if pool is None else SimpleNamespace(pool_bytes=pool)  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(device=torch.device("cpu"))
    run.keep_free(trainer)
    monkeypatch.setattr(run_module, "needed_again", lambda device: 0)  # a later epoch may have needed less
    run.keep_free(trainer)
    for training, expected in ((True, beside), (False, 0)):
        run.validation.begin(a_validator(training), YOLO("tiny.yaml").model)
        assert run.validation._graphs.beside == expected


def test_a_trainers_own_validator_is_taken(args: dict[str, Any], captured: list[Forward]) -> None:
    """One that is no validator of Ultralytics' is left alone."""

    class Mine(DetectionTrainer):
        def get_validator(self) -> Any:
            validator = super().get_validator()
            validator.__class__ = OwnPreprocess
            return validator

    model = patch_model(YOLO("tiny.yaml"), graphs="on")
    model.train(trainer=Mine, **args)
    assert isinstance(model.trainer.validator, OwnPreprocess)
    assert [counts["replayed"] for counts in in_training(model)] == [4, 5]
    thing = object()
    assert with_graphs(thing, ValidationGraphs("on")) is thing


def test_ranks_have_graphs_from_the_second_validation_on(
    args: dict[str, Any], captured: list[Forward], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """They cannot run one again that has run out of memory: the first shows what its batches need."""
    monkeypatch.setattr(validation, "RANK", 0)
    model, _ = train(args, graphs="on")
    first, second = in_training(model)
    assert list(first["eager"].values()) == [5]
    assert "the first validation of several ranks" in next(iter(first["eager"]))
    assert second["replayed"] == 4
    assert len(captured) == 1  # none in the final evaluation
    assert not [line for line in log if "validation batches ran without" in line]
