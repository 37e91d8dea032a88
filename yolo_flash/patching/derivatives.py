"""Gradients of gradients, and transforms of torch, for which fused operators have no rules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether `torch.func` or forward-mode AD is active, for which fused operators lack rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_rules(*grads: Tensor) -> bool:
    """Whether a backward that gets these gradients is itself differentiated (`create_graph=True`) or transformed.

    `is_grads_batched=True` shows only in the gradients, which are then tensors of the legacy `vmap`.
    """
    return torch.is_grad_enabled() or transformed() or any(map(is_batched, grads))


def is_batched(t: Tensor) -> bool:
    """Whether a tensor is batched by `vmap`, the legacy one included."""
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_batchedtensor(t)


def differentiable_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attention in plain operators: exact, to be differentiated any number of times, not fused.

    Args:
        q: Queries `[..., seq_len_q, head_dim]`.
        k: Keys `[..., seq_len_k, head_dim]`.
        v: Values `[..., seq_len_k, head_dim_v]`.
        dout: Gradient of the output, `[..., seq_len_q, head_dim_v]`.
        scale: Of the scores.
        mask: Bool `[..., seq_len_q, seq_len_k]`, True where a key is not seen.

    Returns:
        The gradients of q, k and v, computed in float32 at least and in the dtypes of these.
    """
    dtypes = q.dtype, k.dtype, v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, dout = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v, dout))
        scores = q @ k.transpose(-2, -1) * scale
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        dweights = dout @ v.transpose(-2, -1)
        dscores = weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True)) * scale
        grads = dscores @ k, dscores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ dout
        dq, dk, dv = (grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
    return dq, dk, dv
