"""Validation, prediction, tracking and embedding of a patched model: the features and results of stock, fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from ultralytics.engine.model import Model
from ultralytics.utils import ASSETS

from tests.counting import AttentionCalls, settle
from tests.datasets import create_dataset
from tests.engine.test_tasks import CASES, create
from yolo_flash import patch_model


def record(model: Model) -> list[list[Tensor]]:
    """The features that reach the head in every forward from now on, also of the copies that Ultralytics makes."""
    features: list[list[Tensor]] = []

    def note(head: Any, args: tuple[Any, ...]) -> None:
        if hasattr(head, "total_ops"):  # GFLOPs are being counted, of the stock forward
            return
        features.append([x.detach().clone() for x in (args[0] if isinstance(args[0], list) else [args[0]])])

    network: Any = model.model
    network.model[-1].register_forward_pre_hook(note)
    return features


def compare(config: str, use: Callable[[Model], Any]) -> tuple[Any, Any]:
    """Use a stock model and its patched twin; what it gives. The features agree, and each forward was fused."""
    stock = create(config)
    settle(stock.model)
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    layers = CASES[config][1]
    expected, got = record(stock), record(ours)
    with AttentionCalls() as calls:
        wanted = use(stock)
    assert not calls.forward
    with AttentionCalls() as calls:
        given = use(ours)
    assert calls.forward == {"sdpa_flash": layers * len(got)}
    assert len(got) == len(expected) > 0
    for ours_now, stock_now in zip(got, expected, strict=True):
        for x, y in zip(ours_now, stock_now, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()
    return wanted, given


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four frames over which the bus moves."""
    path = str(tmp_path_factory.mktemp("video") / "bus.avi")
    bus = cv2.imread(str(ASSETS / "bus.jpg"))
    assert bus is not None
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 128))
    for step in range(4):
        writer.write(cv2.resize(np.roll(bus, 8 * step, axis=1), (96, 128)))
    writer.release()
    return path


def boxes(results: list[Any]) -> list[Tensor]:
    return [result.boxes.data.cpu() for result in results]


@pytest.mark.parametrize("config", CASES)
def test_a_prediction_is_that_of_stock(config: str) -> None:
    def predict(model: Model) -> list[Any]:
        return model.predict(ASSETS / "bus.jpg", imgsz=96, device="cpu", verbose=False, save=False)

    wanted, given = compare(config, predict)
    assert len(wanted) == len(given) == 1


def test_a_folder_is_predicted_as_by_stock() -> None:
    wanted, given = compare(
        "yolo12n.yaml", lambda model: model.predict(ASSETS, imgsz=96, conf=0.0, device="cpu", verbose=False)
    )
    assert [result.path for result in wanted] == [result.path for result in given]
    assert {Path(result.path).name for result in given} == {"bus.jpg", "zidane.jpg"}  # two shapes
    for x, y in zip(boxes(given), boxes(wanted), strict=True):
        assert len(y) > 0
        torch.testing.assert_close(x, y, rtol=1e-3, atol=0.1)


def test_a_video_is_predicted_as_by_stock(video: str) -> None:
    wanted, given = compare(
        "yolo12n.yaml",
        lambda model: list(model.predict(video, imgsz=96, conf=0.0, device="cpu", verbose=False, stream=True)),
    )
    assert len(given) == 4
    for x, y in zip(boxes(given), boxes(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=0.1)


def test_tracks_are_those_of_stock(video: str) -> None:
    pytest.importorskip("lap")
    wanted, given = compare(
        "yolo12n.yaml",
        lambda model: list(model.track(video, imgsz=96, device="cpu", verbose=False, stream=True)),
    )
    tracked = [result.boxes.id for result in given]
    assert any(ids is not None for ids in tracked)
    for x, y in zip(boxes(given), boxes(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=0.1)


def test_embeddings_are_those_of_stock() -> None:
    stock = create("yolo12n.yaml")
    settle(stock.model)
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    (wanted,) = stock.embed(ASSETS / "bus.jpg", imgsz=96, device="cpu", verbose=False)
    with AttentionCalls() as calls:
        (given,) = ours.embed(ASSETS / "bus.jpg", imgsz=96, device="cpu", verbose=False)
    assert calls.forward["sdpa_flash"] >= 8
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml", "yolo26n-sem.yaml", "yolo26n-depth.yaml"])
def test_a_validation_by_itself_is_that_of_stock(config: str, tmp_path: Path) -> None:
    data = create_dataset(tmp_path / "data", CASES[config][0])
    wanted, given = compare(
        config,
        lambda model: model.val(data=data, imgsz=64, batch=2, workers=0, device="cpu", plots=False, verbose=False),
    )
    assert given.results_dict.keys() == wanted.results_dict.keys()
    assert given.results_dict == pytest.approx(wanted.results_dict, rel=1e-2, abs=1e-3)


def test_a_fused_model_still_predicts_fused() -> None:
    def fuse_and_predict(model: Model) -> Any:
        model.fuse(verbose=False)
        return model.predict(ASSETS / "bus.jpg", imgsz=96, device="cpu", verbose=False)

    compare("yolo12n.yaml", fuse_and_predict)
