"""Where the time of an epoch goes: every second has a part, and a loader that is the limit is named once."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.data.build import InfiniteDataLoader

from tests.engine.test_telemetry import events, of
from yolo_flash import patch_model
from yolo_flash.engine import clock
from yolo_flash.engine.clock import PARTS, EpochClock
from yolo_flash.engine.step_profile import StepProfile


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    times = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: times[0]))
    return times


def epoch(watch: EpochClock, now: list[float], data: float, step: float) -> None:
    watch.restart()
    for _ in range(4):
        now[0] += data
        watch.got_batch()
        now[0] += step
        watch.did_step()


def test_laps_go_to_their_parts(now: list[float]) -> None:
    watch = EpochClock(torch.device("cpu"))
    epoch(watch, now, 0.25, 0.5)
    for part in ("rest", "validation", "saving", "rest"):
        now[0] += 1
        watch.lap(part)
    assert watch.seconds == {"steps": 2.0, "data": 1.0, "validation": 1.0, "saving": 1.0, "rest": 2.0}
    assert watch.text() == "epoch of 7.0 s: 2.0 steps, 1.0 data, 1.0 validation, 1.0 saving, 2.0 rest"
    watch.restart()
    assert sum(watch.seconds.values()) == 0


def test_a_loader_is_the_limit_from_three_tenths_on(now: list[float]) -> None:
    watch = EpochClock(torch.device("cpu"))
    assert watch.hungry() == ""
    epoch(watch, now, 0.02, 0.08)
    assert watch.hungry() == ""
    epoch(watch, now, 0.07, 0.04)
    assert watch.hungry() == "70 of 110 ms an iteration"


def test_a_gpu_that_is_still_busy_does_not_wait(now: list[float]) -> None:
    watch = EpochClock(torch.device("cpu"))
    done = iter([True, False, False, False])
    watch._event = SimpleNamespace(query=lambda: next(done), record=lambda: None)  # type: ignore[assignment]
    epoch(watch, now, 0.07, 0.04)
    assert watch.starved == pytest.approx(0.07)
    assert watch.seconds["data"] == pytest.approx(0.28)
    assert watch.hungry() == ""


def test_the_seconds_of_an_epoch_are_in_its_record_and_its_line(
    tiny_model: str, tiny_args: Any, log: list[str]
) -> None:
    model = patch_model(YOLO(tiny_model))
    begin = time.perf_counter()
    model.train(**{**tiny_args, "epochs": 2})
    whole = time.perf_counter() - begin
    records = of(events(model), "epoch")
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert tuple(record["seconds"]) == PARTS
        *parts, rest = record["seconds"].values()
        assert all(seconds > 0 for seconds in parts)
        assert rest >= 0
    assert sum(sum(record["seconds"].values()) for record in records) < whole
    lines = [line for line in log if "images/s" in line]
    assert len(lines) == 2
    assert all("; epoch of " in line for line in lines)


def test_reading_a_profile_is_no_waiting_for_data(
    tiny_model: str, tiny_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = StepProfile.compare

    def slow(self: StepProfile, *args: Any) -> None:
        time.sleep(2)
        stock(self, *args)

    monkeypatch.setattr(StepProfile, "compare", slow)
    model = patch_model(YOLO(tiny_model))
    model.train(**tiny_args)
    (record,) = of(events(model), "epoch")
    assert record["seconds"]["rest"] >= 2
    assert record["seconds"]["data"] < 2


def test_a_slow_loader_is_named_once_with_what_helps(
    tiny_model: str, tiny_args: Any, log: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stock = InfiniteDataLoader.__iter__

    def slow(self: Any) -> Any:
        for batch in stock(self):
            time.sleep(1)
            yield batch

    monkeypatch.setattr(InfiniteDataLoader, "__iter__", slow)
    patch_model(YOLO(tiny_model)).train(**{**tiny_args, "epochs": 3, "val": False, "cache": "ram"})
    (line,) = [line for line in log if "the data loader is the limit" in line]
    assert "more workers= than 0, less augmentation (mosaic=0)" in line
