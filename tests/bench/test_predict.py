"""`yolo-flash bench predict`: the network as Ultralytics' predictor sets it up, and the arms that can run it."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics.nn.autobackend import AutoBackend

from tests.machines import MACHINES
from tests.versions import ULTRALYTICS
from yolo_flash.bench import predict, process
from yolo_flash.bench.predict import Prediction, PredictJob
from yolo_flash.bench.process import serve
from yolo_flash.cli import main
from yolo_flash.patching.patch import targets

Captured = pytest.CaptureFixture[str]
TINY: dict[str, Any] = {"imgsz": (64,), "batch": 2, "rounds": 1, "steps": 2, "device": "cpu"}


@pytest.mark.parametrize(("arm", "block"), [("unpatched", "AAttn"), ("sdpa_flash", "FlashAAttn")])
def test_the_network_is_that_of_ultralytics_predictor(arm: str, block: str) -> None:
    prediction = Prediction(PredictJob(**TINY, amp="fp16"), arm)
    assert isinstance(prediction.network, AutoBackend)
    network = prediction.network.model
    assert not network.training
    assert network.is_fused()
    assert {type(module).__name__ for module in targets(network).values()} == {block}
    of_cpu = (
        torch.float32 if ULTRALYTICS >= (8, 4, 175) else torch.float16
    )  # newer ones take float32, whatever amp says
    assert {parameter.dtype for parameter in network.parameters()} == {of_cpu}
    seen: list[torch.Size] = []
    network.register_forward_hook(lambda module, args, result: seen.append(result[0].shape))
    (forward,) = prediction.parts(64, 2).values()
    forward()
    assert seen == [(2, 84, 84)]  # boxes and classes of all cells: the head has decoded them


def test_a_process_answers_with_the_figures(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    run_as_process(monkeypatch, "auto")
    serve(PredictJob, Prediction)
    lines = capsys.readouterr().out.splitlines()
    assert "ready" in lines
    answer = json.loads(lines[-1])
    assert answer["kernel_ms"] is None
    assert answer["images_per_second"] == pytest.approx(2e3 / answer["wall_ms"])
    assert answer["machine"]["kind"] == "cpu"
    assert answer["machine"]["precision"] == "fp32"


def test_a_process_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def parts(imgsz: int, batch: int) -> dict[str, Callable[[], None]]:
        def whole() -> None:
            if batch == 2 and imgsz == 64 and len(calls) > 0:
                raise torch.OutOfMemoryError
            calls.append(imgsz)

        return {"kernel_ms": whole}

    calls: list[int] = []
    run_as_process(monkeypatch, "auto")
    card = SimpleNamespace(total_memory=79 * 2**30)
    monkeypatch.setattr(process.torch.cuda, "get_device_properties", lambda device: card)
    serve(PredictJob, lambda job, arm: SimpleNamespace(parts=parts))
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["error"] == "out of memory (79 GiB)"
    assert answer["machine"]["kind"] == "cpu"


def run_as_process(monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    job = json.dumps(dataclasses.asdict(PredictJob(**TINY)))
    monkeypatch.setattr(sys, "argv", ["bench_predict", job, "64", arm])
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))


# Arms -----------------------------------------------------------------------------------------------------------------
def test_without_arms_those_that_run_here_are_measured(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    measured: list[PredictJob] = []
    monkeypatch.setattr(predict, "bench", measured.append)
    predict.bench_predict(PredictJob(**TINY))
    predict.bench_predict(PredictJob(**TINY, arms=("auto", "stock")))
    assert [job.arms for job in measured] == [("unpatched", "sdpa_math", "sdpa_flash", "auto"), ("auto", "stock")]
    assert any(line.startswith("bench predict: without sdpa_cudnn: runs on NVIDIA cards") for line in log)


@pytest.mark.parametrize(("amp", "halves"), [("fp32", []), ("fp16", ["sdpa_flash", "sdpa_cudnn", "triton_area"])])
def test_on_a_gpu_the_precision_decides_which(amp: str, halves: list[str]) -> None:
    arms = predict._arms_that_run(PredictJob(imgsz=(64, 96), amp=amp), MACHINES["H100"])
    assert arms[0] == "unpatched"
    assert arms[-1] == "auto"
    assert set(arms[1:-1]) == {"sdpa_math", "sdpa_efficient", *halves}


# The command ----------------------------------------------------------------------------------------------------------
def test_settings_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[PredictJob] = []
    monkeypatch.setattr("yolo_flash.bench.predict.bench_predict", jobs.append)
    for imgsz in ("imgsz=640,1280", "imgsz=[640, 1280]"):
        main.main(["bench", "predict", imgsz, "batch=4", "amp=fp16", "device=0", "csv=7"])
    assert jobs == [PredictJob(imgsz=(640, 1280), batch=4, amp="fp16", device="0", csv="7")] * 2


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("amp=bf16", "amp must be fp32 or fp16, found 'bf16'"),
        ("arms=nchw", "there is no backend 'nchw'"),
        ("folder=here", r"bench predict takes model=\.\.\., .*; found folder"),
        ("model=yolov8n.yaml", r"yolov8n\.yaml has no attention layer that the plugin knows"),
        ("model=yolo12n.pt", r"model=yolo12n\.pt is not on this machine and cannot be downloaded"),
        ("model=missing.yaml", "bench predict: .*missing"),
    ],
)
def test_mistakes_are_told_before_a_process_starts(typed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main.main(["bench", "predict", typed, "device=cpu", "csv=predict.csv"])
    assert list(tmp_path.iterdir()) == []
