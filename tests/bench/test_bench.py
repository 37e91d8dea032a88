"""`yolo-flash bench step`: fresh processes in turns, medians with their range, errors told in the size_table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import ultralytics

from yolo_flash.bench import rounds
from yolo_flash.bench.rounds import COLUMNS, bench, size_table, summary
from yolo_flash.bench.step import Step, StepJob
from yolo_flash.cli import main
from yolo_flash.patching.patch import targets

TINY: dict[str, Any] = {"imgsz": (64,), "batch": 2, "rounds": 1, "steps": 1, "device": "cpu"}


def test_a_step_is_measured_from_the_command_line(tmp_path: Path, log: list[str]) -> None:
    file, sheet = tmp_path / "step.json", tmp_path / "step.csv"
    typed = "bench step model=yolo12n.yaml imgsz=64 batch=2 rounds=1 steps=1 device=cpu"
    arms = ["unpatched", "sdpa_flash", "sdpa_cudnn"]
    main.main([*typed.split(), f"arms={','.join(arms)}", f"json={file}", f"csv={sheet}"])
    results = json.loads(file.read_text())
    assert list(results["arms"]) == arms
    assert results["job"] == json.loads(json.dumps(dataclasses.asdict(StepJob(**TINY)))) | {
        "imgsz": 64,
        "arms": arms,
        "csv": str(sheet),
        "json": str(file),
    }
    assert results["machine"]["kind"] == "cpu"
    failed = results["arms"].pop("sdpa_cudnn")  # the others stand
    assert "runs on NVIDIA cards" in failed["median"]["error"]
    for arm in results["arms"].values():
        (sample,) = arm["samples"]
        assert sample["wall_ms"] > 1
        assert 0.1 < sample["peak_gib"] < 32
        assert sample["kernel_ms"] is None
        assert arm["median"]["wall_ms"]["median"] == sample["wall_ms"]
    rows = read(sheet)
    assert tuple(rows[0]) == COLUMNS
    assert [row["arm"] for row in rows] == arms
    assert "runs on NVIDIA cards" in rows[2]["error"]
    for row, arm in zip(rows[:2], results["arms"].values(), strict=True):
        assert (row["command"], row["model"], row["imgsz"], row["batch"]) == ("step", "yolo12n.yaml", "64", "2")
        assert (row["precision"], row["round"], row["kernel_ms"], row["error"]) == ("fp32", "1", "", "")
        assert float(row["wall_ms"]) == pytest.approx(arm["samples"][0]["wall_ms"], rel=1e-5)
        assert float(row["images_per_second"]) == pytest.approx(2e3 / float(row["wall_ms"]), rel=1e-5)
        assert row["device"] == results["machine"]["name"]
        assert (row["torch"], row["ultralytics"]) == (torch.__version__, ultralytics.__version__)
    text = next(line for line in log if "| arm |" in line)
    assert "fp32" in text
    assert "| unpatched | - | - |" in text
    assert "| 1.00x |" in text
    assert "runs on NVIDIA cards" in next(line for line in text.splitlines() if line.startswith("| sdpa_cudnn"))


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_arms_take_turns_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    began: list[str] = []
    sheet = tmp_path / "step.csv"

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **pipes: Any) -> None:
            assert command[1:3] == ["-m", "yolo_flash.bench.step"]
            self.imgsz, self.arm = command[-2:]
            self.stdout = io.StringIO("a line of another library\nready\n")
            began.append(self.arm)

        def communicate(self, word: str) -> tuple[str, str]:
            assert [row["arm"] for row in read(sheet)] == told  # all that was measured is on the disk
            told.append(self.arm)
            assert word == "go\n"
            answer: dict[str, Any] = {"kernel_ms": 10.0 + len(told), "wall_ms": 20.0, "peak_gib": 1.0}
            if self.imgsz == "4096" and self.arm == "unpatched":
                answer = {"error": "out of memory (79 GiB)"}
            answer["machine"] = {"name": "a card", "precision": "fp16", "cudnn": 91900}
            return f"another line\n{json.dumps(answer)}\n", ""

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr("yolo_flash.bench.process.subprocess.Popen", Process)
    monkeypatch.setattr(rounds, "checkout", lambda: "c0ffee")
    job = StepJob(imgsz=(640, 4096), arms=("unpatched", "auto", "stock"), rounds=2, csv=str(sheet))
    small, large = bench(job)
    assert told == began == ["unpatched", "auto", "stock"] * 4
    assert small["machine"]["name"] == "a card"
    assert small["arms"]["auto"]["median"]["kernel_ms"] == {"median": 13.5, "low": 12.0, "high": 15.0}
    assert large["job"]["imgsz"] == 4096
    assert large["arms"]["unpatched"]["median"] == {"error": "out of memory (79 GiB)"}
    rows = read(sheet)
    assert [(row["imgsz"], row["round"]) for row in rows[::3]] == [
        ("640", "1"),
        ("640", "2"),
        ("4096", "1"),
        ("4096", "2"),
    ]
    lost = [row for row in rows if row["error"]]
    assert [(row["imgsz"], row["arm"], row["wall_ms"]) for row in lost] == [("4096", "unpatched", "")] * 2
    assert {(row["device"], row["precision"], row["cudnn"], row["commit"]) for row in rows} == {
        ("a card", "fp16", "9.19.0", "c0ffee")
    }


def test_a_bench_in_which_every_arm_failed_ends_with_the_reason() -> None:
    with pytest.raises(
        SystemExit, match=r"^yolo-flash: bench step: every arm failed: FileNotFoundError: .*nothing\.pt"
    ):
        main.main(
            [
                "bench",
                "step",
                "model=nothing.pt",
                "imgsz=64",
                "batch=2",
                "rounds=1",
                "steps=1",
                "device=cpu",
                "arms=auto",
            ]
        )


@pytest.mark.parametrize(
    ("command", "result", "told"),
    [
        ("bench", [{"arms": {"a": {"median": {"error": "no"}}, "b": {"median": {"error": "nor this"}}}}], "no"),
        ("bench_train", [{"arms": {"a": {"median": {"error": "no"}}, "b": {"median": {"wall_ms": {}}}}}], None),
        ("bench_predict", [{"arms": {"a": {"median": {"error": "out of memory"}}}}], "out of memory"),
        ("bench_op", [{"us": None, "note": "wrong"}, {"us": None, "note": "wrong too"}], "wrong"),
        ("bench_op", [{"us": None, "note": "wrong"}, {"us": 1.0, "note": ""}], None),
    ],
)
def test_the_others_do_too(command: str, result: list[Any], told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = command.removeprefix("bench_") if command != "bench" else "rounds"
    monkeypatch.setattr(f"yolo_flash.bench.{module}.{command}", lambda job: result)
    what = module if command != "bench" else "step"
    if told is None:
        main.main(["bench", what])
        return
    with pytest.raises(SystemExit) as end:
        main.main(["bench", what])
    assert end.value.code == f"yolo-flash: bench {what}: every arm failed: {told}"


def test_speed_up_is_by_gpu_time_where_there_is_one() -> None:
    def arm(kernel: float) -> dict[str, Any]:
        sample = {"network_kernel_ms": kernel - 1, "kernel_ms": kernel, "wall_ms": 100.0, "peak_gib": 2.0}
        return {"samples": [sample], "median": summary([sample])}

    job = dataclasses.asdict(StepJob(arms=("unpatched", "auto")))
    arms = {"unpatched": arm(60.0), "auto": arm(40.0)}
    text = size_table({"yolo_flash": "1", "job": job, "machine": {}, "arms": arms}, StepJob.columns)
    assert "| auto | 39.00 (39.00..39.00) | 40.00 (40.00..40.00) | 100.00 (100.00..100.00) |" in text
    assert text.splitlines()[-1].endswith("| 1.50x |")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("bench", "bench takes one of step, predict, train, run, op, plot. Found nothing"),
        ("bench epoch", "bench takes one of step, predict, train, run, op, plot. Found epoch"),
        ("bench step imgz=64", r"bench step takes model=\.\.\., imgsz=\.\.\., .*; found imgz"),
        ("bench step batch=0", "batch must be a whole number of at least 1, found 0"),
        ("bench step imgsz=640,0", "imgsz must be a whole number of at least 1, found 0"),
        ("bench step imgsz=640,1280 json=step.json", "json= holds one size, imgsz= names 2: csv= holds them all"),
        ("bench step arms=,,", "arms must name at least one of unpatched, nchw, auto or a backend"),
        ("bench step csv=missing/step.csv", "bench step: .*missing"),
        ("bench step rounds=two", "rounds must be a whole number of at least 1, found 'two'"),
        ("bench step amp=fp8", "amp must be fp16, bf16 or fp32, found 'fp8'"),
        ("bench step arms=unpatched,sdpa_flsh", "Did you mean 'sdpa_flash'"),
    ],
)
def test_mistakes_are_told_before_a_process_starts(typed: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main.main(typed.split())


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"measures detection models, yolo12n-seg\.yaml is none"):
        Step(StepJob(**TINY, model="yolo12n-seg.yaml"), "auto")


def test_a_process_whose_parent_is_gone_measures_nothing() -> None:
    command = [sys.executable, "-m", "yolo_flash.bench.step", json.dumps(dataclasses.asdict(StepJob(**TINY))), "64"]
    done = subprocess.run([*command, "auto"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert "{" not in done.stdout


def test_an_arm_without_the_plugin_is_stock() -> None:
    step = Step(StepJob(**TINY), "nchw")
    assert {type(block).__name__ for block in targets(step.model).values()} == {"AAttn"}


def test_the_commit_is_that_of_the_checkout_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "__file__", str(tmp_path / "yolo_flash" / "bench" / "rounds.py"))
    assert rounds.checkout() == ""
    (tmp_path / ".git").touch()  # no repository
    assert rounds.checkout() == ""
