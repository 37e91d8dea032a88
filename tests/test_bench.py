"""`yolo-flash bench step`: fresh processes in turns, medians with their range, errors told in the table."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yolo_flash import cli
from yolo_flash.bench import Step, StepJob, bench_step, summary, table

TINY: dict[str, Any] = {"imgsz": 64, "batch": 2, "rounds": 1, "steps": 1, "device": "cpu"}


def test_a_step_is_measured_from_the_command_line(tmp_path: Path, log: list[str]) -> None:
    file = tmp_path / "step.json"
    typed = "bench step model=yolo12n.yaml imgsz=64 batch=2 rounds=1 steps=1 device=cpu arms=unpatched,sdpa_flash"
    cli.main([*typed.split(), f"json={file}"])
    results = json.loads(file.read_text())
    assert list(results["arms"]) == ["unpatched", "sdpa_flash"]
    assert results["job"] == json.loads(json.dumps(dataclasses.asdict(StepJob(**TINY)))) | {
        "arms": ["unpatched", "sdpa_flash"],
        "json": str(file),
    }
    assert results["machine"]["kind"] == "cpu"
    for arm in results["arms"].values():
        (sample,) = arm["samples"]
        assert sample["wall_ms"] > 1
        assert 0.1 < sample["peak_gib"] < 32
        assert sample["kernel_ms"] is None
        assert arm["median"]["wall_ms"]["median"] == sample["wall_ms"]
    text = next(line for line in log if "| arm |" in line)
    assert "fp32" in text
    assert "| unpatched | - | - |" in text
    assert "| 1.00x |" in text


def test_arms_take_turns_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    began: list[str] = []

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **pipes: Any) -> None:
            self.arm = command[-1]
            self.stdout = io.StringIO("a line of another library\nready\n")
            began.append(self.arm)

        def communicate(self, word: str) -> tuple[str, str]:
            told.append(self.arm)
            assert word == "go\n"
            answer = {"kernel_ms": 10.0 + len(told), "wall_ms": 20.0, "peak_gib": 1.0, "machine": {"text": "a card"}}
            return f"another line\n{json.dumps(answer)}\n", ""

        def kill(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr("yolo_flash.bench.subprocess.Popen", Process)
    results = bench_step(StepJob(arms=("unpatched", "auto", "stock"), rounds=2))
    assert told == began == ["unpatched", "auto", "stock"] * 2
    assert results["machine"] == {"text": "a card"}
    assert results["arms"]["auto"]["median"]["kernel_ms"] == {"median": 13.5, "low": 12.0, "high": 15.0}


def test_an_arm_that_fails_is_told_and_the_others_stand(log: list[str]) -> None:
    bench_step(StepJob(**TINY, arms=("unpatched", "sdpa_cudnn")))
    text = next(line for line in log if "| arm |" in line)
    failed = next(line for line in text.splitlines() if line.startswith("| sdpa_cudnn"))
    assert "runs on NVIDIA cards" in failed
    assert "| unpatched | - | - |" in text


def test_speed_up_is_by_gpu_time_where_there_is_one() -> None:
    def arm(kernel: float) -> dict[str, Any]:
        sample = {"network_kernel_ms": kernel - 1, "kernel_ms": kernel, "wall_ms": 100.0, "peak_gib": 2.0}
        return {"samples": [sample], "median": summary([sample])}

    job = dataclasses.asdict(StepJob(arms=("unpatched", "auto")))
    text = table({"yolo_flash": "1", "job": job, "machine": {}, "arms": {"unpatched": arm(60.0), "auto": arm(40.0)}})
    assert "| auto | 39.00 (39.00..39.00) | 40.00 (40.00..40.00) | 100.00 (100.00..100.00) |" in text
    assert text.splitlines()[-1].endswith("| 1.50x |")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("bench", "bench measures: step, op. Found nothing"),
        ("bench epoch", "bench measures: step, op. Found epoch"),
        ("bench step imgz=64", r"bench step takes model=\.\.\., imgsz=\.\.\., .*; found imgz"),
        ("bench step batch=0", "batch must be a whole number of at least 1, found 0"),
        ("bench step rounds=two", "rounds must be a whole number of at least 1, found 'two'"),
        ("bench step amp=fp8", "amp must be fp16, bf16 or fp32, found 'fp8'"),
        ("bench step arms=unpatched,sdpa_flsh", "Did you mean 'sdpa_flash'"),
    ],
)
def test_mistakes_are_told_before_a_process_starts(typed: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cli.main(typed.split())


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"measures detection models, yolo12n-seg\.yaml is none"):
        Step(StepJob(**TINY, model="yolo12n-seg.yaml"), "auto")


def test_a_process_whose_parent_is_gone_measures_nothing() -> None:
    command = [sys.executable, "-m", "yolo_flash.bench", json.dumps(dataclasses.asdict(StepJob(**TINY))), "auto"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert "{" not in done.stdout
