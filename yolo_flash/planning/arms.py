"""Arms of a trial: one backend each, in a real block of the model, with its inputs and what is exact for them.

Convolutions and projections of the blocks are replaced, so that output and gradients are those of attention alone. What
is timed is attention with all the layout work that the block does around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention

from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..patching.class_swap import become
from ..patching.multihead import denoising_mask
from ..patching.patch import BLOCKS
from ..utils.numerics import Results, reference


def arm_of(spec: AttentionSpec, backend: str, device: torch.device) -> Arm:
    """A backend in the block that poses such problems."""
    return (SeparateArm if spec.layout == "separate" else PackedArm)(spec, backend, device)


def channels(spec: AttentionSpec) -> tuple[int, int]:
    """Of queries, keys and values together, and of the output."""
    return spec.num_heads * (2 * spec.head_dim + spec.head_dim_v), spec.num_heads * spec.head_dim_v


def _patched(block: nn.Module, spec: AttentionSpec, backend: str) -> Any:
    """Make a stock block run a backend, in the mode of the spec."""
    if backend != "stock":
        dispatcher = Dispatcher(FlashConfig(backend=backend))
        become(block, BLOCKS[type(block)], layer="", choice=backend, dispatcher=dispatcher)
    return block.train(spec.training)


def _run(arm: Arm, forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], upstream: Tensor) -> Results:
    """The output of `forward` under the autocast of a spec, and the gradients of `leaves` when the spec trains."""
    spec = arm.spec
    half = spec.dtype in (torch.float16, torch.bfloat16)
    amp = torch.autocast(arm.device.type, dtype=spec.dtype if half else None, enabled=half)
    with amp, torch.set_grad_enabled(spec.training):
        out = forward()
    if not spec.training:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


class _Given(nn.Module):
    """Replaces the first convolution: gives a tensor that was set before."""

    tensor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.tensor


class _Faint(nn.Module):
    """Replaces the positional convolution: v, scaled down to the size of the averages that attention takes of it.

    Unscaled values would hide the errors of attention, in the output and in the gradients.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.factor = tokens**-0.5

    def forward(self, v: Tensor) -> Tensor:
        return v * self.factor


class PackedArm:
    """`AAttn` or `Attention` without its convolutions: the input is the packed tensor that the first one would give.

    Inputs and gradients are images `[images, channels, height, width]` in the memory format of the spec.
    """

    def __init__(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.channels = channels(spec)
        with torch.device("meta"):  # takes no memory and no random number
            block: Any = (
                AAttn(self.channels[1], spec.num_heads, spec.area)
                if spec.head_dim == spec.head_dim_v
                else Attention(self.channels[1], spec.num_heads, (spec.head_dim + 0.5) / spec.head_dim_v)
            )
        block.qkv, block.pe, block.proj = _Given(), _Faint(spec.seq_len_k), nn.Identity()
        self.block = _patched(block, spec, backend)

    def inputs(self, groups: int) -> tuple[Tensor, Tensor]:
        """Random images: queries, keys and values packed, and the gradient of the output; the same ones every time."""
        packed, out = self.channels
        return self._image(groups, packed, 0), self._image(groups, out, 1)

    def _image(self, groups: int, channels: int, seed: int) -> Tensor:
        spec = self.spec
        tokens = spec.area * spec.seq_len_k
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        source = torch.Generator(self.device).manual_seed(seed)  # its own: the global one stays as it is
        size = (groups // spec.area, channels, height, tokens // height)
        image = torch.randn(size, device=self.device, dtype=spec.dtype, generator=source)
        return image.contiguous(memory_format=torch.channels_last if spec.layout == "nhwc" else torch.contiguous_format)

    def queries_and_keys(self, given: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every strip of every image, as views `[tokens, heads, head_dim]`."""
        d = self.spec.head_dim
        return [(t[..., :d], t[..., d : 2 * d]) for image in given.split(1) for t in self._grouped(image)]

    def call(self, given: Tensor, upstream: Tensor) -> Results:
        """`(output,)`, or `(output, gradient of the image)` when the spec trains."""
        leaf = given.detach().requires_grad_(self.spec.training)
        x = given[:, : self.channels[1]].detach()  # the block reads nothing but its shape and layout

        def forward() -> Tensor:
            self.block.qkv.tensor = leaf
            try:
                return self.block(x)
            finally:
                del self.block.qkv.tensor

        return _run(self, forward, (leaf,), upstream)

    def exact(self, given: Tensor, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Attention and the faint v that the block adds, with the gradients of queries, keys and values.

        All are `[groups, tokens, heads, channels]`.
        """
        spec = self.spec
        packed, dout = self._grouped(given), self._grouped(upstream)
        faint = spec.seq_len_k**-0.5
        out, grad = reference(packed, dout, dout.to(dtype) * faint, head_dim=spec.head_dim, dtype=dtype)
        out = out + packed[..., 2 * spec.head_dim :].to(dtype) * faint
        return [out, *grad.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)]

    def split(self, results: Results) -> list[Tensor]:
        """Results of `call` in the shape of `exact`; ArithmeticError for another number of channels."""
        spec = self.spec
        dims = [[spec.head_dim_v], [spec.head_dim, spec.head_dim, spec.head_dim_v]]
        found: list[Tensor] = []
        for t, sizes, wanted in zip(results, dims, reversed(self.channels), strict=False):
            if t.ndim != 4 or t.shape[1] != wanted:
                raise ArithmeticError(f"a result has shape {list(t.shape)} where {wanted} channels were expected")
            found += self._grouped(t).split(sizes, dim=-1)
        return found

    def _grouped(self, image: Tensor) -> Tensor:
        """`[images, channels, height, width]` -> `[groups, tokens, heads, channels of a head]`; of one image a view."""
        heads = self.spec.num_heads
        return image.permute(0, 2, 3, 1).reshape(-1, self.spec.seq_len_k, heads, image.shape[1] // heads)


class SeparateArm:
    """`nn.MultiheadAttention` whose projections multiply by the identity, and so give exactly their input.

    The time of the projections is in what is measured, of stock and of every backend alike. Inputs are queries, keys
    and values `[3, groups, tokens, channels]`; outputs and gradients are `[groups, tokens, channels]`. The mask, where
    the spec has one, is like RT-DETR's.
    """

    def __init__(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        self.spec, self.device = spec, device
        channels, tokens = spec.num_heads * spec.head_dim, spec.seq_len_k
        with torch.device("meta"):  # takes no random number
            block = nn.MultiheadAttention(channels, spec.num_heads, batch_first=True)
        same = torch.eye(channels, device=device, dtype=spec.dtype)
        nothing = torch.zeros(3 * channels, device=device, dtype=spec.dtype)
        block.in_proj_weight, block.in_proj_bias = nn.Parameter(same.repeat(3, 1)), nn.Parameter(nothing)
        block.out_proj.weight, block.out_proj.bias = nn.Parameter(same), nn.Parameter(nothing[:channels].clone())
        block.requires_grad_(spec.training)  # it decides how torch multiplies, though their gradients are not asked for
        self.block = _patched(block, spec, backend)
        self.mask = denoising_mask(tokens, 2 * tokens // 5, max(1, tokens // 20), device) if spec.mask else None

    def inputs(self, groups: int) -> tuple[Tensor, Tensor]:
        """Random queries, keys and values, and the gradient of the output; the same ones every time."""
        spec = self.spec
        source = torch.Generator(self.device).manual_seed(0)  # its own: the global one stays as it is
        size = (4, groups, spec.seq_len_k, spec.num_heads * spec.head_dim)
        both = torch.randn(size, device=self.device, dtype=spec.dtype, generator=source)
        return both[:3], both[3]

    def queries_and_keys(self, given: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every group, as views `[tokens, heads, head_dim]`."""
        q, k, _ = self._heads(given)
        return list(zip(q, k, strict=True))

    def call(self, given: Tensor, upstream: Tensor) -> Results:
        """`(output,)`, or `(output, gradients of queries, keys and values)` when the spec trains."""
        q, k, v = (t.detach().requires_grad_(self.spec.training) for t in given)
        return _run(self, lambda: self.block(q, k, v, attn_mask=self.mask)[0], (q, k, v), upstream)

    def exact(self, given: Tensor, upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Attention under the mask, with its gradients, all `[groups, tokens, heads, channels]`."""
        packed, dout = torch.cat(list(self._heads(given)), dim=-1), self._heads(upstream)
        nothing, dim = torch.zeros_like(dout), self.spec.head_dim
        out, grad = reference(packed, dout, nothing, head_dim=dim, dtype=dtype, mask=self.mask)
        return [out, *grad.chunk(3, dim=-1)]

    def split(self, results: Results) -> list[Tensor]:
        """Results of `call` in the shape of `exact`; ArithmeticError for another shape."""
        spec = self.spec
        for t in results:
            if t.ndim != 3 or t.shape[1:] != (spec.seq_len_q, spec.num_heads * spec.head_dim):
                raise ArithmeticError(
                    f"a result has shape {list(t.shape)} where {spec.seq_len_q} tokens of "
                    f"{spec.num_heads * spec.head_dim} channels were expected"
                )
        return [self._heads(t) for t in results]

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.spec.num_heads, -1))


Arm = PackedArm | SeparateArm
"""One backend in a block of its own on `device`, for problems like `spec` of any number of groups."""
