"""On a CUDA device: `bench step` and `bench predict` measure GPU time, in the precision and layout that they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from yolo_flash.bench.predict import Prediction, PredictJob, _arms_that_run
from yolo_flash.bench.process import _measure_calls
from yolo_flash.bench.rounds import bench
from yolo_flash.bench.step import Step, StepJob
from yolo_flash.machine import detect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY: dict[str, Any] = {"imgsz": (64,), "batch": 2, "rounds": 1, "steps": 2}


@pytest.mark.slow
def test_a_step_is_measured_in_processes(tiny_model: str) -> None:
    (results,) = bench(StepJob(**TINY, model=tiny_model, arms=("nchw", "auto")))
    assert results["machine"]["precision"] == "fp16"
    for arm in results["arms"].values():
        (sample,) = arm["samples"]
        assert 0 < sample["network_kernel_ms"] < sample["kernel_ms"]


def test_a_prediction_is_measured_in_every_arm_that_runs_here(tiny_model: str) -> None:
    """In this process: that of a step, above, has processes of its own."""
    job = PredictJob(**TINY, model=tiny_model, amp="fp16")
    device = job.torch_device()
    arms = _arms_that_run(job, detect(device))
    assert {"unpatched", "sdpa_math", "auto"} <= set(arms)
    for arm in arms:
        sample = _measure_calls(Prediction(job, arm), job, 64, device)
        assert sample["kernel_ms"] > 0, arm
        assert sample["peak_gib"] > 0, arm


def test_layouts_and_precisions_are_those_of_ultralytics(tiny_model: str) -> None:
    kernel = "model.0.conv.weight"
    for arm, nhwc in (("nchw", False), ("unpatched", True)):
        weight = Step(StepJob(**TINY, model=tiny_model), arm).model.get_parameter(kernel)
        assert weight.is_contiguous(memory_format=torch.channels_last) == nhwc
    for amp, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        job = PredictJob(**TINY, model=tiny_model, amp=amp)
        weight = Prediction(job, "auto").network.model.get_parameter(kernel)
        assert weight.dtype is dtype
        assert weight.is_contiguous()
