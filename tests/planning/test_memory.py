"""The forecast of memory against steps that were measured on a GPU, kept in docs/results."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from tests.machines import MACHINES
from yolo_flash import FlashConfig
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.planning.inputs import RunInput
from yolo_flash.planning.memory import attention_memory, kept_bytes
from yolo_flash.planning.plan import make_plan

MEASURED = sorted((Path(__file__).parents[2] / "docs" / "results").glob("step-*.json"))


def measured() -> list[tuple[Path, str]]:
    """Each file with an arm of which both it and stock fitted into memory."""
    found = []
    for file in MEASURED:
        arms = json.loads(file.read_text())["arms"]
        fitted = [arm for arm in arms if "peak_gib" in arms[arm]["median"]]
        found += [(file, arm) for arm in fitted if arm != "unpatched" and "unpatched" in fitted]
    return found


@functools.cache
def a_model(name: str) -> Any:
    return YOLO(name).model


@pytest.mark.parametrize(("file", "arm"), measured(), ids=lambda value: getattr(value, "stem", value))
def test_the_difference_is_within_a_tenth_of_the_measured_one(file: Path, arm: str) -> None:
    results = json.loads(file.read_text())
    job, arms = results["job"], results["arms"]
    peak = {name: arms[name]["median"]["peak_gib"]["median"] for name in ("unpatched", arm)}
    imgsz = job["imgsz"] if isinstance(job["imgsz"], int) else job["imgsz"][0]
    run_input = RunInput("train", job["batch"], imgsz, imgsz, torch.float16, nhwc=True)
    backend = "sdpa_flash" if arm == "auto" else arm
    rows = make_plan(a_model(job["model"]), Dispatcher(FlashConfig(backend=backend)), MACHINES["H100"], [run_input])
    forecast = attention_memory(rows)
    assert (forecast.stock - forecast.planned) / 2**30 == pytest.approx(peak["unpatched"] - peak[arm], rel=0.1)


def test_there_are_measurements() -> None:
    assert len(measured()) >= 6


def test_what_one_layer_keeps() -> None:
    half = AttentionSpec(2, 3, 10, 10, 32, 64, torch.float16, "nhwc")
    assert kept_bytes(half, "stock") == 2 * 3 * 10 * (128 * 2 + 10 * 6)
    assert kept_bytes(half, "triton_area") == 2 * 3 * 10 * (128 * 2 + 64 * 2 + 4)
    single = AttentionSpec(1, 1, 10, 10, 32, 32, torch.float32, "nchw")
    assert kept_bytes(single, "sdpa_math") == 10 * (96 * 4 + 10 * 4)
