"""What each backend calls for the packed output of one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import area, operators
from .spec import AttentionSpec

aten = torch.ops.aten


def _attend(
    packed: Tensor, spec: AttentionSpec, dim_qk: int, dim_v: int, op: Callable[..., tuple[Any, ...]], *args: object
) -> tuple[Any, ...]:
    """Call an aten operator on the packed tensor; returns as `Backend.forward`, with what `_differentiate` needs kept.

    The operator gets views `[batch, num_heads, seq_len, dim]` of the packed tensor, or, where it needs other head dims,
    copies padded with zero channels up to `dim_qk` and `dim_v`. The zeros change no score, their outputs are cut off,
    and the scale is that of the true head_dim.
    """
    if dim_qk > spec.head_dim:
        both, v = packed.split([2 * spec.head_dim, spec.head_dim_v], dim=-1)
        q, k = _widen(both.unflatten(-1, (2, spec.head_dim)), dim_qk).unbind(-2)
    else:
        q, k, v = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    image, v = v.contiguous(), _widen(v, dim_v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, *rest = op(q, k, v, *args, scale=spec.head_dim**-0.5)
    return _narrow(out, spec.head_dim_v).contiguous(), image, q, k, v, out, *rest


def _differentiate(
    kept: Sequence[Any],
    dout: Tensor,
    dv: Tensor,
    spec: AttentionSpec,
    op: Callable[..., tuple[Any, ...]],
    *args: object,
) -> Tensor:
    """The gradient of the packed tensor, by the aten operator that autograd would call, without a graph."""
    q, k, v, out, *_ = kept
    dout = _widen(dout, out.shape[-1])
    grads = op(dout.transpose(1, 2), q, k, v, *args, scale=spec.head_dim**-0.5)
    dq, dk, through_scores = map(_narrow, grads, (spec.head_dim, spec.head_dim, spec.head_dim_v))
    return torch.cat((dq, dk, through_scores + dv), dim=-1)


def _widen(t: Tensor, dim: int) -> Tensor:
    """`t`, padded with zero channels up to `dim`."""
    return t if t.shape[-1] == dim else torch.constant_pad_nd(t, (0, dim - t.shape[-1]))


def _narrow(t: Tensor, dim: int) -> Tensor:
    """`[batch, num_heads, seq_len, dim or more]` -> `[batch, seq_len, num_heads, dim]`."""
    t = t.transpose(1, 2)
    return t if t.shape[-1] == dim else t[..., :dim]


def _multiple_of_8(dim: int) -> int:
    return -(-dim // 8) * 8


def math(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Torch's unfused attention."""
    return _attend(packed, spec, spec.head_dim, spec.head_dim_v, aten._scaled_dot_product_attention_math.default)


def flash(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """FlashAttention."""
    dim = max(spec.head_dim, spec.head_dim_v)  # the kernels know one head_dim for all three
    if packed.device.type == "cpu":
        return _attend(packed, spec, dim, dim, flash_for_cpu)
    dim = _multiple_of_8(dim)
    return _attend(packed, spec, dim, dim, aten._scaled_dot_product_flash_attention.default)


def flash_for_cpu(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The CPU's flash operator, with NaN for scores of NaN over fewer than 16 keys, where torch 2.14 gives 0.

    It takes tensors `[batch, num_heads, seq_len, head_dim]` and the keywords `scale` and `attn_mask`, as the operator
    does, and returns attention and the logarithm of the sum of the weights.
    """
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, **keywords)
    if not torch.compiler.is_compiling() and k.shape[-2] < 16:
        out = out + ((q - q).sum(-1, keepdim=True) + (k - k).sum((-2, -1), keepdim=True))  # 0, or NaN
    return out, lse


def flash_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `flash`."""
    out, lse, *rest = kept[3:]
    if packed.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return _differentiate(kept, dout, dv, spec, op, out, lse, 0.0, False)
    op = aten._scaled_dot_product_flash_attention_backward.default
    starts_q, starts_k, seed, offset, _ = rest
    sizes = spec.seq_len_q, spec.seq_len_k
    return _differentiate(kept, dout, dv, spec, op, out, lse, starts_q, starts_k, *sizes, 0.0, False, seed, offset)


def efficient(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Memory-efficient attention."""
    dims = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    return _attend(packed, spec, *dims, aten._scaled_dot_product_efficient_attention.default, None, spec.training)


def efficient_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `efficient`."""
    out, lse, seed, offset = kept[3:]
    op = aten._scaled_dot_product_efficient_attention_backward.default
    wanted = [True, True, True, False]  # there is no bias
    return _differentiate(kept, dout, dv, spec, op, None, out, lse, seed, offset, 0.0, wanted)


def cudnn(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Attention of cuDNN."""
    dims = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    return _attend(packed, spec, *dims, aten._scaled_dot_product_cudnn_attention.default, None, spec.training)


def cudnn_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `cudnn`."""
    out, lse, starts_q, starts_k, seed, offset, _ = kept[3:]
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    sizes = spec.seq_len_q, spec.seq_len_k
    rest = starts_q, starts_k, *sizes, 0.0, False
    return _differentiate(kept, dout, dv, spec, op, out, lse, seed, offset, None, *rest)


def triton_area(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Our own kernel."""
    if spec.training and not torch.compiler.is_compiling():
        area.try_backward(packed, spec.head_dim)
    out, image, lse = operators.call("area_attention", packed, spec.head_dim)
    return out, image, out, lse


def triton_area_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `triton_area`."""
    return operators.call("area_attention_backward", packed, *kept, dout, dv, spec.head_dim)
