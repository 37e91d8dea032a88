"""On a CUDA device: every backend that can run equals float64, and training, validation and prediction run it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO

from tests.counting import AttentionCalls, in_threads, randomise
from tests.engine.test_telemetry import events
from tests.engine.test_trainer import check_every_phase
from tests.patching.test_blocks import LAYOUTS, MAKE, channels, patched
from tests.patching.test_patch import patched_layers
from yolo_flash import BackendNotSupportedError, FlashConfig, checks, patch_model, plan
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.machine import detect
from yolo_flash.patching.patch import patch_modules, targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "triton_area")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = [(2, 20, 20), (1, 13, 8), (3, 21, 28), (1, 64, 32)]


def run(block: nn.Module, x: Tensor, layout: torch.memory_format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient of a weighted sum, weights in float32, under autocast as Ultralytics trains."""
    block = copy.deepcopy(block).cuda().to(memory_format=layout)
    x = x.cuda().clone(memory_format=layout).requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), device="cuda").view_as(x)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
        out = block(x)
    (out.float() * weight).sum().backward()
    return {"out": out.detach(), "grad x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


def reference(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    double = copy.deepcopy(block).cuda().double()
    x = x.cuda().double().requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), device="cuda").view_as(x).double()
    out = double(x)
    (out * weight).sum().backward()
    return {"out": out.detach(), "grad x": x.grad} | {name: p.grad for name, p in double.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in FUSED for dtype in ("float16", "bfloat16")] + [("sdpa_efficient", "float32")],
)
@pytest.mark.parametrize("kind", MAKE)
def test_blocks_are_as_exact_as_stock(kind: str, backend: str, dtype: str, layout: str) -> None:
    block = randomise(MAKE[kind]())
    for batch, height, width in SIZES[:2] if backend == "triton_area" else SIZES:  # tests/gpu/test_area.py has more
        x = torch.randn(batch, channels(block), height, width)
        ours = patched(block, backend)
        if backend == "sdpa_cudnn" and height * width // getattr(block, "area", 1) % 128 == 64:
            with pytest.raises(BackendNotSupportedError, match="1072"):
                run(ours, x, LAYOUTS[layout], DTYPES[dtype])
            continue
        truth = reference(block, x)
        stock = run(block, x, LAYOUTS[layout], DTYPES[dtype])
        with AttentionCalls() as calls:
            results = run(ours, x, LAYOUTS[layout], DTYPES[dtype])
        assert calls.forward == calls.backward == {backend: 1}
        rounding = torch.finfo(DTYPES[dtype]).eps
        largest = max(float(t.norm()) for name, t in truth.items() if name not in ("out", "grad x"))
        for name, value in results.items():
            scale = float(truth[name].norm()) if name in ("out", "grad x") else largest
            error = float((value.double() - truth[name]).norm()) / scale
            stock_error = float((stock[name].double() - truth[name]).norm()) / scale
            assert error <= 2 * stock_error + rounding, (name, error, stock_error)


@pytest.mark.parametrize("backend", FUSED)
def test_strided_views_are_handed_over_without_copies(backend: str) -> None:
    """Peak memory of a forward in channels_last: the packed tensor, the two results and little more."""
    torch.manual_seed(0)
    block: Any = patched(MAKE["area4"](), backend).cuda().half().to(memory_format=torch.channels_last).eval()
    packed = torch.randn(64, 400, 2, 96, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        spec = block._attention_call(torch.empty(16, 64, 40, 40, device="cuda", dtype=torch.float16)).spec
        run_backend = BACKENDS[backend].run
        run_backend(packed, spec)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run_backend(packed, spec)
        peak = torch.cuda.max_memory_allocated() - before
    size = sum(t.numel() * t.element_size() for t in results)
    assert peak < 1.4 * size  # q, k and v copied would add 1.5


def test_two_threads_with_different_backends() -> None:
    model = randomise(YOLO("yolo12n.yaml").model).cuda().half().eval()
    models = {}
    for name in (*FUSED, "stock"):
        models[name] = copy.deepcopy(model)
        patch_modules(models[name], FlashConfig(backend=name))
    x = torch.rand(1, 3, 128, 128, device="cuda").half()
    counts = in_threads({name: functools.partial(model, x) for name, model in models.items()}, repeats=10)
    assert {name: calls.forward for name, calls in counts.items()} == {
        **{name: {name: 80} for name in FUSED},
        "stock": {},
    }


@pytest.mark.parametrize(
    ("model", "amp"),
    [
        pytest.param("yolo12n.yaml", True, marks=pytest.mark.slow),
        pytest.param("yolo26n.yaml", True, marks=pytest.mark.slow),
        ("tiny", "bf16"),
        ("tiny", False),
    ],
)
def test_training_and_its_validation_run_fused(
    model: str, amp: Any, tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {**tiny_args, "device": 0, "amp": amp, "imgsz": 128}
    decided = check_every_phase(tiny_model if model == "tiny" else model, args, monkeypatch)
    assert not {name for when, name in decided if when in ("train batch", "ema validation")} & {"stock", "sdpa_math"}


@pytest.mark.parametrize("backend", ["stock", "sdpa_math", *FUSED])
def test_each_backend_trains_when_asked_for(backend: str, tiny_model: str, tiny_args: dict[str, Any]) -> None:
    """Area attention of 100 tokens and PSA of 400: at 128 pixels cuDNN refuses the 64 of an area."""
    model = patch_model(YOLO(tiny_model), backend=backend)
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "device": 0, "imgsz": 160})
    layers = len(targets(model.model))
    counts = next(row["counts"] for row in events(model) if row["event"] == "kernels")
    launched = {name: count for name, count in counts.items() if not name.startswith(("aten::", "yolo_flash::"))}
    marks: dict[str, tuple[str, ...]] = {
        "sdpa_flash": ("flash_fwd", "flash_bwd"),
        "sdpa_efficient": ("fmha_cutlassF", "fmha_cutlassB"),
    }
    marks |= {"sdpa_cudnn": ("fprop", "bprop"), "triton_area": ("area_forward", "area_backward_q", "area_backward_kv")}
    for mark in marks.get(backend, ()):  # the kernels themselves, on the device
        assert sum(count for name, count in launched.items() if mark in name) >= layers, launched
    if backend not in FUSED:
        assert not launched
    assert calls.backward == ({backend: 2 * layers} if backend in FUSED else {})
    assert patched_layers(model.model) == layers


def test_an_impossible_backend_raises_before_the_first_step(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")
    with pytest.raises(BackendNotSupportedError, match="needs float16 or bfloat16, the tensors are float32"):
        model.train(**{**tiny_args, "device": 0, "amp": False})


def test_strict_trains_with_the_same_bits_twice(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    weights = []
    for _ in range(2):
        model = patch_model(YOLO(tiny_model), deterministic="strict")
        with AttentionCalls() as calls:
            model.train(**{**tiny_args, "device": 0, "imgsz": 128})
        on_hopper = torch.cuda.get_device_capability() == (9, 0)
        assert set(calls.backward) == ({"triton_area"} if on_hopper else set())
        assert {r.decision.reproducible for r in model.trainer.flash_plan if r.mode == "train"} == {True}
        weights.append(model.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Blocks(nn.ModuleList):
    """Each on its own input: the compiler starts once."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [block(inputs[i]) for i, block in enumerate(self)]


def test_compiles_without_a_graph_break() -> None:
    cases = [("area4", "sdpa_flash"), ("psa", "sdpa_cudnn"), ("psa", "sdpa_efficient"), ("psa", "triton_area")]
    cases += [("area4", "triton_area")]
    blocks = Blocks([patched(randomise(MAKE[kind]()), backend) for kind, backend in cases]).cuda().half().eval()
    blocks = blocks.to(memory_format=torch.channels_last)
    inputs = [torch.randn(2, channels(block), 20, 20, device="cuda").half() for block in blocks]
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(blocks, fullgraph=True)(inputs)
        for found, wanted in zip(compiled, blocks(inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_checks_and_plan_speak_of_this_card() -> None:
    machine = detect(torch.device("cuda", 0))
    facts = checks(0)
    assert machine.capability == torch.cuda.get_device_capability(0)
    assert torch.cuda.get_device_name(0) in facts["device"]
    rows = plan(patch_model(YOLO("yolo12n.yaml")), device="cuda:0")
    assert {row.decision.spec.dtype for row in rows} == {torch.float16}
