"""What each backend calls for separate queries, keys and values, with or without a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packed import flash_for_cpu
from .spec import AttentionSpec

aten = torch.ops.aten

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values `[batch, seq_len, num_heads, channels]`, of any strides but unit last, and a bool mask
`[seq_len_q, seq_len_k]` that is True where a key is not seen, or None."""


def _attend(
    inputs: Inputs, spec: AttentionSpec, multiple: int, op: Callable[..., Any], *args: object, **keywords: object
) -> Tensor:
    """Call an aten operator on views `[batch, num_heads, seq_len, head_dim]`: what `Backend.separate` promises.

    Where `multiple` does not divide head_dim, the operator gets copies padded with zero channels, which change no score
    and are cut off again.
    """
    missing = -spec.head_dim % multiple
    q, k, v = ((pad(t, (0, missing)) if missing else t).transpose(1, 2) for t in inputs[:3] if t is not None)
    out: Tensor = op(q, k, v, *args, scale=spec.head_dim**-0.5, **keywords)[0]
    return out.transpose(1, 2)[..., : spec.head_dim].contiguous()


def _bias(mask: Tensor | None, spec: AttentionSpec) -> Tensor | None:
    """What a mask adds to the scores, `[batch, num_heads, seq_len_q, seq_len_k]`: nothing, or minus infinity.

    Each row begins at a multiple of 16 elements, since memory-efficient attention reads rows in vectors:
    `scaled_dot_product_attention` would align them, the aten operator does not.
    """
    if mask is None:
        return None
    queries, keys = mask.shape
    bias = mask.new_zeros((queries, keys + -keys % 16), dtype=spec.dtype)[:, :keys]
    return bias.masked_fill_(mask, float("-inf")).expand(spec.batch, spec.num_heads, queries, keys)


def math(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Torch's unfused attention."""
    return _attend(inputs, spec, 1, aten._scaled_dot_product_attention_math, _bias(inputs[3], spec))


def flash(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """FlashAttention."""
    if inputs[0].device.type == "cpu":
        return _attend(inputs, spec, 1, flash_for_cpu, attn_mask=_bias(inputs[3], spec))
    return _attend(inputs, spec, 8, aten._scaled_dot_product_flash_attention)


def efficient(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Memory-efficient attention."""
    operator = aten._scaled_dot_product_efficient_attention
    return _attend(inputs, spec, 8, operator, _bias(inputs[3], spec), spec.training)


def cudnn(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Attention of cuDNN."""
    return _attend(inputs, spec, 8, aten._scaled_dot_product_cudnn_attention, None, spec.training)
