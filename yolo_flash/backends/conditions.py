"""Conditions that backends share, each in sentences with numbers: what was needed, and what was found."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..machine import Machine, dotted
from .spec import AttentionSpec, dtype_name

HALF = torch.float16, torch.bfloat16


def packed_mask(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """No mask on packed tensors."""
    if spec.mask and spec.layout != "separate":
        yield "takes a mask with separate queries, keys and values only, the tensors are packed"


def fits(spec: AttentionSpec, machine: Machine, dtypes: tuple[torch.dtype, ...], head_dim_max: int) -> Iterator[str]:
    """Among the dtypes of a kernel, within its largest head_dim, and no mask on packed tensors."""
    yield from packed_mask(spec, machine)
    if spec.dtype not in dtypes:
        yield f"needs {' or '.join(map(dtype_name, dtypes))}, the tensors are {dtype_name(spec.dtype)}"
    if (largest := max(spec.head_dim, spec.head_dim_v)) > head_dim_max:
        yield f"needs head_dim <= {head_dim_max}, the layer has {largest}"


def capability(machine: Machine, lowest: tuple[int, int]) -> Iterator[str]:
    """An NVIDIA card of a compute capability; other devices have none, and pass."""
    if machine.capability is not None and machine.capability < lowest:
        yield f"needs compute capability >= {dotted(lowest)}, {machine.name} has {dotted(machine.capability)}"


def fa4_gradient(head_dim: int, spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """No training on Hopper in which FlashAttention 4 would give a wrong gradient of queries, without an error.

    Its backward writes that gradient in rows of head_dim rounded up to 16 and reads it in rows of head_dim rounded up
    to 32 (`flash_bwd_sm90.py` and `interface.py` of flash-attn-4 4.0.0b36); above 128 both round up to 64.
    """
    hopper = machine.capability is not None and machine.capability[0] == 9
    if spec.training and hopper and head_dim <= 128 and -(-head_dim // 16) % 2:
        yield (
            f"its gradient of queries is wrong on Hopper for head_dim {head_dim}, without an error (flash-attention "
            f"pull request 2896, open)"
        )
