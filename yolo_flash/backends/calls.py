"""How backends call operators of attention: views and copies of what they are given, and gradients put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import AttentionSpec

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values `[batch, seq_len, num_heads, channels]`, of any strides but unit last, and a bool mask
`[seq_len_q, seq_len_k]` that is True where a key is not seen, or None."""


def call_packed(
    packed: Tensor, spec: AttentionSpec, dim_qk: int, dim_v: int, op: Callable[..., tuple[Any, ...]], *args: object
) -> tuple[Any, ...]:
    """Call an aten operator on the packed tensor; returns as `Backend.forward`, with what `packed_gradient` needs kept.

    The operator gets views `[batch, num_heads, seq_len, dim]` of the packed tensor, or, where it needs other head dims,
    copies padded with zero channels up to `dim_qk` and `dim_v`. The zeros change no score, their outputs are cut off,
    and the scale is that of the true head_dim.
    """
    if dim_qk > spec.head_dim:
        both, v = packed.split([2 * spec.head_dim, spec.head_dim_v], dim=-1)
        q, k = widen(both.unflatten(-1, (2, spec.head_dim)), dim_qk).unbind(-2)
    else:
        q, k, v = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    image, v = v.contiguous(), widen(v, dim_v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, *rest = op(q, k, v, *args, scale=spec.head_dim**-0.5)
    return narrow(out, spec.head_dim_v).contiguous(), image, q, k, v, out, *rest


def packed_gradient(
    kept: Sequence[Any],
    dout: Tensor,
    dv: Tensor,
    spec: AttentionSpec,
    op: Callable[..., tuple[Any, ...]],
    *args: object,
) -> Tensor:
    """The gradient of the packed tensor, by the aten operator that autograd would call, without a graph."""
    q, k, v, out, *_ = kept
    dout = widen(dout, out.shape[-1])
    grads = op(dout.transpose(1, 2), q, k, v, *args, scale=spec.head_dim**-0.5)
    dq, dk, through_scores = map(narrow, grads, (spec.head_dim, spec.head_dim, spec.head_dim_v))
    return torch.cat((dq, dk, through_scores + dv), dim=-1)


def widen(t: Tensor, dim: int) -> Tensor:
    """`t`, padded with zero channels up to `dim`."""
    return t if t.shape[-1] == dim else torch.constant_pad_nd(t, (0, dim - t.shape[-1]))


def narrow(t: Tensor, dim: int) -> Tensor:
    """`[batch, num_heads, seq_len, dim or more]` -> `[batch, seq_len, num_heads, dim]`."""
    t = t.transpose(1, 2)
    return t if t.shape[-1] == dim else t[..., :dim]


def multiple_of_8(dim: int) -> int:
    """The least multiple of 8 that is not below a head_dim."""
    return -(-dim // 8) * 8


def call_separate(
    inputs: Inputs, spec: AttentionSpec, multiple: int, op: Callable[..., Any], *args: object, **keywords: object
) -> Tensor:
    """Call an aten operator on views `[batch, num_heads, seq_len, head_dim]`: what `Backend.separate` promises.

    Where `multiple` does not divide head_dim, the operator gets copies padded with zero channels, which change no score
    and are cut off again.
    """
    dim = spec.head_dim + -spec.head_dim % multiple
    q, k, v = (widen(t, dim).transpose(1, 2) for t in inputs[:3])
    out: Tensor = op(q, k, v, *args, scale=spec.head_dim**-0.5, **keywords)[0]
    return out.transpose(1, 2)[..., : spec.head_dim].contiguous()


def bias_of(mask: Tensor | None, spec: AttentionSpec) -> Tensor | None:
    """What a mask adds to the scores, `[batch, num_heads, seq_len_q, seq_len_k]`: nothing, or minus infinity.

    Each row begins at a multiple of 16 elements, since memory-efficient attention reads rows in vectors:
    `scaled_dot_product_attention` would align them, the aten operator does not.
    """
    if mask is None:
        return None
    queries, keys = mask.shape
    bias = mask.new_zeros((queries, keys + -keys % 16), dtype=spec.dtype)[:, :keys]
    return bias.masked_fill_(mask, float("-inf")).expand(spec.batch, spec.num_heads, queries, keys)
