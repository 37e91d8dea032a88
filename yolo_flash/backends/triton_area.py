"""Our own kernel, which reads the packed output of one convolution in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import area, operators
from ..machine import Machine, dotted, release
from ..utils.compiler import LEAST_TRITON
from .backend import Backend, always
from .conditions import HALF, capability, fits
from .spec import AttentionSpec


def limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """NVIDIA cards from Ampere on, and a Triton that compiles for them."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from capability(machine, (8, 0))
    found = machine.packages.get("triton", "none")
    if not found[:1].isdigit():
        yield f"needs triton >= {dotted(LEAST_TRITON)}, its import gave {found}"
    elif release(found) < LEAST_TRITON:
        yield f"needs triton >= {dotted(LEAST_TRITON)}, found {found}"
    yield from fits(spec, machine, HALF, area.HEAD_DIM_MAX)


def forward(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Attention, v, and what `backward` needs."""
    if spec.training and not torch.compiler.is_compiling():
        area.try_backward(packed, spec.head_dim)
    out, image, lse = operators.call("area_attention", packed, spec.head_dim)
    return out, image, out, lse


def backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `forward`."""
    return operators.call("area_attention_backward", packed, *kept, dout, dv, spec.head_dim)


TRITON_AREA = Backend(
    "triton_area", limits, forward, always, ("yolo_flash::area_attention",), backward, color="#d55e00"
)
