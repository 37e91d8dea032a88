"""A backend as `autotune` runs it, in the real block, and the inputs that it is held against high precision on.

The convolutions of the block (`FlashBlock` or the stock class) are replaced: the first gives a tensor that is there,
the positional one scales it, the last does nothing. What is timed is therefore attention with all the layout work that
the block does around it. `nn.MultiheadAttention` is in `trial_multihead.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention

from . import trial_multihead
from .backends.registry import BACKENDS
from .backends.spec import AttentionSpec
from .config import FlashConfig
from .dispatch.dispatcher import Runtime
from .patching.class_swap import become
from .patching.patch import BLOCKS
from .utils.numerics import Results, reference, relative_error

_PARTS = ("output", "gradient of q", "gradient of k", "gradient of v")
_HIGH = 120.0  # a score of the hard inputs: its exponential overflows float32, that of its negative is zero there
_HARD_SCORES = {"cpu": 2**22, "cuda": 2**24}  # as many kinds of hard inputs as make this, one at least
_HARD_LARGEST = {"cpu": 2**24, "cuda": 2**27}  # of one image: beyond, a trial would take seconds more


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
            runtime = Runtime(FlashConfig(backend=backend))
            become(block, BLOCKS[type(block)], layer="", choice=backend, runtime=runtime)
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
    return (trial_multihead.MultiheadArm if spec.layout == "separate" else BlockArm)(spec, backend, device)


# Inputs ---------------------------------------------------------------------------------------------------------------
def channels(spec: AttentionSpec) -> tuple[int, int]:
    """Of the block's packed tensor, and of its output."""
    return spec.num_heads * (2 * spec.head_dim + spec.head_dim_v), spec.num_heads * spec.head_dim_v


def inputs(spec: AttentionSpec, groups: int, device: torch.device) -> tuple[Any, Tensor]:
    """Random input of an arm, and a random gradient of its output; the same ones every time."""
    if spec.layout == "separate":
        return trial_multihead.inputs(spec, groups, device)
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


def _far_below(q: Tensor, k: Tensor) -> None:
    """All scores lower by 120: the softmax, and so the result, is that of the other channels."""
    q[..., 0] = (_HIGH * q.shape[-1] ** 0.5) ** 0.5
    k[..., 0] = -q[..., 0]


def _far_above(q: Tensor, k: Tensor) -> None:
    q[..., 0] = k[..., 0] = (_HIGH * q.shape[-1] ** 0.5) ** 0.5


def _one_key(q: Tensor, k: Tensor) -> None:
    """One key, in the middle, has scores of about 120, and all the weight."""
    q.abs_()
    k[:, k.shape[1] // 2] = _HIGH / 0.8 / q.shape[-1] ** 0.5  # 0.8 is the mean of a random |q|


_HARD: dict[str, Callable[[Tensor, Tensor], None]] = {
    "scores far below 0": _far_below,
    "one dominating key": _one_key,
    "scores far above 0": _far_above,
}


def _hard_inputs(spec: AttentionSpec, groups: int, device: torch.device) -> tuple[Any, Tensor]:
    """As `inputs`, on which a softmax goes wrong that is not careful: a kind of `_HARD` for each group in turn."""
    given, upstream = inputs(spec, groups, device)
    separate = spec.layout == "separate"
    if separate:
        q, k = (t.unflatten(-1, (spec.num_heads, -1)) for t in given[:2])
    else:
        packed = _grouped(spec, given).clone()
        q, k = packed[..., : spec.head_dim], packed[..., spec.head_dim : 2 * spec.head_dim]
    for start, change in enumerate(_HARD.values()):
        change(q[start :: len(_HARD)], k[start :: len(_HARD)])  # views: the inputs themselves change
    if separate:
        return given, upstream
    images, total, height, width = given.shape
    return _laid_out(spec, packed.reshape(images, height, width, total).permute(0, 3, 1, 2)), upstream


# Against high precision -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probe:
    """Inputs with what is right for them.

    Attributes:
        groups: How many.
        given: Input of an arm.
        upstream: Gradient of its output.
        errors: `(results of an arm)` -> part of the results -> relative error; ArithmeticError for another shape.
        rounding: What a backend may be off besides twice the error of stock and the rounding of the dtype.
        usual: Error of stock, where stock cannot run.
    """

    groups: int
    given: Any
    upstream: Tensor
    errors: Callable[[Results], dict[str, float]]
    rounding: float
    usual: float


def random_probe(spec: AttentionSpec, groups: int, device: torch.device) -> Probe:
    """Random inputs; output and the gradients of q, k and v are held apart."""
    given, upstream = inputs(spec, groups, device)
    truth = _exact(spec, given, upstream)

    def errors(results: Results) -> dict[str, float]:
        found = [relative_error(*pair) for pair in zip(_parts(spec, results, truth), truth, strict=False)]
        if spec.seq_len_k == 1:  # the gradients of q and k are zero but for rounding
            found[1:3] = [error if math.isnan(error) else 0.0 for error in found[1:3]]
        return dict(zip(_PARTS, found, strict=False))

    # What is usual in this dtype, whose sums are in float32 at the least.
    usual = max(torch.finfo(spec.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    # Stock may round a few small sums right by luck: on an H200, masked, memory-efficient attention was 7e-7 off in
    # float32, where twice stock's error was 5e-7.
    return Probe(groups, given, upstream, errors, rounding=2 * torch.finfo(torch.float32).eps, usual=usual)


def hard_probe(spec: AttentionSpec, device: torch.device) -> Probe | None:
    """Scores far below 0, one dominating key, scores far above 0: a group of each, on the first image at least.

    cuDNN's backward gave NaN for the first of them (cudnn-frontend issue 1072). The gradients of q, k and v are held
    together: those of q and k are zero but for rounding where one key has all the weight. A score of 120 is off by 1e-5
    in float32, and a fused backward, which takes exponentials again, meets it four times: in the score, in the
    logarithm of the sum, in their difference, and in the product with a key as large.

    Returns:
        None where one image is so large that this would take seconds; small ones have shown what kernel there is. None
        below 16 tokens, where stock may round few large scores right by luck, and is no yardstick.
    """
    scores = spec.area * spec.scores // spec.batch
    if spec.seq_len_k < 16 or scores > _HARD_LARGEST.get(device.type, 0):
        return None
    images = max(1, min(_HARD_SCORES[device.type] // scores, -(-len(_HARD) // spec.area)))
    groups = spec.area * images
    given, upstream = _hard_inputs(spec, groups, device)
    truth = _exact(spec, given, upstream)

    def errors(results: Results) -> dict[str, float]:
        found = _parts(spec, results, truth)
        by_kind = {}
        for start, kind in enumerate(list(_HARD)[:groups]):
            out, *grads = (tuple(t[start :: len(_HARD)] for t in pair) for pair in zip(found, truth, strict=False))
            by_kind[f"output for {kind}"] = relative_error(*out)
            if grads:
                joint = (torch.cat([t.flatten(1).double() for t in side], dim=1) for side in zip(*grads, strict=True))
                by_kind[f"gradient for {kind}"] = relative_error(*joint)
        return by_kind

    rounding = 4 * _HIGH * torch.finfo(torch.float32).eps
    return Probe(groups, given, upstream, errors, rounding, usual=_HIGH * torch.finfo(spec.dtype).eps)


def _exact(spec: AttentionSpec, given: Any, upstream: Tensor) -> list[Tensor]:
    """Output of the block, and the gradients of q, k and v, in high precision."""
    large = upstream.device.type == "cpu" and spec.scores // spec.batch > 2**27  # float64 would take half a minute
    dtype = torch.float32 if large else torch.float64
    if spec.layout == "separate":
        return trial_multihead.exact(spec, given, upstream, dtype)
    packed, dout = _grouped(spec, given), _grouped(spec, upstream)
    faint = spec.seq_len_k**-0.5
    out, grad = reference(packed, dout, dout.to(dtype) * faint, head_dim=spec.head_dim, dtype=dtype)
    out = out + packed[..., 2 * spec.head_dim :].to(dtype) * faint
    return [out, *grad.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)]


def _parts(spec: AttentionSpec, results: Results, truth: list[Tensor]) -> list[Tensor]:
    """Output and, in training, the gradients of q, k and v, in the shape of `_exact`.

    Raises:
        ArithmeticError: A result has another shape than it should have.
    """
    dims = [[spec.head_dim_v], [spec.head_dim, spec.head_dim, spec.head_dim_v]]
    packed, out = channels(spec)
    separate = spec.layout == "separate"
    found: list[Tensor] = trial_multihead.parts(spec, results) if separate else []
    for t, sizes, wanted in zip(() if separate else results, dims, (out, packed), strict=False):
        if t.ndim != 4 or t.shape[1] != wanted:
            raise ArithmeticError(f"a result has shape {list(t.shape)} where {wanted} channels were expected")
        found += _grouped(spec, t).split(sizes, dim=-1)
    if any(a.shape != b.shape for a, b in zip(found, truth, strict=False)):
        raise ArithmeticError("a result has another shape than the reference")
    return found
