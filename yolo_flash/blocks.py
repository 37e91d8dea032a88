"""The attention blocks that we take over: how each packs its queries, keys and values, and its fused forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from ultralytics.nn.modules.block import AAttn, Attention

from .backends import BACKENDS, AttentionSpec
from .guard import Job, attend, memory_format, transformed
from .runtime import Runtime
from .stock_pickle import StockPickle


class FlashBlock(StockPickle):
    """The forward that the blocks share: 1x1 convolution to packed qkv, attention, positional convolution, projection.

    Attributes:
        _flash_layer: The block's name in the model, for messages.
        _flash_choice: `auto` or the name of the backend for this block.
        _flash_runtime: Shared by the blocks of a model.
        separate: Whether queries, keys and values are three tensors, and not the packed output of one convolution.
        total_ops: Set by thop, which Ultralytics counts GFLOPs with, for the time of its forwards.
    """

    separate: ClassVar[bool] = False
    total_ops: float | None = None

    _flash_layer: str
    _flash_choice: str
    _flash_runtime: Runtime
    qkv: Any
    pe: Any
    proj: Any
    num_heads: int
    format: str | None

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int] | None:
        """`(groups, seq_len, head_dim, head_dim_v, area)` for an input of that size; None if the block cannot run."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Attention over an image `[batch, channels, height, width]`, in and out; see the stock block for its meaning.

        Raises:
            BackendNotSupportedError: The backend asked for by name cannot run this input.
            FlashKernelError: The backend asked for by name raised.
        """
        plan = self._plan(x)
        if plan is None:
            return self._stock.forward(self, x)  # type: ignore[attr-defined]
        out, v = attend(self.qkv(x), Job(*plan, self._flash_layer, self._flash_choice, self._flash_runtime))
        return self.proj(out + self.pe(v))

    def _plan(self, x: Tensor) -> tuple[AttentionSpec, str] | None:
        """The problem that an input poses, and the backend for it; None where the stock forward runs."""
        fields = None if _leave_stock(self, x) else self._spec_fields(x)
        return None if fields is None else self._choose(fields, x.device)

    def _choose(self, fields: tuple[Any, ...], device: torch.device) -> tuple[AttentionSpec, str] | None:
        """The spec of these fields, and the backend for it; None where that is the stock forward."""
        runtime, choice = self._flash_runtime, self._flash_choice
        if torch.compiler.is_compiling():
            spec = AttentionSpec(*fields)
            backend = runtime.decide_for_compile(self._flash_layer, choice, spec.without_sizes(), str(device))
        else:
            spec, backend = runtime.plan(fields, choice, device)
        return None if BACKENDS[backend].forward is None else (spec, backend)

    def _spec_fields(self, x: Tensor) -> tuple[Any, ...] | None:
        batch, _, height, width = x.shape
        nhwc = memory_format(x) is torch.channels_last
        modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        return spec_fields(self, type(self), batch, height * width, _compute_dtype(x), nhwc, *modes)


class FlashAAttn(FlashBlock, AAttn):
    """YOLO12's area attention (arXiv 2502.12524): the image is cut into `area` strips that attend within themselves."""

    _stock: ClassVar[type] = AAttn
    format: str | None = None  # what the stock block lacks, `torch.nn.Module` looks for slowly

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int] | None:
        """Each area is a group of its own; the stock block cannot cut tokens that area does not divide."""
        if tokens % block.area:
            return None
        return batch * block.area, tokens // block.area, block.head_dim, block.head_dim, block.area


class FlashAttention(FlashBlock, Attention):
    """The attention of PSA in YOLO10, 11 and 26: keys narrower than values."""

    _stock: ClassVar[type] = Attention

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int]:
        """The whole image is one group."""
        return batch, tokens, block.key_dim, block.head_dim, 1


def block_spec(
    block: Any,
    cls: type[FlashBlock],
    batch: int,
    tokens: int,
    *,
    dtype: torch.dtype,
    nhwc: bool,
    training: bool,
    deterministic: bool,
    mask: bool = False,
) -> AttentionSpec | None:
    """The spec of a block, patched or stock, for an input of `batch` images with `tokens` pixels or queries each.

    Args:
        block: The block.
        cls: Our class for it, `patch.BLOCKS[type(block)]` for a stock one.
        batch: Images.
        tokens: Height times width of the block's input, or its number of queries.
        dtype: Of the queries.
        nhwc: Whether the block's input is channels_last.
        training: Whether a backward pass follows.
        deterministic: Whether torch asks for deterministic algorithms; it matters to the backward alone.
        mask: Whether the scores are masked.

    Returns:
        None where the stock block cannot run either, so that its own error reaches the user.
    """
    fields = spec_fields(block, cls, batch, tokens, dtype, nhwc, training, deterministic, mask)
    return None if fields is None else AttentionSpec(*fields)


def spec_fields(
    block: Any,
    cls: type[FlashBlock],
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    nhwc: bool,
    training: bool,
    deterministic: bool,
    mask: bool = False,
) -> tuple[Any, ...] | None:
    """The fields of `block_spec` in their order: a key that is quicker than the spec."""
    problem = cls.problem(block, batch, tokens)
    if problem is None:
        return None
    groups, seq_len, *dims, area = problem
    layout = "separate" if cls.separate else "nhwc" if nhwc else "nchw"
    return (
        *(groups, block.num_heads, seq_len, seq_len, *dims, dtype, layout),
        *(mask, training, training and deterministic, area),
    )


def _leave_stock(block: FlashBlock, x: Tensor) -> bool:
    """Who looks at operators gets the stock ones, which all know: exporters, tracers, transforms, the GFLOPs counter.

    So does an input without images, on which kernels and plans would divide by zero.
    """
    if not torch.compiler.is_compiling() and (transformed() or x.numel() == 0):
        return True
    return (
        torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        # The flag and not `is_exporting()`, which some versions of torch answer with True in every compilation.
        or getattr(torch.compiler, "_is_exporting_flag", False)
        or block.format == "coreml"
        or block.total_ops is not None
        or x.is_meta
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` gives, under autocast too."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
