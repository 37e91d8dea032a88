"""Prediction from graphs: which forwards may be replayed, with a graph that is none; `tests/gpu` has real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO, YOLOE
from ultralytics.models.yolo.detect import DetectionPredictor

from yolo_flash import patch_model, unpatch_model
from yolo_flash.engine import predictor
from yolo_flash.engine.predictor import FlashPredictorMixin, predictor_class
from yolo_flash.graphs import predict
from yolo_flash.graphs.predict import PredictGraphs


class Replay:
    """In the place of `CapturedForward`: runs the network, and counts."""

    made: list[Replay] = []
    off = 0.0

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.shape, self.calls = network, tuple(images.shape), 0
        Replay.made.append(self)

    def __call__(self, images: Tensor) -> Any:
        self.calls += 1
        out = self.network(images)
        return out * (1 + self.off) if isinstance(out, Tensor) else out


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Every forward is one that could be replayed; the graphs there were."""
    monkeypatch.setattr(predict, "CapturedForward", Replay)
    monkeypatch.setattr(predictor, "_has_graphs", lambda images: True)
    monkeypatch.setattr(Replay, "made", [])
    return Replay.made


def forwards(graphs: PredictGraphs, network: nn.Module, *sides: int) -> None:
    for side in sides:
        images = torch.rand(1, 3, side, side)
        torch.testing.assert_close(graphs(network, images), network(images))


def test_a_shape_is_captured_when_it_comes_again(replays: list[Replay]) -> None:
    graphs, network = PredictGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 16, 8, 8, 24)
    assert [(replay.shape[2], replay.calls) for replay in replays] == [(8, 1 + 2)]  # one call compares
    forwards(graphs, network, 16, 8)
    assert [(replay.shape[2], replay.calls) for replay in replays] == [(8, 1 + 3), (16, 1 + 1)]


def test_the_four_used_last_are_held(replays: list[Replay]) -> None:
    graphs, network = PredictGraphs(), nn.Conv2d(3, 4, 1)
    sides = [8, 16, 24, 32, 40]
    forwards(graphs, network, *sides, *sides)
    assert [key[2] for key in graphs._graphs] == [16, 24, 32, 40]
    forwards(graphs, network, 16, 8)
    assert [key[2] for key in graphs._graphs] == [32, 40, 16, 8]


def test_other_dtypes_and_batches_have_graphs_of_their_own(replays: list[Replay]) -> None:
    graphs, network = PredictGraphs(), nn.Identity()
    for _ in range(2):
        for images in (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8).half(), torch.rand(2, 3, 8, 8)):
            assert torch.equal(graphs(network, images), images)
    assert len(replays) == 3


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_a_replay_that_is_off_is_not_used(
    off: float, replays: list[Replay], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr(Replay, "off", off)
    graphs, network = PredictGraphs(), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 8, 16, 16)
    assert len(replays) == 1
    assert "a replay is off by" in graphs.why_not
    assert sum("prediction goes on without CUDA graphs" in line for line in log) == 1


def test_what_cannot_be_captured_runs_as_it_is(log: list[str]) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("operation not permitted")

    graphs, network = PredictGraphs(fail), nn.Conv2d(3, 4, 1)
    forwards(graphs, network, 8, 8, 16, 16)
    assert graphs.why_not == "RuntimeError: operation not permitted"
    assert sum("without CUDA graphs" in line for line in log) == 1


def test_what_predict_sets_in_the_head_belongs_to_the_graph(replays: list[Replay]) -> None:
    """The head of an end-to-end model cuts to its max_det."""
    model: Any = YOLO("yolo26n.yaml").model.eval()
    model.set_head_attr(end2end=True)
    graphs, network = PredictGraphs(), Network(model)
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        for max_det in (300, 100, 300):
            model.set_head_attr(max_det=max_det)
            for _ in range(2):
                assert graphs(network, images)[0].shape[1] == max_det
    assert len(replays) == 2
    assert predict._model_of(network) is model


class Network(nn.Module):
    """As AutoBackend, which has the model without owning it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self)["model"] = model

    def forward(self, images: Tensor) -> Any:
        model: Any = self.model
        return model(images)


def test_hooks_are_called(replays: list[Replay]) -> None:
    graphs, network, seen = PredictGraphs(), nn.Sequential(nn.Conv2d(3, 4, 1)), []
    handle = network[0].register_forward_hook(lambda *args: seen.append(1))
    forwards(graphs, network, 8, 8)
    assert (len(seen), replays) == (4, [])
    handle.remove()
    forwards(graphs, network, 8, 8)
    assert len(replays) == 1


def boxes(results: list[Any]) -> list[Tensor]:
    return [result.boxes.data for result in results]


@pytest.fixture
def pictures(coco8: str) -> str:
    return str(next(Path(coco8).parent.glob("images/val")))


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml"])
def test_predictions_are_those_without(config: str, pictures: str, replays: list[Replay]) -> None:
    torch.manual_seed(0)
    model = YOLO(config)
    say: dict[str, Any] = {"imgsz": 160, "conf": 1e-6, "verbose": False, "device": "cpu", "rect": False}
    wanted = boxes(model.predict(pictures, **say))
    patch_model(model, graphs_predict=True, backend="stock")
    for _ in range(2):
        found = boxes(model.predict(pictures, **say))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    (replay,) = replays
    assert replay.calls == 1 + 7  # of eight pictures all but the first
    first = model.predictor
    assert isinstance(first, DetectionPredictor)
    assert isinstance(first, FlashPredictorMixin)
    unpatch_model(model)
    model.predict(pictures, **say)
    assert type(model.predictor) is DetectionPredictor


@pytest.mark.parametrize("special", [{"augment": True}, {"embed": [2]}])
def test_special_forwards_are_not_replayed(special: dict[str, Any], pictures: str, replays: list[Replay]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"), graphs_predict=True)
    for _ in range(2):
        model.predict(pictures, imgsz=64, verbose=False, device="cpu", **special)
    assert replays == []


def test_off_is_the_default_and_a_cpu_has_none(pictures: str) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    model.predict(pictures, imgsz=32, verbose=False, device="cpu")
    assert not isinstance(model.predictor, FlashPredictorMixin)
    patch_model(model, graphs_predict=True)
    for _ in range(2):
        model.predict(pictures, imgsz=32, verbose=False, device="cpu")
    predictor: Any = model.predictor
    assert not predictor._flash_graphs._graphs


def test_a_predictor_with_its_own_inference_runs_it(pictures: str, replays: list[Replay], log: list[str]) -> None:
    seen: list[int] = []

    class Mine(DetectionPredictor):
        def inference(self, im: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(im))
            return super().inference(im, *args, **kwargs)

    model = patch_model(YOLO("yolo12n.yaml"), graphs_predict=True)
    for _ in range(2):
        model.predict(pictures, False, Mine, imgsz=32, rect=False, verbose=False, device="cpu")
    assert len(seen) == 8
    assert replays == []
    assert sum("Mine has an inference of its own" in line for line in log) == 1


@pytest.mark.parametrize("settings", [{}, {"graphs_predict": True}])
def test_prompts_reach_models_that_take_them(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """YOLOE's third argument is not a predictor."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(YOLOE, "predict", lambda self, *args, **kwargs: given.append((args, kwargs)))
    model = patch_model(YOLOE("yoloe-11s.yaml"), **settings)
    model.predict("a.jpg", visual_prompts={"bboxes": []})
    model.predict("a.jpg")
    assert given == [(("a.jpg", False), {"visual_prompts": {"bboxes": []}}), (("a.jpg", False), {})]


def test_a_users_predictor_keeps_its_class(pictures: str, replays: list[Replay]) -> None:
    class Mine(DetectionPredictor):
        seen = 0

        def postprocess(self, *args: Any, **kwargs: Any) -> Any:
            Mine.seen += 1
            return super().postprocess(*args, **kwargs)

    model = patch_model(YOLO("yolo12n.yaml"), graphs_predict=True)
    predictors: set[int] = set()
    for _ in range(2):
        model.predict(pictures, predictor=Mine, imgsz=32, rect=False, verbose=False, device="cpu")
        predictors.add(id(model.predictor))
    assert isinstance(model.predictor, Mine)
    assert len(predictors) == 1  # the same predictor serves the second call
    assert Mine.seen == 8
    assert len(replays) == 1
    assert predictor_class(predictor_class(Mine)) is predictor_class(Mine)
