"""The attention blocks that we take over: how each packs its queries, keys and values, and its fused forward.

A block that a user edits after it was patched, or whose stock class gets another forward, is compared once more with
stock, and runs as stock where the two differ.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.utils import LOGGER

from ..backends.registry import BackendNotSupportedError, label
from ..backends.spec import AttentionSpec, Layout, Window
from ..dispatch.dispatcher import Dispatcher
from ..utils.compiler import assume_constant_result
from .class_swap import PREFIX, StockPickle, stock_twin
from .derivatives import transformed
from .equivalence import why_not_equal
from .fallback import AttentionCall, attend_packed, memory_format

_UNREAD = frozenset(vars(nn.Module())) | {"__class__", "_compiled_call_impl", "total_ops", "total_params"}
"""Attributes of a block that change nothing of what its stock forward computes; `training` is one of them."""

_told: WeakKeyDictionary[Dispatcher, set[str]] = WeakKeyDictionary()


class FlashBlock(StockPickle):
    """The forward that the blocks share: 1x1 convolution to packed qkv, attention, positional convolution, projection.

    Setting or deleting an attribute of a block counts as an edit: `attn.scale *= 2`, fewer heads, another `pe`. Changes
    in place, of an object that the block holds or of `vars(attn)`, are not noticed; those of modules and tensors need
    not be, since our forward runs the same ones.

    Attributes:
        _flash_layer: The block's name in the model, for messages.
        _flash_choice: `auto` or the name of the backend for this block.
        _flash_window: Side of the window in tokens, where the backend asked for by name is approximate; else None.
        _flash_dispatcher: Shared by the blocks of a model.
        _flash_edits: How often an attribute was set since the block was patched. As text a compiled graph guards the
            number; as an integer torch.compile might make it a symbol.
        _flash_verdict: The `code` that the block was last compared with, and why the block has to run as stock, empty
            if it has not. None, in our own blocks of measurements and comparisons: edits are ignored.
        calls: The functions by name that the stock forward calls, as `stock_code.foreign` takes them.
        separate: Whether queries, keys and values are three tensors, and not the packed output of one convolution.
        total_ops: Set by thop, with which Ultralytics counts GFLOPs, while thop runs forwards.
    """

    calls: ClassVar[tuple[tuple[ModuleType, ...], tuple[str, ...]]] = (), ()
    separate: ClassVar[bool] = False
    total_ops: float | None = None

    _flash_layer: str
    _flash_choice: str
    _flash_window: int | None = None
    _flash_dispatcher: Dispatcher
    _flash_edits: str = ""
    _flash_verdict: tuple[tuple[Any, ...], str] | None = None
    qkv: Any
    pe: Any
    proj: Any
    num_heads: int
    format: str | None

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int] | None:
        """`(groups, seq_len, head_dim, head_dim_v, area)` for an input of that size; None if the block cannot run."""
        raise NotImplementedError

    @classmethod
    def code(cls, edits: str = "") -> tuple[Any, ...]:
        """What the stock forward is made of at this moment: its function, those it calls by name, and the edits."""
        return cls._stock.forward, edits  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Attention over an image `[batch, channels, height, width]`, in and out; see the stock block for its meaning.

        Raises:
            BackendNotSupportedError: The backend asked for by name cannot run this input, or the block was changed.
            FlashKernelError: The backend asked for by name raised.
        """
        call = self._attention_call(x)
        if call is None:
            return self._stock.forward(self, x)  # type: ignore[attr-defined]
        out, v = attend_packed(self.qkv(x), call)
        return self.proj(out + self.pe(v))

    def _attention_call(self, x: Tensor) -> AttentionCall | None:
        """The problem that an input poses, and the backend for it; None where the stock forward runs."""
        if leaves_stock(self, x) or self._was_changed():
            return None
        batch, _, height, width = x.shape
        nhwc, size = memory_format(x) is torch.channels_last, self._flash_window
        # A compiled graph does not know the height and width for certain: there the backend refuses.
        window = None if size is None or torch.compiler.is_compiling() else Window(height, width, size)
        return self._decided(x, batch, height * width, nhwc=nhwc, window=window)

    def _decided(
        self,
        x: Tensor,
        batch: int,
        tokens: int,
        nhwc: bool = False,
        mask: bool = False,
        window: Window | None = None,
    ) -> AttentionCall | None:
        """The call for the sizes of an input; None where the stock forward runs."""
        dispatcher, layer, choice = self._flash_dispatcher, self._flash_layer, self._flash_choice
        spec = block_spec(
            *(self, type(self), batch, tokens),
            dtype=compute_dtype(x),
            nhwc=nhwc,
            training=torch.is_grad_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            mask=mask,
            window=window,
        )
        if spec is None:
            return None
        if torch.compiler.is_compiling():
            backend = dispatcher.decide_for_compile(layer, choice, spec.without_sizes(), str(x.device))
        else:
            decision = dispatcher.decide(spec, choice, x.device)
            spec, backend = decision.spec, decision.backend
        return None if backend == "stock" else AttentionCall(spec, backend, layer, choice, dispatcher)

    # What a user changes ----------------------------------------------------------------------------------------------
    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute as on the stock block, and count the edit."""
        self._note_edit(name)  # before it may be somebody else's: `__class__` is set like this too
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute as on the stock block, and count the edit."""
        self._note_edit(name)
        super().__delattr__(name)

    def _note_edit(self, name: str) -> None:
        if name not in _UNREAD and not name.startswith(PREFIX):
            self.__dict__["_flash_edits"] = str(int(self._flash_edits or 0) + 1)

    def why_stock(self) -> str:
        """Why the block no longer computes what ours computes, as `why_not_equal` says it; empty if it does."""
        verdict = self._flash_verdict
        if verdict is None:
            return ""
        code = self.code(self._flash_edits)
        if verdict[0] != code:
            verdict = code, why_not_equal(self, type(self))  # type: ignore[arg-type]
            self.__dict__["_flash_verdict"] = verdict
        return verdict[1]

    def _was_changed(self) -> bool:
        """Whether the stock forward has to run because the block was changed; one log line says so.

        Raises:
            BackendNotSupportedError: A backend was asked for by name.
        """
        if torch.compiler.is_compiling():
            return self._was_changed_in_graph(self._flash_edits)
        return self.why_stock() != "" and self._tell()

    @assume_constant_result
    def _was_changed_in_graph(self, edits: str) -> bool:
        """`_was_changed`, evaluated once a graph, which guards the edits."""
        return self.why_stock() != "" and self._tell()

    def _tell(self) -> bool:
        layer, choice, reason = self._flash_layer, self._flash_choice, self.why_stock()
        if choice not in ("auto", "stock"):
            raise BackendNotSupportedError(unknown_block(self, layer, choice, reason))
        told = _told.setdefault(self._flash_dispatcher, set())
        if choice == "auto" and reason not in told:
            told.add(reason)
            LOGGER.warning(
                f"yolo-flash: stock attention runs in {layer or 'the block'} from now on, and in all that were changed "
                f"alike: this {self._stock.__name__} is no longer the one that was patched: {reason}."
            )
        return True

    def __prepare_scriptable__(self) -> nn.Module:
        """The stock block, which `torch.jit.script` compiles, and puts in this one's place in the user's module."""
        LOGGER.warning(
            f"yolo-flash: torch.jit.script gets stock attention for {self._flash_layer or 'the block'}, and leaves it "
            f"in the model that it was given: call patch_model again to go on with that."
        )
        return stock_twin(self)


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
    """The attention of PSA in YOLOv10, YOLO11 and YOLO26: keys narrower than values."""

    _stock: ClassVar[type] = Attention

    @staticmethod
    def problem(block: Any, batch: int, tokens: int) -> tuple[int, int, int, int, int]:
        """The whole image is one group."""
        return batch, tokens, block.key_dim, block.head_dim, 1


def unknown_block(block: Any, layer: str, choice: str, reason: str) -> str:
    """The message of an error: a backend asked for by name in a block that has to stay stock."""
    return (
        f"{label(choice)} cannot run in {layer or 'the block'}: this {block.__class__.__name__} is not the one that "
        f"this version knows: {reason}. flash.backend=auto, or flash.layers={layer}:stock, leaves it stock."
    )


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
    window: Window | None = None,
) -> AttentionSpec | None:
    """The spec of a block, patched or stock, for an input of `batch` images with `tokens` pixels or queries each.

    The class is ours for the block, `patch.BLOCKS[type(block)]` for a stock one, and `nhwc` tells whether the block's
    input is channels_last; the rest is as in `AttentionSpec`.

    Returns:
        None where the stock block cannot run either: its own error shall reach the user.
    """
    problem = cls.problem(block, batch, tokens)
    if problem is None:
        return None
    groups, seq_len, dim, dim_v, area = problem
    layout: Layout = "separate" if cls.separate else "nhwc" if nhwc else "nchw"
    modes = mask, training, training and deterministic
    return AttentionSpec(groups, block.num_heads, seq_len, seq_len, dim, dim_v, dtype, layout, *modes, area, window)


def leaves_stock(block: FlashBlock, x: Tensor) -> bool:
    """Whether stock has to run: for exporters, tracers, transforms and the GFLOPs counter, which know stock operators.

    An empty input also runs as stock: kernels and plans would divide by zero.
    """
    return (
        torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        # The flag and not `is_exporting()`, which in some versions of torch is True in every compilation.
        or getattr(torch.compiler, "_is_exporting_flag", False)
        or block.format == "coreml"
        or block.total_ops is not None
        or x.is_meta
        or (not torch.compiler.is_compiling() and (transformed() or x.numel() == 0))
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` gives, under autocast too."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
