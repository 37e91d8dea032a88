"""Inputs on which a careless softmax goes wrong: who is NaN or off on them is refused, the others are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.planning.test_autotune import AREA, CPU, PSA, break_flash
from yolo_flash.backends import sdpa
from yolo_flash.backends.calls import Inputs
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch import trial_cache
from yolo_flash.planning import autotune
from yolo_flash.planning.arms import PackedArm, arm_of
from yolo_flash.planning.probes import hard_probe
from yolo_flash.utils.numerics import reference, relative_error

SEPARATE = AttentionSpec(2, 8, 40, 40, 32, 32, torch.float32, "separate")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


def lowest_score(q: Tensor, k: Tensor) -> float:
    """Of `[groups, tokens, heads, channels]`."""
    return float((q.transpose(1, 2) @ k.transpose(1, 2).mT).detach().min()) * q.shape[-1] ** -0.5


@pytest.mark.parametrize("where", ["output", "gradient"])
@pytest.mark.parametrize("spec", [AREA, PSA, PSA._replace(training=True), SEPARATE], ids=str)
def test_nan_for_strongly_negative_scores_alone_is_refused(
    spec: AttentionSpec, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "gradient" and not spec.training:
        pytest.skip("a prediction has none")

    def spoilt(out: Tensor, low: float) -> Tensor:
        if low > -100:
            return out
        return out * float("nan") if where == "output" else NanGradient.apply(out)

    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, image = BACKENDS["sdpa_math"].run(packed, spec)
        return spoilt(out, lowest_score(*packed.split(spec.head_dim, dim=-1)[:2])), image

    def run_separate(given: Inputs, spec: AttentionSpec) -> Tensor:
        return spoilt(sdpa.separate_flash(given, spec), lowest_score(*given[:2]))

    break_flash(monkeypatch, run)
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], separate=run_separate))
    trials = autotune.judge(spec, CPU, ["stock", "sdpa_flash"])
    assert trials["stock"].ms is not None
    assert trials["sdpa_flash"].ms is None
    assert trials["sdpa_flash"].why_not.startswith(f"wrong: {where} for scores far below 0 is off by nan")


def test_a_dominating_key_whose_neighbours_are_mixed_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum that is cut off at 88, above which exponentials leave float32."""

    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in packed.split([32, 32, packed.shape[-1] - 64], dim=-1))
        weights = (q @ k.mT * 32**-0.5).exp()
        out = (weights / weights.sum(-1, keepdim=True)) @ v
        return out.transpose(1, 2).contiguous(), packed[..., 64:].contiguous()

    break_flash(monkeypatch, run)
    why_not = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])["sdpa_flash"].why_not
    assert "output for one dominating key is off by nan" in why_not
    assert "output for scores far above 0 is off by nan" in why_not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 64, 441])
def test_what_is_careful_is_not_refused(tokens: int, dtype: torch.dtype) -> None:
    for spec in (
        AREA,
        PSA,
        PSA._replace(training=True),
        SEPARATE,
        SEPARATE._replace(mask=True),
    ):
        sized = spec._replace(seq_len_q=tokens, seq_len_k=tokens, dtype=dtype)
        trials: dict[str, Any] = {}
        names = ["stock", "sdpa_math", "sdpa_flash"]
        assert autotune._check(sized, CPU, names, trials) == names, (str(sized), trials)


def test_hard_inputs_are_what_they_are_called() -> None:
    probe = hard_probe(arm_of(AREA._replace(seq_len_q=50, seq_len_k=50), "stock", CPU))
    assert probe is not None
    assert probe.groups == 4  # an image
    packed = probe.given.permute(0, 2, 3, 1).reshape(4, 50, 2, 96)
    q, k, _ = packed.split(32, dim=-1)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * 32**-0.5
    below, one, above, again = scores
    assert below.max() < -110
    assert again.max() < -110
    assert above.min() > 110
    assert (one.argmax(-1) == 25).all()
    assert 90 < one.max(-1).values.mean() < 150


@pytest.mark.parametrize(
    ("tokens", "heads", "groups"), [(400, 2, 3), (441, 12, 1), (1600, 2, 1), (1600, 8, None)], ids=str
)
def test_large_problems_are_held_on_less(tokens: int, heads: int, groups: int | None) -> None:
    spec = AttentionSpec(16, heads, tokens, tokens, 32, 32, torch.float32, "nchw", training=False)
    probe = hard_probe(arm_of(spec, "stock", CPU))
    assert (None if probe is None else probe.groups) == groups


def test_where_stock_is_nan_itself_the_others_are_held_by_what_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = PackedArm(AREA, "stock", CPU).block.forward.__func__

    def forward(self: Any, x: Tensor) -> Tensor:
        out = stock(self, x)
        return out * float("nan") if self.qkv.tensor.abs().max() > 20 else out

    monkeypatch.setattr("ultralytics.nn.modules.block.AAttn.forward", forward)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert trials["sdpa_flash"].ms is not None


def test_the_limit_of_flash_on_the_cpu_is_as_the_documentation_says() -> None:
    """Outputs stay as exact as stock's; gradients take exponentials again, and lose where scores are millions."""
    spec = AttentionSpec(1, 2, 200, 200, 32, 32, torch.float32, "nhwc")
    dout = torch.randn(1, 200, 2, 32)

    def errors(name: str, largest: float) -> tuple[float, float]:
        torch.manual_seed(0)
        packed = torch.randn(1, 200, 2, 96)
        q, k, _ = packed.split(32, dim=-1)
        top = float((q.transpose(1, 2) @ k.transpose(1, 2).mT).abs().max()) * 32**-0.5
        packed[..., :64] *= (largest / top) ** 0.5
        leaf = packed.clone().requires_grad_()
        out = BACKENDS[name].run(leaf, spec)[0]
        (grad,) = torch.autograd.grad(out, leaf, dout)
        wanted, wanted_grad = reference(packed, dout, torch.zeros_like(dout), head_dim=32)
        return relative_error(out.detach(), wanted), relative_error(grad, wanted_grad)

    for largest, gradient in ((1e2, 2e-5), (1e4, 2e-3)):
        assert errors("sdpa_flash", largest)[1] < gradient
    out, grad = errors("sdpa_flash", 5e6)
    assert out < 1e-3
    assert grad > 1e-2  # where this fails, torch has become better: change the sentence in docs/backends.md
    assert errors("sdpa_math", 5e6)[1] < 1e-2
