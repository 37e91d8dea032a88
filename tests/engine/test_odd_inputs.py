"""Pictures that few have, of any shape and number of channels: the same features, boxes and messages as stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics.utils import YAML

from tests.counting import LAYERS, settle
from tests.datasets import create_dataset
from tests.twins import Twin, predict_twins, train_twins
from yolo_flash.backends import registry as backends_module

QUIET = {"device": "cpu", "verbose": False}
SHAPES = (
    *((1, 1), (2, 3), (1, 200), (200, 1), (31, 33), (64, 64)),
    *((65, 64), (96, 32), (13, 17), (7, 320), (320, 7), (99, 101)),
)


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_features_show_an_error_of_attention(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of this file lean on: attention that is off by 1 % does not pass for that of stock."""
    flash = backends_module.BACKENDS["sdpa_flash"]

    def forward(packed: Any, spec: Any) -> Any:
        assert flash.forward is not None
        out, *rest = flash.forward(packed, spec)
        return out * 1.01, *rest

    def use(twin: Twin) -> Any:
        return twin.model.predict(picture(64, 64, 3), imgsz=64, **QUIET)

    predict_twins(tiny_model, use)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", _with_forward(flash, forward))
    with pytest.raises(AssertionError, match="the features are off"):
        predict_twins(tiny_model, use)


def _with_forward(backend: Any, forward: Any) -> Any:
    return backends_module.Backend(backend.name, lambda spec, machine: iter(()), forward, lambda spec, machine: True)


def test_pictures_of_odd_shapes(tiny_model: str) -> None:
    def use(twin: Twin) -> list[Any]:
        return [twin.model.predict(picture(*shape, 3), imgsz=96, conf=0.0, **QUIET)[0] for shape in SHAPES]

    stock, ours = predict_twins(tiny_model, use)
    assert not stock.error
    assert ours.calls.forward["sdpa_flash"] >= LAYERS * len(SHAPES)
    for x, y in zip(ours.result, stock.result, strict=True):
        assert x.orig_shape == y.orig_shape
        torch.testing.assert_close(x.boxes.data, y.boxes.data, rtol=1e-3, atol=0.1)
    assert sum(len(result.boxes) for result in stock.result) > 0


@pytest.mark.parametrize("imgsz", [[32, 96], (96, 64, 32), 0, 33, "nonsense"])
def test_sides_of_every_kind(imgsz: Any, tiny_model: str, coco8: str) -> None:
    """What Ultralytics corrects or refuses, in prediction and validation."""

    def use(twin: Twin) -> list[str]:
        outcomes = []
        for mode in (
            lambda: twin.model.predict(picture(50, 90, 3), imgsz=imgsz, **QUIET)[0].boxes.data.shape,
            lambda: twin.model.val(data=coco8, imgsz=imgsz, batch=4, workers=0, plots=False, **QUIET).results_dict,
        ):
            try:
                outcomes.append(str(mode()))
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        return outcomes

    stock, ours = predict_twins(tiny_model, use)
    assert ours.saying("imgsz") == stock.saying("imgsz")
    assert [outcome.split(":")[0] for outcome in ours.result] == [outcome.split(":")[0] for outcome in stock.result]
    if all("Error" in outcome for outcome in stock.result):
        assert ours.result == stock.result
    else:
        assert ours.calls.forward["sdpa_flash"] >= LAYERS


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_other_numbers_of_channels(channels: int, tiny_model: str, tiny_args: dict[str, Any], tmp_path: Path) -> None:
    YAML.save(tiny_model, {**YAML.load(tiny_model), "channels": channels})
    data = create_dataset(tmp_path / "set", "detect", train=2, val=1)
    YAML.save(data, {**YAML.load(data), "channels": channels})
    for file in (tmp_path / "set").rglob("*.jpg"):
        if channels > 1:
            assert cv2.imwritemulti(str(file.with_suffix(".tiff")), list(picture(channels, 64, 64)))
            file.unlink()
    _, ours = train_twins(tiny_model, {**tiny_args, "data": data, "imgsz": 64}, steps=1)
    assert ours.model.model.model[0].conv.in_channels == channels
    given = next((tmp_path / "set" / "images" / "val").iterdir())

    def use(twin: Twin) -> Any:
        return [
            twin.model.predict(source, imgsz=64, conf=0.0, **QUIET)[0].boxes.data
            for source in (given, picture(64, 50, channels), picture(32, 64))
        ]

    best = ours.model.trainer.best
    stock, ours = predict_twins(best, use, weights=lambda model: model.float())
    assert not stock.error
    for x, y in zip(ours.result, stock.result, strict=True):
        assert len(y)
        torch.testing.assert_close(x, y, rtol=1e-3, atol=0.1)


def test_yolo26_p6_predicts_as_stock() -> None:
    stock, ours = predict_twins(
        "yolo26n-p6.yaml",
        lambda twin: twin.model.predict(picture(128, 192, 3), imgsz=192, **QUIET),
        layers=2,
        weights=lambda model: settle(model, side=128),
    )
    assert not stock.error
    assert ours.model.model.stride.max() == 64
