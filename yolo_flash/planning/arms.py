"""A backend as `autotune` runs it, in the real block, and the inputs that it is held against high precision on.

The convolutions of the block (`FlashBlock` or the stock class) are replaced: the first gives a tensor that is there,
the positional one scales it, the last does nothing. What is timed is therefore attention with all the layout work that
the block does around it. `nn.MultiheadAttention` is in `trial_multihead.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention

from ..backends.registry import BACKENDS
from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..patching.class_swap import become
from ..patching.patch import BLOCKS
from ..utils.numerics import Results
from . import arms_multihead


# The block ------------------------------------------------------------------------------------------------------------
class _Given(nn.Module):
    """In the place of the first convolution: a tensor that is there."""

    tensor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.tensor


class _Faint(nn.Module):
    """In the place of the positional convolution: v, as small as the average that attention makes of it.

    Else the values would hide the errors of attention, in the output and in the gradients.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.factor = tokens**-0.5

    def forward(self, v: Tensor) -> Tensor:
        return v * self.factor


class BlockArm:
    """One backend in a block of its own, for inputs of a certain number of groups."""

    def __init__(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        """Make the block for problems like `spec`, of any number of groups."""
        self.spec, self.device = spec, device
        with torch.device("meta"):  # takes no memory and no random number
            block: Any = (
                AAttn(spec.num_heads * spec.head_dim, spec.num_heads, spec.area)
                if spec.head_dim == spec.head_dim_v
                else Attention(
                    spec.num_heads * spec.head_dim_v, spec.num_heads, (spec.head_dim + 0.5) / spec.head_dim_v
                )
            )
        block.qkv, block.pe, block.proj = _Given(), _Faint(spec.seq_len_k), nn.Identity()
        if BACKENDS[backend].forward is not None:
            dispatcher = Dispatcher(FlashConfig(backend=backend))
            become(block, BLOCKS[type(block)], layer="", choice=backend, dispatcher=dispatcher)
        self.block = block.train(spec.training)

    def call(self, image: Tensor, upstream: Tensor) -> Results:
        """`(output,)`, or `(output, gradient of the image)` when the spec trains.

        Args:
            image: What the first convolution gives, `[images, channels, height, width]`.
            upstream: Gradient of the output.
        """
        spec = self.spec
        channels = spec.num_heads * spec.head_dim_v
        leaf = image.detach().requires_grad_(spec.training)
        x = image[:, :channels].detach()  # of the block's input nothing but its shape and layout is asked
        half = spec.dtype in (torch.float16, torch.bfloat16)
        self.block.qkv.tensor = leaf
        try:
            amp = torch.autocast(self.device.type, dtype=spec.dtype if half else None, enabled=half)
            with amp, torch.set_grad_enabled(spec.training):
                out = self.block(x)
        finally:
            del self.block.qkv.tensor
        if not spec.training:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaf, upstream.to(out.dtype)))


def arm_of(spec: AttentionSpec, backend: str, device: torch.device) -> Any:
    """A backend in the block that poses such problems; its `call` takes what `inputs` gives."""
    return (arms_multihead.MultiheadArm if spec.layout == "separate" else BlockArm)(spec, backend, device)


# Inputs ---------------------------------------------------------------------------------------------------------------
def channels(spec: AttentionSpec) -> tuple[int, int]:
    """Of the block's packed tensor, and of its output."""
    return spec.num_heads * (2 * spec.head_dim + spec.head_dim_v), spec.num_heads * spec.head_dim_v


def inputs(spec: AttentionSpec, groups: int, device: torch.device) -> tuple[Any, Tensor]:
    """Random input of an arm, and a random gradient of its output; the same ones every time."""
    if spec.layout == "separate":
        return arms_multihead.inputs(spec, groups, device)
    packed, out = channels(spec)
    return _image(spec, groups, device, packed, 0), _image(spec, groups, device, out, 1)


def _image(spec: AttentionSpec, groups: int, device: torch.device, channels: int, seed: int) -> Tensor:
    """Random `[images, channels, height, width]` in the layout of a spec."""
    tokens = spec.area * spec.seq_len_k
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    source = torch.Generator(device).manual_seed(seed)  # its own: the global one stays as it is
    size = (groups // spec.area, channels, height, tokens // height)
    return _laid_out(spec, torch.randn(size, device=device, dtype=spec.dtype, generator=source))


def _laid_out(spec: AttentionSpec, image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last if spec.layout == "nhwc" else torch.contiguous_format)


def _grouped(spec: AttentionSpec, image: Tensor) -> Tensor:
    """`[images, channels, height, width]` -> `[groups, tokens, heads, channels of a head]`."""
    heads = spec.num_heads
    return image.permute(0, 2, 3, 1).reshape(-1, spec.seq_len_k, heads, image.shape[1] // heads)
