"""On a CUDA device: `bench step` and `bench predict` measure GPU time, in the precision and layout that they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from yolo_flash.bench.predict import Prediction, PredictJob, bench_predict
from yolo_flash.bench.rounds import bench
from yolo_flash.bench.step import Step, StepJob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY: dict[str, Any] = {"imgsz": (64,), "batch": 2, "rounds": 1, "steps": 2}


def test_a_step_is_measured_in_every_arm() -> None:
    (results,) = bench(StepJob(**TINY, arms=("nchw", "unpatched", "auto")))
    assert results["machine"]["precision"] == "fp16"
    for arm in results["arms"].values():
        (sample,) = arm["samples"]
        assert 0 < sample["network_kernel_ms"] < sample["kernel_ms"]


def test_a_prediction_is_measured_in_every_arm_that_runs_here() -> None:
    (results,) = bench_predict(PredictJob(**TINY, amp="fp16"))
    assert {"unpatched", "sdpa_math", "auto"} <= set(results["arms"])
    for arm in results["arms"].values():
        (sample,) = arm["samples"]
        assert sample["kernel_ms"] > 0
        assert sample["peak_gib"] > 0


def test_layouts_and_precisions_are_those_of_ultralytics() -> None:
    kernel = "model.0.conv.weight"
    for arm, nhwc in (("nchw", False), ("unpatched", True)):
        weight = Step(StepJob(**TINY), arm).model.get_parameter(kernel)
        assert weight.is_contiguous(memory_format=torch.channels_last) == nhwc
    for amp, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        weight = Prediction(PredictJob(**TINY, amp=amp), "auto").network.model.get_parameter(kernel)
        assert weight.dtype is dtype
        assert weight.is_contiguous()
