"""Approximate attention: a query sees the keys within a square around it in the image, and no others.

On a GPU torch's FlexAttention computes it, compiled by inductor, with a block mask that skips all blocks of 128 x 128
scores that the window does not touch. Tokens are sorted by tiles of 8 x 16 first: row by row, 128 of them reach so far
that windows touch two to four times as many blocks. FlexAttention without the compiler would write the whole score
matrix to memory, and is never called. It has no backward on a CPU: there plain operators compute the same, a few
queries at a time.

An image of `area` strips keeps them, so that a window as large as the image gives what the stock block gives: a query
sees the keys that lie in its strip and in its square.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..machine import Machine
from ..utils.errors import is_out_of_memory
from .backend import Backend, always
from .calls import widen
from .conditions import capability, fits
from .spec import AttentionSpec, Window

OPERATOR = "yolo_flash::sparse_window"
"""Name of a forward in a profile."""

BLOCK = 128  # queries and keys of a block of FlexAttention's masks; the least that its kernels take in all versions
_TILE = 8, 16  # rows and columns of tokens that make a block
_MAX_PATTERNS = 16
_MAX_SIZES = 3  # of a kind of problem for which there are programs of their own
_CPU_SCORES = 2**24  # of one step of the plain operators: 64 MiB in float32

_patterns: OrderedDict[Any, _Pattern] = OrderedDict()
_captured: dict[Any, _Pattern] = {}  # those whose memory CUDA graphs read in every replay
_sizes: dict[Any, list[tuple[int, int]]] = {}
_programs: dict[Any, Callable[..., Tensor]] = {}
_numbers = itertools.count()
_lock = threading.Lock()


def limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlexAttention of torch on NVIDIA's cards from Ampere on and on AMD's, and plain operators on the CPU."""
    if spec.layout == "separate":
        yield "needs an image, and the queries of nn.MultiheadAttention have no place in one"
    elif spec.window is None:
        yield "needs the height and width of the image, which a graph of torch.compile leaves open: compile=False"
    if machine.kind == "cpu":
        return
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA, ROCm and the CPU, the device is {machine}"
        return
    yield from capability(machine, (8, 0))  # torch itself tests FlexAttention from there on
    if machine.release < (2, 6):
        yield f"needs torch >= 2.6, found {machine.torch}: block masks of before know no sequence length"
    found = machine.packages.get("triton", "none")
    if not found[:1].isdigit():
        yield f"needs triton, which torch.compile generates code for: its import gave {found}"
    yield from fits(spec, machine, (torch.float32, torch.float16, torch.bfloat16), 256)
    if spec.batch * spec.num_heads > 65535:
        yield f"needs batch x area x heads <= 65535, found {spec.batch * spec.num_heads}"


def attend(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention within the window, and v: see `Backend.forward`.

    Raises:
        RuntimeError: FlexAttention cannot be compiled here.
    """
    image = packed[..., 2 * spec.head_dim :].contiguous()
    # The scores are those of `spec.dtype` in any case; autocast would be one more thing that compiled code depends on.
    with record_function(OPERATOR), torch.autocast(packed.device.type, enabled=False):
        if packed.device.type != "cpu":
            return _flex(packed, spec), image
        out: Tensor = _Plain.apply(*_heads_first(packed, spec), spec)
        return out.transpose(1, 2).contiguous(), image


def _heads_first(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """Queries, keys and values as views `[groups, heads, tokens, channels]`."""
    parts = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    return tuple(t.transpose(1, 2) for t in parts)


SPARSE_WINDOW = Backend("sparse_window", limits, attend, always, (OPERATOR,), by_name="approximate", color="#117733")


# The window -----------------------------------------------------------------------------------------------------------
def unseen(spec: AttentionSpec, device: torch.device) -> Tensor:
    """Bool `[area, seq_len, seq_len]`, True where a query of a strip does not see a key of that strip."""
    return torch.stack([_unseen(spec, strip, 0, spec.seq_len_q, device) for strip in range(spec.area)])


def _unseen(spec: AttentionSpec, strip: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows `start` to `stop` of the mask of one strip."""
    width, reach = _window(spec).width, _window(spec).reach
    tokens = strip * spec.seq_len_k + torch.arange(spec.seq_len_k, device=device)
    y, x = tokens // width, tokens % width
    far_y = (y[start:stop, None] - y).abs() > reach
    return far_y | ((x[start:stop, None] - x).abs() > reach)


def _window(spec: AttentionSpec) -> Window:
    if spec.window is None:
        raise TypeError("sparse_window got a problem without a window")
    return spec.window


def tiled(spec: AttentionSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of each strip tile by tile: their order, and the rows and columns in which they lie, so sorted.

    Returns:
        Integers `[area, seq_len]` each.
    """
    tokens, width = spec.seq_len_q, _window(spec).width
    place = torch.arange(spec.area * tokens, device=device).view(spec.area, tokens)
    y, x = place // width, place % width
    tile = (y - y[:, :1]) // _TILE[0] * -(-width // _TILE[1]) + x // _TILE[1]
    order = tile.argsort(dim=1, stable=True)
    return order, y.gather(1, order), x.gather(1, order)


def seen_blocks(y: Tensor, x: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Which blocks of 128 queries x 128 keys a window touches, and which it covers: never N x N scores.

    A block counts as the rectangle around its tokens: all blocks that are touched are among the first, and those among
    the second are covered; between the two the kernel asks for each score.

    Args:
        y: Rows of the sorted tokens, `[area, seq_len]`.
        x: Their columns.
        reach: Rows and columns that a query sees to each side.

    Returns:
        Bool `[area, blocks, blocks]` each. A block that reaches beyond the last token counts as not covered.
    """
    tokens = y.shape[1]
    inside = torch.arange(-(-tokens // BLOCK) * BLOCK, device=y.device)
    whole = (inside < tokens).view(-1, BLOCK).all(1)
    covered = (whole[:, None] & whole).expand(len(y), -1, -1)
    touched = torch.ones_like(covered)
    for places in (y, x):
        blocks = places[:, inside.clamp(max=tokens - 1)].unflatten(1, (-1, BLOCK))
        low, high = blocks.amin(2), blocks.amax(2)
        span = high[:, :, None] - low[:, None, :]  # from the first key to the last query, and back by the transpose
        gap = low[:, :, None] - high[:, None, :]
        touched = touched & (gap <= reach) & (gap.mT <= reach)
        covered = covered & (span <= reach) & (span.mT <= reach)
    return touched, covered


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
class _Pattern(NamedTuple):
    """What FlexAttention needs to know of a window in an image."""

    mask: Any  # torch's BlockMask
    order: Tensor  # of all tokens of an image, `[area * seq_len]`, strip by strip
    inverse: Tensor


class _Reordered(torch.autograd.Function):
    """Tokens in another order. The gradient of torch's own operator would be a sum, with atomics."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.orders = order, inverse
        return _taken(t, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _taken(grad, ctx.orders[1]), None, None


def _taken(t: Tensor, order: Tensor) -> Tensor:
    """`t` of `[groups, tokens, heads, channels]`, its tokens in the order given for an image."""
    return t.reshape(-1, len(order), t.shape[2] * t.shape[3]).index_select(1, order).view(t.shape)


def _flex(packed: Tensor, spec: AttentionSpec) -> Tensor:
    """FlexAttention, compiled; where it fails for another reason than memory, the error says what it needs."""
    mask, order, inverse = _pattern(spec, packed.device)
    packed = _Reordered.apply(packed, order, inverse)
    q, k, v = map(_power_of_2, _heads_first(packed, spec))
    try:
        from torch.nn.attention.flex_attention import flex_attention

        out = _program(spec, q)(flex_attention, q, k, v, mask, spec.head_dim**-0.5)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"FlexAttention did not run ({type(error).__name__}: {error}). torch.compile has to work here: a C "
            f"compiler, Triton, and a version of Python that this torch can compile"
        ) from error
    found: Tensor = _Reordered.apply(out.transpose(1, 2)[..., : spec.head_dim_v], inverse, order)
    return found


def _power_of_2(t: Tensor) -> Tensor:
    """`t` with zero channels up to a power of 2 of at least 16: all that the kernels of torch 2.6 take."""
    return widen(t, max(16, 1 << (t.shape[-1] - 1).bit_length()))


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


def _pattern(spec: AttentionSpec, device: torch.device) -> _Pattern:
    """The pattern of a problem; those used most recently are kept, and all that CUDA graphs hold."""
    key = spec.batch, spec.area, spec.seq_len_q, spec.window, device
    with _lock:  # of threads that predict at the same time
        pattern = _captured.get(key, _patterns.get(key))
        if pattern is None:
            with torch.inference_mode(False), torch.no_grad():  # a training may come after a prediction
                pattern = _make_pattern(spec, device)
        _patterns[key] = pattern
        _patterns.move_to_end(key)
        if len(_patterns) > _MAX_PATTERNS:
            _patterns.popitem(last=False)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[key] = pattern
    return pattern


def _make_pattern(spec: AttentionSpec, device: torch.device) -> _Pattern:
    from torch.nn.attention.flex_attention import BlockMask

    images, reach = spec.batch // spec.area, _window(spec).reach
    order, y, x = tiled(spec, device)
    touched, covered = seen_blocks(y, x, reach)
    # Read by the kernel from memory, so that one compiled kernel serves windows and images of all sizes.
    facts = torch.tensor([spec.area, reach], dtype=torch.int32, device=device)
    rows, columns = y.int(), x.int()

    def sees(group: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        strip, most = group % facts[0], facts[1]
        dy = rows[strip, query] - rows[strip, key]
        dx = columns[strip, query] - columns[strip, key]
        return (dy <= most) & (dy >= -most) & (dx <= most) & (dx >= -most)

    def listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys there are for each block of queries, and all blocks, these before the others."""
        first = wanted.int().argsort(dim=-1, descending=True, stable=True)
        return wanted.sum(-1).int().repeat(images, 1)[:, None], first.int().repeat(images, 1, 1)[:, None]

    partly, wholly = listed(touched & ~covered), listed(covered)
    lengths = spec.seq_len_q, spec.seq_len_k
    mask = BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)
    flat = (order + spec.seq_len_q * torch.arange(spec.area, device=device)[:, None]).flatten()
    return _Pattern(mask, flat, flat.argsort())
