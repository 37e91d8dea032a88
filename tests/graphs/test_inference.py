"""Inference from graphs: which forwards may be replayed, with a graph that is none; `tests/gpu` has real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO, YOLOE
from ultralytics.models.yolo.detect import DetectionPredictor

from tests.graphs.conftest import Forward
from yolo_flash import FlashConfig, patch_model, unpatch_model
from yolo_flash.engine.predictor import FlashPredictorMixin, predictor_class
from yolo_flash.graphs import inference
from yolo_flash.graphs.inference import InferenceGraphs, model_of


def forwards(graphs: InferenceGraphs, network: nn.Module, *sides: int) -> None:
    for side in sides:
        images = torch.rand(1, 3, side, side)
        torch.testing.assert_close(graphs(network, images), network(images))


def test_a_shape_is_captured_when_it_comes_again(captured: list[Forward]) -> None:
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 16, 8, 8, 24)
    assert [(replay.shape[2], replay.calls) for replay in captured] == [(8, 1 + 2)]  # one call compares
    forwards(graphs, network, 16, 8)
    assert [(replay.shape[2], replay.calls) for replay in captured] == [(8, 1 + 3), (16, 1 + 1)]


def test_shapes_that_take_turns_are_captured_once(captured: list[Forward]) -> None:
    """As those of a rectangular loader, epoch by epoch."""
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    sides = [8 * i for i in range(1, 16)]
    for _ in range(4):
        forwards(graphs, network, *sides)
    assert [(replay.shape[2], replay.calls) for replay in captured] == [(side, 1 + 3) for side in sides]
    assert [replay.earlier for replay in captured] == [None, *[captured[0]] * 14]  # whose memory they share
    assert (len(graphs), graphs.held) == (15, 15 * 2**20)


def test_captures_are_bounded(captured: list[Forward]) -> None:
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    for _ in range(3):
        forwards(graphs, network, *range(1, 41))
    assert [replay.shape[2] for replay in captured] == list(range(1, 33))
    assert graphs.why_not == graphs.outcome == "32 shapes are captured"
    forwards(graphs, network, 5)
    assert graphs.outcome == ""


def test_other_dtypes_and_batches_have_graphs_of_their_own(captured: list[Forward]) -> None:
    graphs, network = InferenceGraphs(), nn.Identity()
    for _ in range(2):
        for images in (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8).half(), torch.rand(2, 3, 8, 8)):
            assert torch.equal(graphs(network, images), images)
    assert len(captured) == 3


@pytest.mark.parametrize("off", [0.01, 2e-7, float("nan")])
def test_a_replay_that_is_off_is_not_used(off: float, captured: list[Forward], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forward, "off", off)
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 8, 16, 16)
    assert len(captured) == 1
    assert "ValueError: a replay is off by" in graphs.why_not
    assert len(graphs) == graphs.held == 0


def test_nan_in_half_precision_is_no_difference(captured: list[Forward]) -> None:
    graphs, network = InferenceGraphs(), nn.Hardtanh()
    images = torch.tensor([[[[1.0, float("nan"), float("inf")]]]]).half()
    for _ in range(2):
        assert graphs(network, images).isnan().tolist() == [[[[False, True, False]]]]
    assert graphs.outcome == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("operation not permitted"), "RuntimeError: operation not permitted"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "there is too little memory for them: OutOfMemoryError: CUDA out of memory",
        ),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(error: Exception, reason: str, captured: list[Forward]) -> None:
    """The graphs that there are go too: others need their memory."""

    def fail_with_32(network: nn.Module, images: Tensor, earlier: Forward | None) -> Any:
        if images.shape[2] == 32:
            raise error
        return Forward(network, images, earlier)

    graphs, network = InferenceGraphs(capture=fail_with_32), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 16, 16)
    assert (len(graphs), graphs.why_not) == (2, "")
    forwards(graphs, network, 32, 32, 8, 64, 64)
    assert (len(graphs), graphs.held, graphs.why_not, graphs.outcome) == (0, 0, reason, reason)
    assert len(captured) == 2
    graphs.release()
    forwards(graphs, network, 8, 8)
    assert len(graphs) == 1


@pytest.mark.parametrize(("room", "beside", "needed"), [(3, 0, "4 MiB"), (9, 10, "10 MiB")])
def test_a_graph_stays_if_as_much_memory_is_free(
    room: int, beside: int, needed: str, captured: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all graphs hold, and as the training needs again."""
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 16, 16, 24, 24)
    graphs.beside = beside * 2**20
    monkeypatch.setattr(Forward, "room", room * 2**20)
    forwards(graphs, network, 32, 32, 40, 40)
    assert graphs.why_not == (
        f"graphs of 4 shapes hold 4 MiB, and the batches beside them need up to {needed}, {room} MiB are free: a "
        f"smaller batch would do"
    )
    assert (len(graphs), len(captured)) == (3, 4)
    assert graphs.held == 4 * 2**20  # the others share the memory that the fourth has grown by
    forwards(graphs, network, 24)
    assert graphs.outcome == ""


def test_a_first_graph_without_room_leaves_nothing(captured: list[Forward], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forward, "room", 0)
    graphs, network = InferenceGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 8)
    assert (len(graphs), graphs.held, len(captured)) == (0, 0, 1)
    assert "graphs of 1 shapes hold 1 MiB" in graphs.why_not


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[float, float]]:
    """Milliseconds of a forward by its side, from a graph and without."""
    times: dict[int, tuple[float, float]] = {}

    def milliseconds(run: Any, images: Tensor) -> float:
        return times[images.shape[2]][0 if isinstance(run, Forward) else 1]

    monkeypatch.setattr(inference, "_milliseconds", milliseconds)
    return times


def test_a_graph_that_gains_too_little_is_not_kept(
    captured: list[Forward], clock: dict[int, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one captured for as many pixels or more; a smaller batch waits longer for the host."""
    graphs, network = InferenceGraphs(pays=True), nn.Conv2d(3, 4, 1)
    clock |= {32: (10.0, 10.4), 16: (2.0, 3.0)}
    forwards(graphs, network, 32, 32)
    assert graphs.outcome == "a forward of 1 x 3 x 32 x 32 takes 10.0 ms from a graph and 10.4 without"
    forwards(graphs, network, 32, 64, 64)
    assert graphs.outcome == "a batch of a size at which graphs gain nothing"
    assert (len(captured), len(graphs), graphs.held, graphs.first) == (1, 0, 0, "")
    forwards(graphs, network, 16, 16)
    assert (len(graphs), graphs.outcome) == (1, "")
    assert graphs.first == "1 x 3 x 16 x 16 in 2.0 ms instead of 3.0 (1.50x)"


def test_further_shapes_have_to_pay_for_their_capture(
    captured: list[Forward], clock: dict[int, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture of 250 ms that saves 100 ms a forward pays for itself in three."""
    ticks = iter(range(100))
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: 0.25 * next(ticks)))
    graphs, network = InferenceGraphs(pays=True), nn.Conv2d(3, 4, 1)
    clock |= {8: (20.0, 120.0), 16: (20.0, 20.5)}
    forwards(graphs, network, 8, 8, 16, 16)
    assert (len(captured), graphs.outcome) == (1, "a shape that has come too seldom")
    forwards(graphs, network, 16)
    assert (len(captured), len(graphs)) == (2, 1)  # captured the third time, and found to gain nothing


def test_what_predict_sets_in_the_head_belongs_to_the_graph(captured: list[Forward]) -> None:
    """The head of an end-to-end model cuts to its max_det."""
    model: Any = YOLO("yolo26n.yaml").model.eval()
    model.set_head_attr(end2end=True)
    graphs, network = InferenceGraphs(), Network(model)
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        for max_det in (300, 100, 300):
            model.set_head_attr(max_det=max_det)
            for _ in range(2):
                assert graphs(network, images)[0].shape[1] == max_det
    assert len(captured) == 2
    assert model_of(network) is model


class Network(nn.Module):
    """As AutoBackend, which has the model without owning it."""

    format = "pt"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self)["model"] = model

    def forward(self, images: Tensor) -> Any:
        model: Any = self.model
        return model(images)


def test_hooks_are_called(captured: list[Forward]) -> None:
    graphs, network, seen = InferenceGraphs(), nn.Sequential(nn.Conv2d(3, 4, 1)), []
    handle = network[0].register_forward_hook(lambda *args: seen.append(1))
    forwards(graphs, network, 8, 8)
    assert (len(seen), captured) == (4, [])
    handle.remove()
    forwards(graphs, network, 8, 8)
    assert len(captured) == 1


def boxes(results: list[Any]) -> list[Tensor]:
    return [result.boxes.data for result in results]


@pytest.fixture
def pictures(coco8: str) -> str:
    return str(next(Path(coco8).parent.glob("images/val")))


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml"])
def test_predictions_are_those_without(config: str, pictures: str, captured: list[Forward]) -> None:
    torch.manual_seed(0)
    model = YOLO(config)
    say: dict[str, Any] = {"imgsz": 160, "conf": 1e-6, "verbose": False, "device": "cpu", "rect": False}
    wanted = boxes(model.predict(pictures, **say))
    patch_model(model, graphs="on", backend="stock")
    for _ in range(2):
        found = boxes(model.predict(pictures, **say))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    (replay,) = captured
    assert replay.calls == 1 + 7  # of eight pictures all but the first
    first = model.predictor
    assert isinstance(first, DetectionPredictor)
    assert isinstance(first, FlashPredictorMixin)
    unpatch_model(model)
    model.predict(pictures, **say)
    assert type(model.predictor) is DetectionPredictor


def test_why_a_prediction_has_no_graphs_is_told_once(
    pictures: str, captured: list[Forward], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr(Forward, "room", 0)
    model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
    for _ in range(2):
        model.predict(pictures, imgsz=32, rect=False, verbose=False, device="cpu")
    (line,) = (line for line in log if "captures no more CUDA graphs" in line)
    assert "prediction captures no more CUDA graphs, and holds 0: graphs of 1 shapes hold 1 MiB" in line


@pytest.mark.parametrize("special", [{"augment": True}, {"embed": [2]}])
def test_special_forwards_are_not_replayed(special: dict[str, Any], pictures: str, captured: list[Forward]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
    for _ in range(2):
        model.predict(pictures, imgsz=64, verbose=False, device="cpu", **special)
    assert captured == []


def test_predictions_run_from_graphs_under_on_alone_and_not_on_a_cpu(pictures: str) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    assert FlashConfig().graphs == "auto"
    model.predict(pictures, imgsz=32, verbose=False, device="cpu")
    assert not isinstance(model.predictor, FlashPredictorMixin)
    patch_model(model, graphs="on")
    for _ in range(2):
        model.predict(pictures, imgsz=32, verbose=False, device="cpu")
    predictor: Any = model.predictor
    assert not len(predictor._flash_graphs)


def test_a_predictor_with_its_own_inference_runs_it(pictures: str, captured: list[Forward], log: list[str]) -> None:
    seen: list[int] = []

    class Mine(DetectionPredictor):
        def inference(self, im: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(im))
            return super().inference(im, *args, **kwargs)

    model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
    for _ in range(2):
        model.predict(pictures, False, Mine, imgsz=32, rect=False, verbose=False, device="cpu")
    assert len(seen) == 8
    assert captured == []
    assert sum("Mine has an inference of its own" in line for line in log) == 1


@pytest.mark.parametrize("settings", [{}, {"graphs": "on"}])
def test_prompts_reach_models_that_take_them(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """YOLOE's third argument is not a predictor."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(YOLOE, "predict", lambda self, *args, **kwargs: given.append((args, kwargs)))
    model = patch_model(YOLOE("yoloe-11s.yaml"), **settings)
    model.predict("a.jpg", visual_prompts={"bboxes": []})
    model.predict("a.jpg")
    assert given == [(("a.jpg", False), {"visual_prompts": {"bboxes": []}}), (("a.jpg", False), {})]


def test_a_users_predictor_keeps_its_class(pictures: str, captured: list[Forward]) -> None:
    class Mine(DetectionPredictor):
        seen = 0

        def postprocess(self, *args: Any, **kwargs: Any) -> Any:
            Mine.seen += 1
            return super().postprocess(*args, **kwargs)

    model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
    predictors: set[int] = set()
    for _ in range(2):
        model.predict(pictures, predictor=Mine, imgsz=32, rect=False, verbose=False, device="cpu")
        predictors.add(id(model.predictor))
    assert isinstance(model.predictor, Mine)
    assert len(predictors) == 1  # the same predictor serves the second call
    assert Mine.seen == 8
    assert len(captured) == 1
    assert predictor_class(predictor_class(Mine)) is predictor_class(Mine)
