"""On a CUDA device: RT-DETR's attention is as exact as stock, with and without a mask, and a run executes it fused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import RTDETR
from ultralytics.nn.modules.transformer import AIFI, TransformerLayer
from ultralytics.utils import ASSETS

from tests.counting import AttentionCalls
from tests.patching.test_multihead import errors, patched, plain, randomise
from tests.patching.test_multihead import run as run_module
from yolo_flash import AttentionSpec, BackendNotSupportedError, patch_model, plan
from yolo_flash.machine import detect
from yolo_flash.patching.multihead import FlashMultiheadAttention, denoising_mask
from yolo_flash.patching.patch import targets
from yolo_flash.planning import autotune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS = [1, 13, 64, 192, 300, 498, 500]  # 192 and 64: the rest for which cuDNN's backward with a mask was NaN


class Masked(nn.Module):
    """The decoder's self-attention: three different tensors, transposed, and a mask."""

    def __init__(self, channels: int, heads: int, mask: Tensor | None) -> None:
        super().__init__()
        self.layer = TransformerLayer(channels, heads)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q = (x + 1).transpose(0, 1)
        out = self.layer.ma(q, (x + 1).transpose(0, 1), x.transpose(0, 1), attn_mask=self.mask)[0]
        return x + out.transpose(0, 1)


def compare(module: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> None:
    """Output and gradients of ours and of stock against float64, under autocast as Ultralytics trains."""
    module, x = randomise(module).cuda(), x.cuda()
    weight = torch.randn_like(x)
    truth = run_module(copy.deepcopy(module).double(), plain, x.double(), weight.double())
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
        stock = run_module(module, plain, x, weight)
        with AttentionCalls() as calls:
            ours = run_module(patched(module, backend), plain, x, weight)
    assert calls.forward == calls.backward == {backend: 1}
    limits = errors(stock, truth)
    rounding = torch.finfo(dtype).eps * (8 if dtype is torch.float32 else 1)  # float32 sums are tiled in another way
    for name, found in errors(ours, truth).items():
        assert found <= 2 * limits[name] + rounding, (name, found, limits[name])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_as_exact_as_in_stock(dtype: str, tokens: int) -> None:
    """Numbers of keys that 8 and 16 do not divide: the bias that the kernel reads has padded rows."""
    for batch, channels in ((2, 256), (1, 384)):
        mask = denoising_mask(tokens, 2 * tokens // 5, max(1, tokens // 20), GPU)
        compare(Masked(channels, 8, mask), torch.randn(batch, tokens, channels), DTYPES[dtype], "sdpa_efficient")


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in ("sdpa_flash", "sdpa_cudnn") for dtype in ("float16", "bfloat16")]
    + [("sdpa_efficient", dtype) for dtype in DTYPES],
)
def test_without_a_mask_every_backend_is_as_exact_as_stock(backend: str, dtype: str) -> None:
    for tokens in (13, 300):
        compare(Masked(256, 8, None), torch.randn(2, tokens, 256), DTYPES[dtype], backend)
    for channels, heads in ((256, 8), (384, 8)):
        compare(AIFI(channels, 512, heads), torch.randn(2, channels, 20, 20), DTYPES[dtype], backend)


def test_a_masked_key_is_not_seen() -> None:
    module = randomise(TransformerLayer(256, 8)).cuda().half()
    attention = patched(module, "sdpa_efficient").ma
    mask = denoising_mask(500, 200, 20, GPU)
    x = torch.randn(500, 2, 256, device=GPU, dtype=torch.float16)
    moved = x.clone()
    moved[150] += 1  # a denoising query, seen by those of its group alone
    with torch.no_grad():
        before, after = (attention(x, y, y, attn_mask=mask)[0] for y in (x, moved))
    changed = (after - before).abs().amax(dim=(1, 2)) > 0
    assert torch.equal(changed.nonzero().flatten().cpu(), torch.arange(140, 160))


def test_a_mask_refuses_flash_and_cudnn_with_numbers() -> None:
    module = Masked(256, 8, denoising_mask(40, 20, 5, GPU)).cuda().half()
    x = torch.randn(2, 40, 256, device=GPU, dtype=torch.float16)
    for backend in ("sdpa_flash", "sdpa_cudnn"):
        with pytest.raises(BackendNotSupportedError, match="40 queries x 40 keys are masked"):
            patched(module, backend)(x)


@pytest.mark.measures
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "predict"])
def test_every_backend_that_can_is_exact_and_timed(mask: bool, training: bool) -> None:
    spec = AttentionSpec(4, 8, 500, 500, 32, 32, torch.float16, "separate", mask=mask, training=training)
    names = autotune.candidates(spec, detect(GPU))
    trials = autotune.judge(spec, GPU, names)
    assert {"stock", "sdpa_efficient"} <= set(trials)
    assert ("sdpa_flash" in trials) == (not mask and torch.cuda.get_device_capability() >= (8, 0))
    assert not {name: trial.why_not for name, trial in trials.items() if trial.why_not}
    assert all(trial.ms is not None for trial in trials.values())


@pytest.mark.slow
@pytest.mark.parametrize("amp", [True, False], ids=["fp16", "fp32"])
def test_a_run_executes_the_kernels_of_its_plan(amp: bool, tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(RTDETR("rtdetr-resnet50.yaml"))
    fused = {row.decision.backend for row in plan(model, imgsz=128, batch=2, device=0, amp=amp) if row.mode == "train"}
    assert fused <= {"sdpa_flash", "sdpa_efficient"}
    model.train(**{**tiny_args, "device": 0, "amp": amp, "imgsz": 128})
    lines = (Path(model.trainer.save_dir) / "flash.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    planned = [row["backend"] for row in rows if row["event"] == "plan" and row["mode"] == "train"]
    assert len(planned) == 7
    assert planned.count("sdpa_efficient") >= 6  # the decoder has a mask
    counts = next(row for row in rows if row["event"] == "kernels")["counts"]
    calls = {
        name: n for name, n in counts.items() if name.startswith("aten::_scaled_dot_product") and "back" not in name
    }
    backward = sum(
        n for name, n in counts.items() if name.startswith("aten::_scaled_dot") and name.endswith("_backward")
    )
    assert sum(calls.values()) == backward == 7
    assert calls["aten::_scaled_dot_product_efficient_attention"] >= 6
    assert not any("Please report" in line or "failed" in line for line in log)
    assert all(type(block) is FlashMultiheadAttention for block in targets(model.model).values())
    with AttentionCalls() as seen:
        model.predict(ASSETS / "bus.jpg", imgsz=128, device=0, verbose=False)
    assert sum(seen.forward.values()) >= 7
