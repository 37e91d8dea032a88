"""`nn.MultiheadAttention` as `autotune` runs it: the real module, whose projections multiply by the identity.

They give their input, exactly, so that output and gradients are those of attention alone. Their time is in what is
measured, of stock and of every backend alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.registry import BACKENDS
from ..backends.separate import Inputs
from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..patching.class_swap import become
from ..patching.multihead import FlashMultiheadAttention, denoising_mask
from ..utils.numerics import Results, reference


class MultiheadArm:
    """One backend in a module of its own."""

    def __init__(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        """Make the module for problems like `spec`, of any number of groups."""
        self.spec, self.device = spec, device
        channels = spec.num_heads * spec.head_dim
        with torch.device("meta"):  # takes no random number
            block = nn.MultiheadAttention(channels, spec.num_heads, batch_first=True)
        same = torch.eye(channels, device=device, dtype=spec.dtype)
        nothing = torch.zeros(3 * channels, device=device, dtype=spec.dtype)
        block.in_proj_weight, block.in_proj_bias = nn.Parameter(same.repeat(3, 1)), nn.Parameter(nothing)
        block.out_proj.weight, block.out_proj.bias = nn.Parameter(same), nn.Parameter(nothing[:channels].clone())
        block.requires_grad_(spec.training)  # it decides how torch multiplies, though their gradients are not asked for
        if BACKENDS[backend].separate is not None:
            dispatcher = Dispatcher(FlashConfig(backend=backend))
            become(block, FlashMultiheadAttention, layer="", choice=backend, dispatcher=dispatcher)
        self.block = block.train(spec.training)

    def call(self, given: Inputs, upstream: Tensor) -> Results:
        """`(output,)`, or `(output, gradients of queries, keys and values)` when the spec trains.

        Args:
            given: Queries, keys and values `[groups, tokens, channels]`, and the mask.
            upstream: Gradient of the output, of the same shape.
        """
        spec = self.spec
        q, k, v = (t.detach().requires_grad_(spec.training) for t in given[:3] if t is not None)
        half = spec.dtype in (torch.float16, torch.bfloat16)
        amp = torch.autocast(self.device.type, dtype=spec.dtype if half else None, enabled=half)
        with amp, torch.set_grad_enabled(spec.training):
            out = self.block(q, k, v, attn_mask=given[3])[0]
        if not spec.training:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype)))


def inputs(spec: AttentionSpec, groups: int, device: torch.device) -> tuple[Inputs, Tensor]:
    """Random queries, keys and values with a mask like RT-DETR's, and a random gradient of the output."""
    source = torch.Generator(device).manual_seed(0)  # its own: the global one stays as it is
    size = (4, groups, spec.seq_len_k, spec.num_heads * spec.head_dim)
    q, k, v, upstream = torch.randn(size, device=device, dtype=spec.dtype, generator=source)
    tokens = spec.seq_len_k
    mask = denoising_mask(tokens, 2 * tokens // 5, max(1, tokens // 20), device) if spec.mask else None
    return (q, k, v, mask), upstream


def exact(spec: AttentionSpec, given: Inputs, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, and the gradients of queries, keys and values, in high precision."""
    packed = torch.cat([_heads(spec, t) for t in given[:3] if t is not None], dim=-1)
    dout = _heads(spec, upstream)
    out, grad = reference(packed, dout, torch.zeros_like(dout), head_dim=spec.head_dim, dtype=dtype, mask=given[3])
    return [out, *grad.chunk(3, dim=-1)]


def parts(spec: AttentionSpec, results: Results) -> list[Tensor]:
    """Results of an arm in the shape of `exact`.

    Raises:
        ArithmeticError: A result has another shape than it should have.
    """
    for t in results:
        if t.ndim != 3 or t.shape[1:] != (spec.seq_len_q, spec.num_heads * spec.head_dim):
            raise ArithmeticError(
                f"a result has shape {list(t.shape)} where {spec.seq_len_q} tokens of "
                f"{spec.num_heads * spec.head_dim} channels were expected"
            )
    return [_heads(spec, t) for t in results]


def _heads(spec: AttentionSpec, t: Tensor) -> Tensor:
    return t.unflatten(-1, (spec.num_heads, -1))
