"""Attention as one autograd node: where a backend fails, forward or backward, another one computes the result.

The node of packed tensors calls the backend's own backward operator: a graph of autograd inside, and a node for every
change of layout around it, took the host twice as long. Fused operators have no second derivative: under
`create_graph=True` or a transform the gradient is computed in plain operators, see `derivatives.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import sparse
from ..backends.calls import Inputs
from ..backends.registry import BACKENDS, label
from ..backends.spec import AttentionSpec
from ..dispatch.dispatcher import Dispatcher
from ..machine import detect
from ..utils.errors import is_out_of_memory
from .derivatives import differentiable_backward, is_batched, needs_rules


class FlashKernelError(Exception):
    """A backend asked for by name raised. Not a RuntimeError, which the trainer might take for out of memory.

    Examples:
        >>> try:
        ...     results = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash").predict("bus.jpg", device="cpu")
        ... except FlashKernelError as error:  # under `auto` another backend would have taken over
        ...     print(error)
    """


class AttentionCall(NamedTuple):
    """What a block wants computed; the choice is `auto` or the name that was asked for, the layer is for messages."""

    spec: AttentionSpec
    backend: str
    layer: str
    choice: str
    dispatcher: Dispatcher


def attend_packed(qkv: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Run a backend on the output of a 1x1 convolution; if its forward or backward raises, another one runs.

    An error of torch's kernels in their backward looks to Ultralytics' trainer like a lack of memory, and halves the
    batch. Here unfused attention computes the gradient again, and the backend is not used from then on; a backend asked
    for by name raises FlashKernelError.

    Args:
        qkv: `[images, channels, height, width]`, channels_last or contiguous, packed head by head.
        call: What to compute.

    Returns:
        Attention and v, both `[images, num_heads * head_dim_v, height, width]` in the memory format of `qkv`. Gradients
        reach the backend and `qkv` in the layout that each expects, see `_Relayout`.
    """
    if torch.compiler.is_compiling():
        return _run(qkv, call.spec, call.backend)
    if qkv.requires_grad and torch.is_grad_enabled() and BACKENDS[call.backend].fused:
        layout = memory_format(qkv)
        if not qkv.is_contiguous(memory_format=torch.channels_last):
            qkv = _relayout(qkv, torch.channels_last, back=layout)  # outside of the node, which thus keeps one copy
        return _PackedAttention.apply(qkv, call, layout)
    return _run_guarded(call, qkv.device, lambda call: _run(qkv, call.spec, call.backend))[1]


def attend_separate(inputs: Inputs, call: AttentionCall) -> Tensor:
    """Run a backend on separate tensors, as `attend_packed` does on packed ones.

    Returns:
        Attention, contiguous `[batch, seq_len_q, num_heads, head_dim]`.

    Raises:
        FlashKernelError: The backend raised, and was asked for by name.
    """
    if torch.compiler.is_compiling():
        return _operator(call.backend, call.spec)(inputs, call.spec)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)

    def run(call: AttentionCall) -> Any:
        if needed and BACKENDS[call.backend].fused:
            return _SeparateAttention.apply(call, *inputs)
        return _operator(call.backend, call.spec)(inputs, call.spec)

    return _run_guarded(call, inputs[0].device, run)[1]


def give_up(call: AttentionCall, error: Exception, where: str = "") -> None:
    """Do not use the backend of a call, which raised, from now on, so that another one may run.

    Raises:
        Exception: The error itself where memory was short: the trainer halves the batch.
        FlashKernelError: The backend was asked for by name.
    """
    spec, backend, layer, choice, dispatcher = call
    if is_out_of_memory(error):
        raise error
    if choice != "auto":
        raise FlashKernelError(
            f"{label(backend)} raised in {where}{layer or 'the block'} ({spec}): {error}. "
            f"flash.backend=auto, or flash.layers={layer}:stock, avoids it."
        ) from error
    dispatcher.fail(layer, spec, backend, error)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that a convolution of `x` gives: by the order of strides, since PSA's input is a slice of channels."""
    nhwc = x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    return torch.channels_last if nhwc else torch.contiguous_format


def _run_guarded(
    call: AttentionCall, device: torch.device, run: Callable[[AttentionCall], Any]
) -> tuple[AttentionCall, Any]:
    """The call that ran and what it gave; when `auto` chose a backend that raises, the next one runs instead."""
    while True:
        try:
            return call, run(call)
        except Exception as error:
            if call.choice == "auto" and call.backend == "sdpa_math":  # there is nothing behind it
                raise
            give_up(call, error)
        following = call.dispatcher.select(call.spec, "auto", detect(device)).backend
        able = following not in (call.backend, "stock")  # the forward of stock begins before these tensors
        call = call._replace(backend=following if able else "sdpa_math")


def _operator(backend: str, spec: AttentionSpec) -> Callable[..., Any]:
    """What the backend calls for tensors that lie as in `spec`; never of `stock`, whose forward begins before them."""
    found: Any = BACKENDS[backend].separate if spec.layout == "separate" else BACKENDS[backend].forward
    return found


# Packed tensors -------------------------------------------------------------------------------------------------------
class _PackedAttention(torch.autograd.Function):
    """Layouts, backend and errors in one node."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, call: AttentionCall, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        ctx.layout = layout
        packed = _pack(qkv, call.spec)
        ctx.call, (ctx.inner, (out, image, *kept)) = _run_guarded(call, qkv.device, lambda call: _forward(packed, call))
        ctx.save_for_backward(qkv, *(t for t in kept if not isinstance(t, int)))
        return _unpack(out, qkv).contiguous(memory_format=layout), _unpack(image, qkv).contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        qkv, *kept = ctx.saved_tensors
        spec, backend = ctx.call.spec, ctx.call.backend
        inner, ctx.inner = ctx.inner, None  # its memory is freed now, and not with the loss
        if needs_rules(*grads):
            return _differentiable_backward(qkv, grads, spec), None, None
        packed = _pack(qkv, spec)
        dout, dimage = (_pack(grad.contiguous(memory_format=torch.channels_last), spec) for grad in grads)
        differentiate = BACKENDS[backend].backward
        try:
            if differentiate is None:  # a second backward of a retained graph builds the inner graph again
                grad = _gradient(inner or _graph_of(packed, spec, backend), dout, dimage)
            else:
                grad = differentiate(packed, kept, dout, dimage, spec)
        except Exception as error:
            give_up(ctx.call, error, "the backward of ")
            grad = _gradient(_graph_of(packed, spec, "sdpa_math"), dout, dimage)
        return _unpack(grad, grads[0]).contiguous(memory_format=ctx.layout), None, None


def _differentiable_backward(qkv: Tensor, grads: tuple[Tensor, ...], spec: AttentionSpec) -> Tensor:
    """The gradient of the image `qkv`, without memory formats, which `vmap` does not support."""
    packed, dout, through_image = (_pack(t, spec).transpose(1, 2) for t in (qkv, *grads))
    q, k, v = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    mask = None
    if spec.window is not None:
        mask = sparse.unseen(spec, qkv.device).repeat(spec.batch // spec.area, 1, 1)[:, None]
    dq, dk, dv = differentiable_backward(q, k, v, dout, spec.head_dim**-0.5, mask)
    both = torch.cat((dq, dk, dv + through_image), dim=-1).transpose(1, 2).contiguous()
    return _unpack(both, qkv)


_Inner = tuple[Tensor, tuple[Tensor, Tensor]]  # the packed tensor, and attention and v that a graph leads to from it


def _forward(packed: Tensor, call: AttentionCall) -> tuple[_Inner | None, tuple[Any, ...]]:
    """What the backend gives; and its own graph, where autograd has to differentiate it."""
    if BACKENDS[call.backend].backward is not None:
        return None, _operator(call.backend, call.spec)(packed, call.spec)
    leaf, results = _graph_of(packed, call.spec, call.backend)
    return (leaf, results), tuple(t.detach() for t in results)


def _graph_of(packed: Tensor, spec: AttentionSpec, backend: str) -> _Inner:
    with torch.enable_grad():
        leaf = packed.detach().requires_grad_()
        out, image, *_ = _operator(backend, spec)(leaf, spec)
    return leaf, (out, image)


def _gradient(inner: _Inner, dout: Tensor, dimage: Tensor) -> Tensor:
    """The gradient of the packed tensor, through a graph of its own."""
    leaf, results = inner
    return torch.autograd.grad(results, leaf, (dout, dimage))[0].contiguous()


def _run(qkv: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, Tensor]:
    """Layouts and backend in operators that torch differentiates, compiles and transforms."""
    layout = memory_format(qkv)
    packed = _pack(_relayout(qkv, torch.channels_last, back=layout), spec)
    out, image, *_ = _operator(backend, spec)(packed, spec)
    out, image = (_relayout(_unpack(t, qkv), layout, back=torch.channels_last) for t in (out, image))
    return out, image


def _pack(image: Tensor, spec: AttentionSpec) -> Tensor:
    """`[images, channels, height, width]` in channels_last -> `[groups, seq_len, num_heads, channels of a head]`."""
    return image.permute(0, 2, 3, 1).reshape(spec.batch, spec.seq_len_q, spec.num_heads, -1)


def _unpack(t: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_pack`, for the images of another tensor."""
    images, _, height, width = like.shape
    return t.view(images, height, width, -1).permute(0, 3, 1, 2)


def _relayout(x: Tensor, layout: torch.memory_format, back: torch.memory_format) -> Tensor:
    """`x` in a memory format, its gradient in another; copied only if needed."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Relayout.apply(x, layout, back)
    return x.contiguous(memory_format=layout)


class _Relayout(torch.autograd.Function):
    """Changes a tensor's memory format, and in the backward that of its gradient.

    The CPU's flash backward reads garbage from a gradient whose last stride is not 1 (pytorch pull 187506), and
    BatchNorm's CPU backward in torch 2.14.1 is wrong for a gradient that lies differently from its output.
    """

    @staticmethod
    def forward(x: Tensor, layout: torch.memory_format, back: torch.memory_format) -> Tensor:
        return x.contiguous(memory_format=layout).view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.back = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not torch.compiler.is_compiling() and is_batched(grad):  # `vmap` supports no memory format
            return grad, None, None
        return grad.contiguous(memory_format=ctx.back), None, None


# Separate tensors -----------------------------------------------------------------------------------------------------
class _SeparateAttention(torch.autograd.Function):
    """The backend's own graph, kept inside of one node."""

    @staticmethod
    def forward(ctx: Any, call: AttentionCall, *inputs: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.inner = _graph(inputs, call.spec, call.backend)
        return ctx.inner[1].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        spec, backend = ctx.call.spec, ctx.call.backend
        if needs_rules(grad):
            q, k, v, dout = (t.transpose(1, 2) for t in (*inputs[:3], grad))
            grads = differentiable_backward(q, k, v, dout, spec.head_dim**-0.5, inputs[3])
            return None, *(t.transpose(1, 2) for t in grads), None
        inner, ctx.inner = ctx.inner, None  # its memory is freed now, and not with the loss
        grad = grad.contiguous()  # the CPU's flash backward reads garbage where the last stride is not 1
        try:  # a second backward of a retained graph builds the inner graph again
            leaves, out = inner or _graph(inputs, spec, backend)
            return None, *torch.autograd.grad(out, leaves, grad), None
        except Exception as error:
            give_up(ctx.call, error, "the backward of ")
        leaves, out = _graph(inputs, spec, "sdpa_math")
        return None, *torch.autograd.grad(out, leaves, grad), None


def _graph(inputs: tuple[Any, ...], spec: AttentionSpec, backend: str) -> tuple[tuple[Tensor, ...], Tensor]:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
        return (q, k, v), _operator(backend, spec)((q, k, v, inputs[3]), spec)
