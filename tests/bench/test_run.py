"""`bench run`: whole processes, one after the other, each round with a seed of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yolo_flash.bench import process, rounds
from yolo_flash.bench.run import RunJob
from yolo_flash.bench.train import bench_train
from yolo_flash.cli import main


def test_a_process_trains_validates_and_tells_its_seconds_and_its_map(tiny_model: str, coco8: str) -> None:
    job = RunJob(model=tiny_model, data=coco8, imgsz=(32,), batch=4, epochs=2, workers=0, device="cpu", arms=("auto",))
    (size,) = bench_train(job)
    (sample,) = size["arms"]["auto"]["samples"]
    assert len(sample["epoch_seconds"]) == 2
    assert 0 < sample["epoch_s"] < sample["first_epoch_s"] < sample["process_s"]
    assert 0 <= sample["map50_95"] <= 1
    assert (
        sample["images_per_second"] > 4 / sample["epoch_s"]
    )  # validation and saving do not count; the set has 4 images
    assert 0 < sample["peak_gib"] < 16
    assert sample["seed"] == 0


def test_each_round_has_its_seed_and_arms_take_turns(
    coco8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def one_round(job: Any, imgsz: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for arm in job.arms:
            asked.append((arm, job.seed))
            figures = {"process_s": 9.0 - job.seed, "first_epoch_s": 2.0, "epoch_s": 1.0, "map50_95": 0.1234}
            figures |= {"images_per_second": 100.0, "peak_gib": 1.5}
            yield arm, figures | {"seed": job.seed, "machine": {"text": "a card", "precision": "fp16"}}

    monkeypatch.setattr(rounds, "one_round", one_round)
    main.main(["bench", "run", f"data={coco8}", "rounds=2", "seed=5", "csv=run.csv"])
    assert asked == [("unpatched", 5), ("auto", 5), ("unpatched", 6), ("auto", 6)]
    rows = (tmp_path / "run.csv").read_text().splitlines()
    seed = rows[0].split(",").index("seed")
    assert [row.split(",")[seed] for row in rows[1:]] == ["5", "5", "6", "6"]
    (table,) = [line for line in log if "| arm |" in line]
    cells = ["3.50 (3.00..4.00)", *(f"{x} ({x}..{x})" for x in ("2.00", "1.00", "100.00", "1.50", "0.123")), "1.00x"]
    assert f"| auto | {' | '.join(cells)} |" in table


def test_processes_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is started when the one before has ended, and its seconds are those from its start to its end."""
    now, events = [0.0], []

    class Process:
        def __init__(self, arm: str) -> None:
            self.arm = arm

        def __enter__(self) -> Process:
            events.append(f"start {self.arm}")
            now[0] += 1
            return self

        def __exit__(self, *error: object) -> None:
            now[0] += 2
            events.append(f"end {self.arm}")

        def kill(self) -> None:
            pass

    monkeypatch.setattr(process.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(process, "start", lambda job, imgsz, arm: Process(arm))
    monkeypatch.setattr(process, "until_ready", lambda started: [])
    monkeypatch.setattr(process, "answer_of", lambda started, before: json.loads('{"epoch_s": 1.0}'))
    answers = dict(process.one_round(RunJob(arms=("unpatched", "auto")), 64))
    assert events == ["start unpatched", "end unpatched", "start auto", "end auto"]
    assert answers == {arm: {"process_s": 3.0, "epoch_s": 1.0} for arm in ("unpatched", "auto")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["epochs=1"], "epochs must be a whole number of at least 2"), (["arms=grafs"], "Did you mean 'graphs'")],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main.main(["bench", "run", *arguments])
