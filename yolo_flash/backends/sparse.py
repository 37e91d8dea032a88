"""Approximate attention: a query sees the keys within a square around it in the image, and no others.

On a GPU torch's FlexAttention computes it, compiled by inductor, with a block mask that skips all blocks of 128 x 128
scores that the window does not touch. FlexAttention without the compiler would write the whole score matrix to memory,
and is never called. It has no backward on a CPU: there plain operators compute the same, a few queries at a time.

An image of `area` strips keeps them, so that a window as large as the image gives what the stock block gives: a query
sees the keys that lie in its strip and in its square.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..utils.errors import is_out_of_memory
from .spec import AttentionSpec, Window

OPERATOR = "yolo_flash::sparse_window"
"""Name of a forward in a profile."""

BLOCK = 128  # queries and keys of a block of FlexAttention's masks; the least that its kernels take in all versions
_MAX_MASKS = 16
_MAX_SIZES = 3  # of a kind of problem for which there are programs of their own
_CPU_SCORES = 2**24  # of one step of the plain operators: 64 MiB in float32

_Rectangle = tuple[Tensor, Tensor, Tensor, Tensor]  # first and last row, first and last column, all inclusive
_masks: OrderedDict[Any, Any] = OrderedDict()
_captured: dict[Any, Any] = {}  # masks whose memory CUDA graphs read in every replay
_sizes: dict[Any, list[tuple[int, int]]] = {}
_programs: dict[Any, Callable[..., Tensor]] = {}
_numbers = itertools.count()


def attend(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention within the window, and v: see `Backend.forward`.

    Raises:
        RuntimeError: FlexAttention cannot be compiled here.
    """
    q, k, v = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    image = v.contiguous()
    # The scores are those of `spec.dtype` in any case; autocast would be one more thing that compiled code depends on.
    with record_function(OPERATOR), torch.autocast(packed.device.type, enabled=False):
        run = _Plain.apply if packed.device.type == "cpu" else _flex
        out: Tensor = run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), spec)
    return out.transpose(1, 2).contiguous(), image


# The window -----------------------------------------------------------------------------------------------------------
def unseen(spec: AttentionSpec, device: torch.device) -> Tensor:
    """Bool `[area, seq_len, seq_len]`, True where a query of a strip does not see a key of that strip."""
    return torch.stack([_unseen(spec, strip, 0, spec.seq_len_q, device) for strip in range(spec.area)])


def _unseen(spec: AttentionSpec, strip: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows `start` to `stop` of the mask of one strip."""
    _, width, size = _window(spec)
    tokens = strip * spec.seq_len_k + torch.arange(spec.seq_len_k, device=device)
    y, x = tokens // width, tokens % width
    far_y = (y[start:stop, None] - y).abs() > size // 2
    return far_y | ((x[start:stop, None] - x).abs() > size // 2)


def _window(spec: AttentionSpec) -> Window:
    if spec.window is None:
        raise TypeError("sparse_window got a problem without a window")
    return spec.window


def seen_blocks(spec: AttentionSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks of 128 queries x 128 keys the window touches, and which of them it covers: never N x N scores.

    A block of consecutive tokens is the end of a row, whole rows, and the beginning of a row: three rectangles. The
    window touches a pair of blocks if it touches a pair of their rectangles, and covers it if it covers all pairs.

    Returns:
        Bool `[area, blocks, blocks]` each. A block that reaches beyond the last token counts as not covered.
    """
    window, tokens = _window(spec), spec.seq_len_q
    first = torch.arange(0, tokens, BLOCK, device=device)
    strips = tokens * torch.arange(spec.area, device=device)[:, None]
    start, stop = strips + first, strips + (first + BLOCK).clamp(max=tokens)
    whole = stop - start == BLOCK
    touched = torch.zeros(*whole.shape, whole.shape[-1], dtype=torch.bool, device=device)
    covered = (whole[:, :, None] & whole[:, None, :]).clone()
    for mine, other in itertools.product(_rectangles(start, stop, window.width), repeat=2):
        near, inside, there = _reached(mine, other, window.reach)
        touched |= near & there
        covered &= inside | ~there
    return touched, covered


def _rectangles(start: Tensor, stop: Tensor, width: int) -> Iterator[_Rectangle]:
    """Tokens from `start` on and before `stop`, in an image of that width, as rectangles; some may be empty."""
    top, left = start // width, start % width
    bottom, right = (stop - 1) // width, (stop - 1) % width
    end, zero = torch.full_like(left, width - 1), torch.zeros_like(left)
    yield top, top, left, torch.where(top == bottom, right, end)
    yield top + 1, bottom - 1, zero, end
    yield torch.where(top == bottom, bottom + 1, bottom), bottom, zero, right


def _reached(mine: _Rectangle, other: _Rectangle, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether some, and whether all tokens of two rectangles see each other, and whether both have any."""
    near, inside = [], []
    for side in (0, 2):
        low, high = mine[side][:, :, None], mine[side + 1][:, :, None]
        other_low, other_high = other[side][:, None, :], other[side + 1][:, None, :]
        near.append((other_low - high <= reach) & (low - other_high <= reach))
        inside.append((other_high - low <= reach) & (high - other_low <= reach))
    there = (mine[0] <= mine[1])[:, :, None] & (other[0] <= other[1])[:, None, :]
    return near[0] & near[1], inside[0] & inside[1], there


# Plain operators ------------------------------------------------------------------------------------------------------
class _Plain(torch.autograd.Function):
    """A few queries of one strip at a time, with the keys between the first and the last that they see."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(q, k, v)
        out = v.new_empty(v.shape)
        for queries, keys, hidden in _parts(spec, q.device):
            out[queries] = _attend(q[queries], k[keys], v[keys], hidden)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        given = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(t) for t in given)
        for queries, keys, hidden in _parts(ctx.spec, dout.device):
            with torch.enable_grad():
                q, k, v = (t[at].detach().requires_grad_() for t, at in zip(given, (queries, keys, keys), strict=True))
                out = _attend(q, k, v, hidden)
            grads = torch.autograd.grad(out, (q, k, v), dout[queries])
            for total, at, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
                total[at] += grad
        return dq, dk, dv, None


_Place = tuple[slice, slice, slice]  # in `[groups, heads, tokens, channels]`


def _parts(spec: AttentionSpec, device: torch.device) -> Iterator[tuple[_Place, _Place, Tensor]]:
    """Queries, the keys that may be seen by some of them, and the mask between the two."""
    width, reach = _window(spec).width, _window(spec).reach
    tokens = spec.seq_len_q
    step = max(1, _CPU_SCORES * spec.area // (spec.batch * spec.num_heads * tokens))
    for strip in range(spec.area):
        groups, begin = slice(strip, None, spec.area), strip * tokens
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            low = max(0, ((begin + start) // width - reach) * width - begin)
            high = min(tokens, ((begin + stop - 1) // width + reach + 1) * width - begin)
            hidden = _unseen(spec, strip, start, stop, device)[:, low:high]
            every = slice(None)
            yield (groups, every, slice(start, stop)), (groups, every, slice(low, high)), hidden


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Plain attention, in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ v.to(dtype)).to(v.dtype)


# FlexAttention --------------------------------------------------------------------------------------------------------
def _flex(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """FlexAttention, compiled; where it fails for another reason than memory, the error says what it needs."""
    widened = (_power_of_2(t) for t in (q, k, v))
    try:
        from torch.nn.attention.flex_attention import flex_attention

        out = _program(spec, q)(flex_attention, *widened, _mask(spec, q.device), spec.head_dim**-0.5)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"FlexAttention did not run ({type(error).__name__}: {error}). torch.compile has to work here: a C "
            f"compiler, Triton, and a version of Python that this torch can compile"
        ) from error
    return out[..., : spec.head_dim_v]


def _power_of_2(t: Tensor) -> Tensor:
    """`t` with zero channels up to a power of 2 of at least 16: all that the kernels of torch 2.6 take."""
    dim = max(16, 1 << (t.shape[-1] - 1).bit_length())
    return t if t.shape[-1] == dim else torch.constant_pad_nd(t, (0, dim - t.shape[-1]))


def _program(spec: AttentionSpec, q: Tensor) -> Callable[..., Tensor]:
    """Compiled FlexAttention: for each of the first sizes of a kind of problem, then one for all sizes, as symbols.

    The compiler counts what it made of the code of a function, and gives up after eight; so each program has its own.
    """
    kind = (*spec._replace(window=None).without_sizes(), q.device, q.is_inference())
    size = spec.batch, spec.seq_len_q
    known = _sizes.setdefault(kind, [])
    if size not in known and len(known) < _MAX_SIZES:
        known.append(size)
    key = kind, size if size in known else None
    if key not in _programs:
        code: CodeType = _call.__code__.replace(co_name=f"sparse_window_{next(_numbers)}")
        own = FunctionType(code, _call.__globals__, code.co_name)
        # With a break in the graph FlexAttention might run uncompiled.
        _programs[key] = torch.compile(own, fullgraph=True, dynamic=size not in known)
    return _programs[key]


def _call(flex_attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Any:
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # its kernel for few queries has other limits
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def _mask(spec: AttentionSpec, device: torch.device) -> Any:
    """The block mask of a problem; those used most recently are kept, and all that CUDA graphs hold."""
    key = spec.batch, spec.area, spec.seq_len_q, spec.window, device
    mask = _captured.get(key, _masks.get(key))
    if mask is None:
        with torch.inference_mode(False), torch.no_grad():  # a training may come after a prediction
            mask = _masks[key] = _make_mask(spec, device)
        if len(_masks) > _MAX_MASKS:
            _masks.popitem(last=False)
    elif key in _masks:
        _masks.move_to_end(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = mask
    return mask


def _make_mask(spec: AttentionSpec, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    touched, covered = seen_blocks(spec, device)
    window = _window(spec)
    # Read by the kernel from memory, so that one compiled kernel serves windows and images of all sizes.
    facts = torch.tensor([spec.area, spec.seq_len_q, window.width, window.reach], dtype=torch.int32, device=device)

    def sees(group: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        area, tokens, width, reach = facts[0], facts[1], facts[2], facts[3]
        begin = group % area * tokens
        mine, other = begin + query, begin + key
        dy, dx = mine // width - other // width, mine % width - other % width
        return (dy <= reach) & (dy >= -reach) & (dx <= reach) & (dx >= -reach)

    images = spec.batch // spec.area

    def listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys there are for each block of queries, and all blocks, these before the others."""
        order = wanted.int().argsort(dim=-1, descending=True, stable=True)
        return wanted.sum(-1).int().repeat(images, 1)[:, None], order.int().repeat(images, 1, 1)[:, None]

    partly, wholly = listed(touched & ~covered), listed(covered)
    lengths = spec.seq_len_q, spec.seq_len_k
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)
