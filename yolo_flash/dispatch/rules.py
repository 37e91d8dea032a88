"""Which backend runs where nothing was measured: thresholds of one card."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.spec import AttentionSpec
from ..machine import Machine

RULES_MEASURED_ON = (9, 0)  # the compute capability of the card whose numbers are behind the rules for GPUs
FLASH_ATTN_4_FROM = 4096  # tokens, in training: docs/results/area-h100.md


def rules_for(spec: AttentionSpec, machine: Machine) -> Iterator[tuple[str, str]]:
    """Backends in the order in which `auto` takes them, with the reason; measured in docs/results/rules-*.md."""
    if machine.kind == "cpu":
        yield from _cpu_rules(spec)
    elif machine.kind in ("cuda", "rocm"):
        yield from _gpu_rules(spec, machine)
    yield "stock", f"nothing fused can run on {machine.architecture}"


def _gpu_rules(spec: AttentionSpec, machine: Machine) -> Iterator[tuple[str, str]]:
    padded = spec.head_dim != spec.head_dim_v
    if machine.capability == RULES_MEASURED_ON:
        if spec.training and not spec.deterministic and spec.seq_len_k >= FLASH_ATTN_4_FROM:
            yield "flash_attn_4", f"the fastest backward from {FLASH_ATTN_4_FROM:,} tokens on"
        yield "triton_area", "fused, reads the convolution's output in place"
    if spec.layout == "nchw" and not spec.training:
        # Prediction in NCHW, where torch's fused kernels need a copy of q, k and v: small images do not pay for it.
        least = (30e6 if padded else 4e6) if spec.dtype is torch.float32 else (8e6 if padded else 0)
        if spec.scores < least:
            yield "stock", _too_small(least, machine)
    if padded and spec.training and machine.capability == RULES_MEASURED_ON:
        # In training only, and on the card where it was measured: cuDNN compiles a plan for every new shape.
        yield "sdpa_cudnn", "takes unequal head dims without padding"
    yield "sdpa_flash", "fused, for half precision"
    yield "sdpa_efficient", "fused, with a mask" if spec.mask else "fused, for float32 and for cards older than Ampere"
    yield "triton_area", "fused, with the same bits every time"  # under deterministic=strict, which refuses those above


def _cpu_rules(spec: AttentionSpec) -> Iterator[tuple[str, str]]:
    """Small problems gain nothing: copies to the kernel's layout, and the padding of unequal head dims, cost more."""
    padded = spec.head_dim != spec.head_dim_v
    least = {
        ("nhwc", False): 5e3,
        ("nhwc", True): 6e5,
        ("nchw", False): 4e5,
        ("nchw", True): 6e6,
        ("separate", False): 1e6 if spec.training else 5e3,
    }
    needed = least.get((spec.layout, padded), 0)
    if spec.scores >= needed:
        yield "sdpa_flash", "fused on the CPU"
    else:
        yield "stock", _too_small(needed)


def _too_small(least: float, card: Machine | None = None) -> str:
    if card is None or card.capability == RULES_MEASURED_ON:
        return f"below {least:,.0f} scores fused attention gains nothing here"
    return f"below {least:,.0f} scores fused attention gained nothing on an H100; not measured on this card"
