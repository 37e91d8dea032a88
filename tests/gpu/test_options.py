"""On a CUDA device: options of `yolo train` whose effect shows only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from tests.counting import LAYERS, AttentionCalls, train_compiled
from tests.engine.test_options import train
from tests.engine.test_telemetry import events, of
from tests.patching.test_patch import patched_layers
from yolo_flash import patch_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def args(tiny_args: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_args, "device": 0, "imgsz": 128}


def check_plan(model: Any) -> set[str]:
    """Every training spec that was met had been planned; the layouts that there were."""
    trainer = model.trainer
    met = {spec for spec, _, _ in trainer.flash_run.dispatcher._decisions if spec.training}
    assert met
    assert met == {row.decision.spec for row in trainer.flash_plan if row.mode == "train"}
    return {spec.layout for spec in met}


@pytest.mark.parametrize(
    ("option", "dtype", "layout"),
    [
        ({"amp": True}, torch.float16, "nhwc"),
        ({"amp": "fp16", "channels_last": False}, torch.float16, "nchw"),
        ({"amp": "bf16", "channels_last": True}, torch.bfloat16, "nhwc"),
        ({"amp": False}, torch.float32, "nhwc"),
        ({"amp": "fp32"}, torch.float32, "nhwc"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_precision_and_layout_that_were_asked_for_are_those_of_plan_and_kernels(
    option: dict[str, Any], dtype: torch.dtype, layout: str, tiny_model: str, args: dict[str, Any]
) -> None:
    backend = "sdpa_efficient" if dtype is torch.float32 else "sdpa_flash"  # flash has no float32
    model, calls = train(tiny_model, {**args, **option}, backend=backend)
    assert check_plan(model) == {layout}
    assert {row.decision.spec.dtype for row in model.trainer.flash_plan if row.mode == "train"} == {dtype}
    assert calls.backward == {backend: LAYERS * 2}


@pytest.mark.parametrize(
    ("option", "steps"),
    [
        ({"multi_scale": 0.5, "epochs": 2}, 4),
        ({"rect": True, "deterministic": False}, 2),
        ({"cache": "ram", "fraction": 0.5, "freeze": [3]}, 1),
        ({"time": 1e-6, "epochs": 9}, 1),  # hours
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_run_is_fused(option: dict[str, Any], steps: int, tiny_model: str, args: dict[str, Any]) -> None:
    model, calls = train(tiny_model, {**args, **option})
    assert calls.backward == {"sdpa_flash": LAYERS * steps}
    assert patched_layers(model.model) == LAYERS


def test_frozen_attention_needs_no_backward(tiny_model: str, args: dict[str, Any]) -> None:
    _, calls = train(tiny_model, {**args, "freeze": 5})
    assert calls.forward["sdpa_flash"] >= LAYERS * 2
    assert not calls.backward


@pytest.mark.slow
def test_compile_breaks_the_graph_where_stock_does_and_runs_the_kernels(tiny_model: str, args: dict[str, Any]) -> None:
    """Area attention alone, since every layer more is compiled; test_gpu compiles blocks of both kinds."""
    described = YAML.load(tiny_model)
    layers = described["backbone"][:4]
    YAML.save(tiny_model, {**described, "backbone": layers, "head": [[[3], 1, "Detect", ["nc"]]]})
    model, graphs, breaks = train_compiled(tiny_model, {**args, "amp": "bf16"})  # whose check needs no weights
    assert patched_layers(model.model) == 2
    assert graphs[0] == graphs[1] > 0
    assert breaks[0] == breaks[1]
    (kernels,) = of(events(model), "kernels")  # of the second step: the first one compiles
    for mark in ("flash_fwd", "flash_bwd"):
        assert sum(count for name, count in kernels["counts"].items() if mark in name) >= 2, kernels


def test_autobatch_fits_the_patched_model_and_says_what_attention_saves(
    tiny_model: str, args: dict[str, Any], log: list[str]
) -> None:
    """With four pictures it takes four."""
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(**{**args, "batch": -1, "imgsz": 640})
    taken = model.trainer.batch_size
    assert calls.backward["sdpa_flash"] >= LAYERS
    (line,) = [line for line in log if "AutoBatch took" in line]
    assert f"took {taken} images a step" in line
    assert "less than with stock attention" in line


def test_quantize_8_is_stock_with_one_line(
    tiny_model: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr("ultralytics.engine.trainer.prepare_qat", lambda model, loader, preprocess: model)
    model = patch_model(YOLO(tiny_model), graphs="auto")
    with AttentionCalls() as calls:
        model.train(**{**args, "quantize": 8})
    assert not calls.forward
    assert len([line for line in log if "yolo-flash:" in line]) == 1


def test_ctrl_c_gives_the_profiler_of_the_device_back(tiny_model: str, args: dict[str, Any]) -> None:
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")

    def press(trainer: Any) -> None:
        raise KeyboardInterrupt

    model.add_callback("on_train_batch_start", press)
    with pytest.raises(KeyboardInterrupt):
        model.train(**args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ones(1000, device="cuda").add_(1)
        torch.cuda.synchronize()
    assert any(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or [])
