"""A backend whose backward may fail: an error there is answered as one in the forward is, by another backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import BACKENDS, AttentionSpec
from .runtime import Runtime


class FlashKernelError(Exception):
    """A backend asked for by name raised. Not a RuntimeError, which the trainer might take for out of memory."""


def attend(
    packed: Tensor, spec: AttentionSpec, backend: str, *, layer: str, choice: str, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Run a backend, and its backward under guard.

    Torch's kernels raise in their backward what Ultralytics' trainer takes for out of memory, and halves the batch.
    Here the gradient is computed again by unfused attention, and the backend is left out from then on; if it was asked
    for by name, FlashKernelError says so.

    Args:
        packed: Queries, keys and values, as for `Backend.run`.
        spec: The problem.
        backend: Its name.
        layer: Name of the layer, for messages.
        choice: `auto`, or the name that was asked for.
        runtime: Told of a failure.

    Returns:
        As `Backend.run`.
    """
    plain = not (packed.requires_grad and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active()
    if plain or not BACKENDS[backend].fused:
        return run(packed, spec, backend)
    out, image = _Guarded.apply(packed, spec, backend, layer, choice, runtime)
    return out, image


def run(packed: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, Tensor]:
    """Run a backend as it is, or, for `stock`, whose forward begins before the packed tensor, unfused attention."""
    function = BACKENDS[backend].run or BACKENDS["sdpa_math"].run
    assert function is not None
    return function(packed, spec)


def refuse(layer: str, spec: AttentionSpec, backend: str, error: Exception, where: str = "") -> FlashKernelError:
    """The error of a backend that was asked for by name."""
    return FlashKernelError(
        f"{backend} raised in {where}{layer or 'the block'} ({spec}): {error}. "
        f"flash.backend=auto, or flash.layers={layer}:stock, avoids it."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch would help: such errors are the trainer's to answer."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower() or "ALLOC_FAILED" in text


class _Guarded(torch.autograd.Function):
    """The backend's own graph, kept inside of one node."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, spec: AttentionSpec, backend: str, layer: str, choice: str, runtime: Runtime
    ) -> tuple[Tensor, ...]:
        ctx.job = spec, backend, layer, choice, runtime
        ctx.save_for_backward(packed)
        ctx.inner = _graph(packed, spec, backend)
        return tuple(t.detach() for t in ctx.inner[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        spec, backend, layer, choice, runtime = ctx.job
        inner, ctx.inner = ctx.inner, None  # what it holds is freed now, and not when the loss is
        try:  # a second backward of a retained graph builds it once more
            leaf, results = inner or _graph(packed, spec, backend)
            return *torch.autograd.grad(results, leaf, grads), *[None] * 5
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if choice != "auto":
                raise refuse(layer, spec, backend, error, "the backward of ") from error
            runtime.fail(layer, spec, backend, error)
        leaf, results = _graph(packed, spec, "sdpa_math")
        return *torch.autograd.grad(results, leaf, grads), *[None] * 5


def _graph(packed: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        leaf = packed.detach().requires_grad_()
        return leaf, run(leaf, spec, backend)
