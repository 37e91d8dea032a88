"""Attention on separate queries, keys and values, with or without a mask: what each backend calls, under guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backends import AttentionSpec
from .guard import Job, give_up, needs_rules, written_out

aten = torch.ops.aten

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values `[batch, seq_len, num_heads, channels]`, of any strides but unit last, and a bool mask
`[seq_len_q, seq_len_k]` that is True where a key is not seen, or None."""


# Runs -----------------------------------------------------------------------------------------------------------------
def _attend(
    inputs: Inputs, spec: AttentionSpec, multiple: int, op: Callable[..., Any], *args: object, **keywords: object
) -> Tensor:
    """Call an aten operator on views `[batch, num_heads, seq_len, head_dim]`; the result is `RUNS`'.

    Where `multiple` does not divide head_dim, on copies with zero channels: they change no score, and are cut off.
    """
    missing = -spec.head_dim % multiple
    q, k, v = ((pad(t, (0, missing)) if missing else t).transpose(1, 2) for t in inputs[:3] if t is not None)
    out: Tensor = op(q, k, v, *args, scale=spec.head_dim**-0.5, **keywords)[0]
    return out.transpose(1, 2)[..., : spec.head_dim].contiguous()


def _bias(mask: Tensor | None, spec: AttentionSpec) -> Tensor | None:
    """What a mask adds to the scores, `[batch, num_heads, seq_len_q, seq_len_k]`: nothing, or minus infinity.

    Its rows begin at multiples of 16 elements, since memory-efficient attention reads them in vectors; the operator
    itself does not see to it, `scaled_dot_product_attention` does.
    """
    if mask is None:
        return None
    queries, keys = mask.shape
    bias = mask.new_zeros((queries, keys + -keys % 16), dtype=spec.dtype)[:, :keys]
    return bias.masked_fill_(mask, float("-inf")).expand(spec.batch, spec.num_heads, queries, keys)


def _math(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    return _attend(inputs, spec, 1, aten._scaled_dot_product_attention_math, _bias(inputs[3], spec))


def _flash(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    if inputs[0].device.type == "cpu":
        operator = aten._scaled_dot_product_flash_attention_for_cpu
        return _attend(inputs, spec, 1, operator, attn_mask=_bias(inputs[3], spec))
    return _attend(inputs, spec, 8, aten._scaled_dot_product_flash_attention)


def _efficient(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    operator = aten._scaled_dot_product_efficient_attention
    return _attend(inputs, spec, 8, operator, _bias(inputs[3], spec), spec.training)


def _cudnn(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    return _attend(inputs, spec, 8, aten._scaled_dot_product_cudnn_attention, None, spec.training)


RUNS: dict[str, Callable[[Inputs, AttentionSpec], Tensor]] = {
    "sdpa_math": _math,
    "sdpa_flash": _flash,
    "sdpa_efficient": _efficient,
    "sdpa_cudnn": _cudnn,
}
"""Backend -> its attention, contiguous `[batch, seq_len_q, num_heads, head_dim]`; `Backend.limits` hold here too."""


# Guard ----------------------------------------------------------------------------------------------------------------
def attend(inputs: Inputs, job: Job) -> Tensor:
    """Run a backend of `RUNS`, forward and backward under guard, as `guard.attend` does for packed tensors.

    Args:
        inputs: What to attend to.
        job: What to compute.

    Raises:
        FlashKernelError: The backend raised, and was asked for by name.
    """
    spec, backend = job.spec, job.backend
    if torch.compiler.is_compiling():
        return RUNS[backend](inputs, spec)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    try:
        if not needed or backend == "sdpa_math":
            return RUNS[backend](inputs, spec)
        out: Tensor = _Guarded.apply(job, *inputs)
        return out
    except Exception as error:
        if job.choice == "auto" and backend == "sdpa_math":  # there is nothing behind it
            raise
        give_up(job, error)
    following = job.runtime.decide(spec, "auto", inputs[0].device).backend
    able = following if following in RUNS and following != backend else "sdpa_math"  # stock begins before these tensors
    return attend(inputs, job._replace(backend=able))


class _Guarded(torch.autograd.Function):
    """The backend's own graph, kept inside of one node."""

    @staticmethod
    def forward(ctx: Any, job: Job, *inputs: Tensor | None) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(*inputs)
        ctx.inner = _graph(inputs, job.spec, job.backend)
        result: Tensor = ctx.inner[1].detach()
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        spec, backend = ctx.job.spec, ctx.job.backend
        if needs_rules(grad):
            q, k, v, dout = (t.transpose(1, 2) for t in (*inputs[:3], grad))
            grads = written_out(q, k, v, dout, spec.head_dim**-0.5, inputs[3])
            return None, *(t.transpose(1, 2) for t in grads), None
        inner, ctx.inner = ctx.inner, None  # what it holds is freed now, and not when the loss is
        grad = grad.contiguous()  # the CPU's flash backward reads garbage where the last stride is not 1
        try:  # a second backward of a retained graph builds it once more
            leaves, out = inner or _graph(inputs, spec, backend)
            return None, *torch.autograd.grad(out, leaves, grad), None
        except Exception as error:
            give_up(ctx.job, error, "the backward of ")
        leaves, out = _graph(inputs, spec, "sdpa_math")
        return None, *torch.autograd.grad(out, leaves, grad), None


def _graph(inputs: tuple[Any, ...], spec: AttentionSpec, backend: str) -> tuple[tuple[Tensor, ...], Tensor]:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
        return (q, k, v), RUNS[backend]((q, k, v, inputs[3]), spec)
