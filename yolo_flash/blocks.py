"""The attention blocks that we take over: how each packs its queries, keys and values, and its fused forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from ultralytics.nn.modules.block import AAttn, Attention

from .backends import BACKENDS, AttentionSpec
from .guard import attend, is_out_of_memory, refuse, run
from .runtime import Runtime
from .stock_pickle import StockPickle


class FlashBlock(StockPickle):
    """The forward that the blocks share: 1x1 convolution to packed qkv, attention, positional convolution, projection.

    Attributes:
        _flash_layer: The block's name in the model, for messages.
        _flash_choice: `auto` or the name of the backend for this block.
        _flash_runtime: Shared by the blocks of a model.
        separate: Whether queries, keys and values are three tensors, and not the packed output of one convolution.
    """

    separate: ClassVar[bool] = False

    _flash_layer: str
    _flash_choice: str
    _flash_runtime: Runtime
    qkv: Any
    pe: Any
    proj: Any
    num_heads: int

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
        spec = None if _leave_stock(self, x) else self._spec(x)
        backend = "stock" if spec is None else self._choose(spec, x.device)
        if spec is None or BACKENDS[backend].run is None:
            return self._stock.forward(self, x)  # type: ignore[attr-defined]
        qkv = self.qkv(x)
        batch, _, height, width = qkv.shape
        layout = _memory_format(qkv)
        packed = _relayout(qkv, torch.channels_last, back=layout).permute(0, 2, 3, 1)
        packed = packed.reshape(spec.batch, spec.seq_len_q, spec.num_heads, -1)
        out, v = (
            _relayout(t.view(batch, height, width, -1).permute(0, 3, 1, 2), layout, back=torch.channels_last)
            for t in self._attend(packed, spec, backend)
        )
        return self.proj(out + self.pe(v))

    def _spec(self, x: Tensor) -> AttentionSpec | None:
        batch, _, height, width = x.shape
        return block_spec(
            self,
            type(self),
            batch,
            height * width,
            dtype=_compute_dtype(x),
            nhwc=_memory_format(x) is torch.channels_last,
            training=torch.is_grad_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def _choose(self, spec: AttentionSpec, device: torch.device) -> str:
        runtime, choice = self._flash_runtime, self._flash_choice
        if torch.compiler.is_compiling():
            return runtime.decide_for_compile(self._flash_layer, choice, spec.without_sizes(), str(device))
        return runtime.decide(spec, choice, device).backend

    def _attend(self, packed: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, Tensor]:
        """Run a backend; when `auto` chose it and it raises, run the next one instead."""
        if torch.compiler.is_compiling():
            return run(packed, spec, backend)
        layer, choice, runtime = self._flash_layer, self._flash_choice, self._flash_runtime
        try:
            return attend(packed, spec, backend, layer=layer, choice=choice, runtime=runtime)
        except Exception as error:
            if is_out_of_memory(error):  # the trainer halves the batch
                raise
            if choice != "auto":
                raise refuse(layer, spec, backend, error) from error
            if backend in ("stock", "sdpa_math"):
                raise
            runtime.fail(layer, spec, backend, error)
            following = runtime.decide(spec, "auto", packed.device).backend
            return self._attend(packed, spec, "sdpa_math" if following == backend else following)


class FlashAAttn(FlashBlock, AAttn):
    """YOLO12's area attention (arXiv 2502.12524): the image is cut into `area` strips that attend within themselves."""

    _stock: ClassVar[type] = AAttn

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
    problem = cls.problem(block, batch, tokens)
    if problem is None:
        return None
    groups, seq_len, head_dim, head_dim_v, area = problem
    return AttentionSpec(
        batch=groups,
        num_heads=block.num_heads,
        seq_len_q=seq_len,
        seq_len_k=seq_len,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        layout="separate" if cls.separate else "nhwc" if nhwc else "nchw",
        mask=mask,
        training=training,
        deterministic=training and deterministic,
        area=area,
    )


def _leave_stock(block: FlashBlock, x: Tensor) -> bool:
    """Exporters and tracers record operators: they get the stock ones, which every runtime knows."""
    return (
        torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or getattr(torch.compiler, "is_exporting", bool)()  # torch >= 2.7
        or getattr(block, "format", None) == "coreml"
        or x.is_meta
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` gives, under autocast too."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format that a convolution of `x` gives: by the order of strides, since PSA's input is a slice of channels."""
    nhwc = x.stride(1) == 1 and x.stride(3) >= x.shape[1]
    return torch.channels_last if nhwc else torch.contiguous_format


def _relayout(x: Tensor, layout: torch.memory_format, back: torch.memory_format) -> Tensor:
    """`x` in a memory format, its gradient in another: a copy only where `x` lies differently."""
    if x.requires_grad:
        return _Relayout.apply(x, layout, back)
    return x.contiguous(memory_format=layout)


class _Relayout(torch.autograd.Function):
    """Hands each neighbour the layout that it expects.

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
        return grad.contiguous(memory_format=ctx.back), None, None
