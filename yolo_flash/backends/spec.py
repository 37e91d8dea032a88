"""One attention problem."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Layout = Literal["nhwc", "nchw", "separate"]


class Window(NamedTuple):
    """Which keys an approximate backend sees: those near the query in the image.

    Attributes:
        height: Tokens of a column of the image.
        width: Tokens of a row.
        size: Tokens of a side of the square around a query, odd; keys outside of it are not seen.
    """

    height: int
    width: int
    size: int

    @property
    def reach(self) -> int:
        """Rows and columns that a query sees to each side."""
        return self.size // 2


class AttentionSpec(NamedTuple):
    """One attention problem: everything that decides which backend can run it and which is fastest.

    A tuple, since every block builds one in every step and looks its decision up.

    Attributes:
        batch: Independent problems; for area attention the batch size times the number of areas.
        num_heads: Heads.
        seq_len_q: Query tokens of one problem.
        seq_len_k: Key tokens of one problem.
        head_dim: Channels of a query and of a key.
        head_dim_v: Channels of a value.
        dtype: Of the queries, keys and values.
        layout: How they lie in memory: `nhwc` and `nchw` are the packed output of one convolution in that memory
            format, `separate` is three tensors.
        mask: Whether the scores are masked.
        training: Whether a backward pass will follow.
        deterministic: Whether torch asks for deterministic algorithms.
        area: Strips that an image is cut into, each a problem of `batch`; it matters to the speed of stock, and to what
            a window sees.
        window: What an approximate backend sees of the image; None for all exact ones, whose specs thus stay equal.

    Examples:
        >>> spec = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float16, "nhwc")
        >>> print(spec)
        64 x 2 heads x 400 tokens x 32, float16, nhwc, train
        >>> spec.scores
        20480000
    """

    batch: int
    num_heads: int
    seq_len_q: int
    seq_len_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    layout: Layout
    mask: bool = False
    training: bool = True
    deterministic: bool = False
    area: int = 1
    window: Window | None = None

    @property
    def scores(self) -> int:
        """Elements of the score matrices: what stock attention writes to memory and a fused kernel does not."""
        return self.batch * self.num_heads * self.seq_len_q * self.seq_len_k

    def without_sizes(self) -> tuple[Any, ...]:
        """What a compiled graph knows for certain, where groups and tokens may be symbols."""
        _, num_heads, _, _, *rest = self
        return num_heads, *rest

    @classmethod
    def with_sizes(cls, parts: tuple[Any, ...], batch: int, seq_len: int) -> AttentionSpec:
        """The self-attention of `batch` groups of `seq_len` tokens, from what `without_sizes` left."""
        num_heads, *rest = parts
        return cls(batch, num_heads, seq_len, seq_len, *rest)

    def as_json(self) -> dict[str, Any]:
        """Field -> value, the dtype by its name."""
        return self._asdict() | {"dtype": dtype_name(self.dtype)}

    def __str__(self) -> str:
        """`256 x 2 heads x 400 tokens x 32/64, float16, nhwc, train`."""
        tokens = f"{self.seq_len_q}" + (f"/{self.seq_len_k}" if self.seq_len_k != self.seq_len_q else "")
        dims = f"{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        window = f", window {self.window.size} of {self.window.height} x {self.window.width}" if self.window else ""
        return (
            f"{self.batch} x {self.num_heads} heads x {tokens} tokens x {dims}, {dtype_name(self.dtype)}, "
            f"{self.layout}, {'masked, ' if self.mask else ''}{'train' if self.training else 'predict'}{window}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")
