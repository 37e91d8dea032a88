"""Triton kernels of attention over packed queries, keys and values: forward, gradient of q, gradients of k and v.

The packed tensor is `[groups, seq_len, num_heads, 2*head_dim + head_dim_v]`, contiguous, as a 1x1 convolution in
channels_last leaves it. Each program owns a tile of rows of one head of one group and walks over the other side:
nothing is added from two programs, so there are no atomics and the bits are the same every time. Scores live in
registers only.

The method is that of FlashAttention-2 (arXiv 2307.08691), with two changes for short rows and a small head_dim, where
one waits for everything but the matrix units. Rows and keys that do not fill a tile go through a smaller one: 400
tokens are six tiles of 64 and one of 16. The gradients take it first: behind a loop, it makes the compiler for Hopper
wait for each product of the loop. And the running maximum of the scores is taken from the first tile of keys only, with
room above: if later scores leave that room, which the sums show, the tile of queries is computed again, with a maximum
that follows the scores.

Arguments that the functions share:
    row_stride: Elements from a token to the next in the packed tensor; `out_stride` in the output.
    limit: Rows that exist, counted from the tile's first; more are masked if RAGGED.
    scale: log2(e) / sqrt(head_dim), so that exponentials have base 2.
    DIM, DIM_V: Channels of a key and of a value. WIDTH, WIDTH_V: Powers of two that hold them.
    ROWS, BLOCK: Rows that a program owns, and rows of the other side that it takes in a step.
    ROWS_TAIL, TAIL: Powers of two that hold the rest of seq_len by ROWS and by BLOCK; 0 where there is none.
    STAGES: Steps whose tiles are in shared memory at once.
    PTX: Whether exponentials may be written in PTX; the interpreter cannot read it.
"""

import triton
import triton.language as tl

from ..machine import release

# Above it a sum of exponentials may contain one that float16 cannot hold (65504).
_HIGHEST_SUM = tl.constexpr(60000.0)
# The first tile's maximum becomes 2**-8: later scores may exceed it by 16 (natural logarithm), and exponentials of
# 2**-6 of the largest are still normal numbers in float16.
_ROOM = tl.constexpr(8.0)
# Columns of ones that exponentials are multiplied with to sum them, all of one result: as few as Triton takes.
_SUMS = tl.constexpr(8 if release(triton.__version__) >= (3, 5) else 16)


@triton.jit
def _load(pointer, stride, limit, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """`[ROWS, WIDTH]` from memory, zeros where nothing is."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    at = pointer + rows * stride + columns
    if RAGGED and WIDTH != DIM:
        return tl.load(at, mask=(rows < limit) & (columns < DIM), other=0.0)
    if RAGGED:
        return tl.load(at, mask=rows < limit, other=0.0)
    if WIDTH != DIM:
        return tl.load(at, mask=columns < DIM, other=0.0)
    return tl.load(at)


@triton.jit
def _store(pointer, stride, tile, limit, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """`[ROWS, WIDTH]` to memory, as far as it exists."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    mask = rows < limit
    if WIDTH != DIM:
        mask = mask & (columns < DIM)
    tl.store(pointer + rows * stride + columns, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    """2**x; in PTX flushed to zero, which saves three instructions."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _place(seq_len, num_heads, DIM: tl.constexpr, DIM_V: tl.constexpr, ROWS: tl.constexpr):
    """Where a program works: its first row, and the offsets of its group and head.

    Returns:
        First row; offsets in the packed tensor, in the output and in the statistics; strides of the first two.
    """
    tiles = tl.cdiv(seq_len, ROWS)
    start = tl.program_id(0) % tiles * ROWS
    group = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // tiles % num_heads
    row_stride = num_heads * (2 * DIM + DIM_V)
    out_stride = num_heads * DIM_V
    packed = group * seq_len * row_stride + head * (2 * DIM + DIM_V)
    out = group * seq_len * out_stride + head * DIM_V
    statistics = (group * num_heads + head) * (tl.cdiv(seq_len, 16) * 16)  # aligned rows are loaded faster
    return start, packed, out, statistics, row_stride, out_stride


# Forward --------------------------------------------------------------------------------------------------------------
@triton.jit
def _attend_keys(
    q, keys, shift, total, acc, row_stride, limit, scale, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr, FOLLOW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values into the sums of exponentials and the outputs, both relative to 2**shift.

    If FOLLOW, the shift becomes at least the highest score of the tile, with room above, and the sums follow it.
    """
    k = _load(keys, row_stride, limit, DIM, WIDTH, BLOCK, RAGGED)
    v = _load(keys + DIM, row_stride, limit, DIM_V, WIDTH_V, BLOCK, RAGGED)
    scores = tl.dot(q, tl.trans(k))
    if RAGGED:
        scores = tl.where(tl.arange(0, BLOCK)[None, :] < limit, scores, -float("inf"))
    if FOLLOW:
        higher = tl.maximum(shift, tl.max(scores, 1) * scale + _ROOM)
        # Without a score above -inf yet: the difference of infinities would make the row NaN for good.
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        decay = _exp2(shift - finite, PTX)
        acc = acc * decay[:, None]
        total = total * decay[:, None]
        shift = higher
    else:
        finite = shift  # from -inf, the sums become infinite or NaN, and the tile is computed again
    # Rounded before they are summed, so that the weights of a row add up to 1 whatever the rounding of large scores.
    p = _exp2(scores * scale - finite[:, None], PTX).to(v.dtype)
    total = tl.dot(p, tl.full([BLOCK, _SUMS], 1.0, v.dtype), total)
    acc = tl.dot(p, v, acc)
    return shift, total, acc


@triton.jit
def _attend_all(
    q, keys, row_stride, seq_len, scale, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    FOLLOW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """All keys of a head. If not FOLLOW, the first tile sets the shift of the others."""
    shift = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, _SUMS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    whole = seq_len // BLOCK * BLOCK
    if whole > 0:
        shift, total, acc = _attend_keys(
            q, keys, shift, total, acc, row_stride, BLOCK, scale,
            DIM, DIM_V, WIDTH, WIDTH_V, BLOCK, False, True, PTX,
        )  # fmt: skip
        keys += BLOCK * row_stride
    for _ in tl.range(BLOCK, whole, BLOCK, num_stages=STAGES):
        shift, total, acc = _attend_keys(
            q, keys, shift, total, acc, row_stride, BLOCK, scale,
            DIM, DIM_V, WIDTH, WIDTH_V, BLOCK, False, FOLLOW, PTX,
        )  # fmt: skip
        keys += BLOCK * row_stride
    if TAIL:  # perhaps the first tile, and always a small one
        shift, total, acc = _attend_keys(
            q, keys, shift, total, acc, row_stride, seq_len - whole, scale,
            DIM, DIM_V, WIDTH, WIDTH_V, TAIL, True, True, PTX,
        )  # fmt: skip
    return shift, tl.max(total, 1), acc


@triton.jit
def _forward_rows(
    qkv, out, image, lse, seq_len, start, row_stride, out_stride, scale, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Outputs, copy of v and log-sum-exp of the tokens from `start` on."""
    limit = seq_len - start
    own = qkv + start.to(tl.int64) * row_stride
    q = _load(own, row_stride, limit, DIM, WIDTH, ROWS, RAGGED)
    shift, total, acc = _attend_all(
        q, qkv + DIM, row_stride, seq_len, scale, DIM, DIM_V, WIDTH, WIDTH_V, ROWS, BLOCK, TAIL, STAGES, False, PTX
    )
    if tl.min(((total > 0) & (total < _HIGHEST_SUM)).to(tl.int32)) == 0:  # too low, too high, or NaN
        shift, total, acc = _attend_all(
            q, qkv + DIM, row_stride, seq_len, scale, DIM, DIM_V, WIDTH, WIDTH_V, ROWS, BLOCK, TAIL, STAGES, True, PTX
        )
    at = start.to(tl.int64) * out_stride
    _store(out + at, out_stride, acc * (1 / total)[:, None], limit, DIM_V, WIDTH_V, ROWS)
    v = _load(own + 2 * DIM, row_stride, limit, DIM_V, WIDTH_V, ROWS, RAGGED)
    _store(image + at, out_stride, v, limit, DIM_V, WIDTH_V, ROWS)
    rows = tl.arange(0, ROWS)
    tl.store(lse + start + rows, tl.where(shift == -float("inf"), 0.0, shift) + tl.log2(total), mask=rows < limit)


@triton.jit(do_not_specialize=["seq_len", "num_heads"])
def area_forward(
    qkv, out, image, lse, seq_len, num_heads, scale, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, ROWS: tl.constexpr, ROWS_TAIL: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention and a contiguous copy of v.

    Args:
        qkv: The packed tensor.
        out: Receives softmax(q k^T / sqrt(DIM)) v, `[groups, seq_len, num_heads, DIM_V]`.
        image: Receives v, like out.
        lse: Receives log2 of the sums of exponentials, float32
            `[groups, num_heads, seq_len rounded up to 16]`, whose padding stays as it is.
    """
    start, packed, at, statistics, row_stride, out_stride = _place(seq_len, num_heads, DIM, DIM_V, ROWS)
    if ROWS_TAIL:
        if start + ROWS > seq_len:
            _forward_rows(
                qkv + packed, out + at, image + at, lse + statistics, seq_len, start, row_stride, out_stride, scale,
                DIM, DIM_V, WIDTH, WIDTH_V, ROWS_TAIL, True, BLOCK, TAIL, STAGES, PTX,
            )  # fmt: skip
            return
    _forward_rows(
        qkv + packed, out + at, image + at, lse + statistics, seq_len, start, row_stride, out_stride, scale,
        DIM, DIM_V, WIDTH, WIDTH_V, ROWS, False, BLOCK, TAIL, STAGES, PTX,
    )  # fmt: skip


# Backward -------------------------------------------------------------------------------------------------------------
@triton.jit
def _dq_keys(
    q, dout, keys, lse, delta, dq, row_stride, limit, scale, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values into the gradients of a tile of queries."""
    k = _load(keys, row_stride, limit, DIM, WIDTH, BLOCK, RAGGED)
    v = _load(keys + DIM, row_stride, limit, DIM_V, WIDTH_V, BLOCK, RAGGED)
    scores = tl.dot(q, tl.trans(k))
    dp = tl.dot(dout, tl.trans(v))
    if RAGGED:  # a key of zeros has score 0, whose exponential may be infinite here
        scores = tl.where(tl.arange(0, BLOCK)[None, :] < limit, scores, -float("inf"))
    p = _exp2(scores * scale - lse[:, None], PTX)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def _backward_q_rows(
    qkv, out, dout, lse, deltas, dqkv, seq_len, start, row_stride, out_stride, scale, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    limit = seq_len - start
    rows = tl.arange(0, ROWS)
    at = start.to(tl.int64) * out_stride
    dout_tile = _load(dout + at, out_stride, limit, DIM_V, WIDTH_V, ROWS, RAGGED)
    out_tile = _load(out + at, out_stride, limit, DIM_V, WIDTH_V, ROWS, RAGGED)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    tl.store(deltas + start + rows, delta, mask=rows < limit)
    lse_tile = tl.load(lse + start + rows, mask=rows < limit, other=float("inf"))
    q = _load(qkv + start.to(tl.int64) * row_stride, row_stride, limit, DIM, WIDTH, ROWS, RAGGED)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    whole = seq_len // BLOCK * BLOCK
    keys = qkv + DIM
    if TAIL:
        dq = _dq_keys(
            q, dout_tile, keys + whole.to(tl.int64) * row_stride, lse_tile, delta, dq, row_stride, seq_len - whole,
            scale, DIM, DIM_V, WIDTH, WIDTH_V, TAIL, True, PTX,
        )  # fmt: skip
    for _ in tl.range(0, whole, BLOCK, num_stages=STAGES):
        dq = _dq_keys(
            q, dout_tile, keys, lse_tile, delta, dq, row_stride, BLOCK, scale,
            DIM, DIM_V, WIDTH, WIDTH_V, BLOCK, False, PTX,
        )  # fmt: skip
        keys += BLOCK * row_stride
    dq *= scale * 0.6931471805599453  # ln(2): of the scores' own scale
    _store(dqkv + start.to(tl.int64) * row_stride, row_stride, dq, limit, DIM, WIDTH, ROWS)


@triton.jit(do_not_specialize=["seq_len", "num_heads"])
def area_backward_q(
    qkv, out, dout, lse, deltas, dqkv, seq_len, num_heads, scale, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, ROWS_TAIL: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and what the other gradients need of each query.

    Args:
        qkv: The packed tensor.
        out: Output of the forward.
        dout: Gradient of out, like it.
        lse: Statistics of the forward.
        deltas: Receives the sums of out * dout over the channels, like lse.
        dqkv: Receives the gradient of q in q's place, like qkv.
    """
    start, packed, at, statistics, row_stride, out_stride = _place(seq_len, num_heads, DIM, DIM_V, ROWS)
    if ROWS_TAIL:
        if start + ROWS > seq_len:
            _backward_q_rows(
                qkv + packed, out + at, dout + at, lse + statistics, deltas + statistics, dqkv + packed, seq_len,
                start, row_stride, out_stride, scale,
                DIM, DIM_V, WIDTH, WIDTH_V, ROWS_TAIL, True, BLOCK, TAIL, STAGES, PTX,
            )  # fmt: skip
            return
    _backward_q_rows(
        qkv + packed, out + at, dout + at, lse + statistics, deltas + statistics, dqkv + packed, seq_len,
        start, row_stride, out_stride, scale,
        DIM, DIM_V, WIDTH, WIDTH_V, ROWS, False, BLOCK, TAIL, STAGES, PTX,
    )  # fmt: skip


@triton.jit
def _dkv_queries(
    k, v, queries, dout, lse, deltas, dk, dv, row_stride, out_stride, limit, scale, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """A tile of queries into the gradients of a tile of keys and values; the scores lie keys by queries."""
    q = _load(queries, row_stride, limit, DIM, WIDTH, BLOCK, RAGGED)
    dout_tile = _load(dout, out_stride, limit, DIM_V, WIDTH_V, BLOCK, RAGGED)
    rows = tl.arange(0, BLOCK)[None, :]
    if RAGGED:  # an infinite sum makes the weight of a query that does not exist zero
        lse_tile = tl.load(lse + rows, mask=rows < limit, other=float("inf"))
        delta = tl.load(deltas + rows, mask=rows < limit, other=0.0)
    else:
        lse_tile = tl.load(lse + rows)
        delta = tl.load(deltas + rows)
    scores = tl.dot(k, tl.trans(q))
    dp = tl.dot(v, tl.trans(dout_tile))  # begun before the exponentials, which wait for the scores alone
    if RAGGED:  # a query of zeros and a key of infinities have a score of NaN
        scores = tl.where(rows < limit, scores, 0.0)
    p = _exp2(scores * scale - lse_tile, PTX)
    dv = tl.dot(p.to(v.dtype), dout_tile, dv)
    ds = p * (dp - delta)
    return tl.dot(ds.to(k.dtype), q, dk), dv


@triton.jit
def _backward_kv_rows(
    qkv, dout, dimage, lse, deltas, dqkv, seq_len, start, row_stride, out_stride, scale, DIM: tl.constexpr,
    DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    limit = seq_len - start
    at = start.to(tl.int64) * row_stride + DIM
    k = _load(qkv + at, row_stride, limit, DIM, WIDTH, ROWS, RAGGED)
    v = _load(qkv + at + DIM, row_stride, limit, DIM_V, WIDTH_V, ROWS, RAGGED)
    dk = tl.zeros([ROWS, WIDTH], tl.float32)
    dv = tl.zeros([ROWS, WIDTH_V], tl.float32)
    whole = seq_len // BLOCK * BLOCK
    if TAIL:
        rest = whole.to(tl.int64)
        dk, dv = _dkv_queries(
            k, v, qkv + rest * row_stride, dout + rest * out_stride, lse + whole, deltas + whole, dk, dv, row_stride,
            out_stride, seq_len - whole, scale, DIM, DIM_V, WIDTH, WIDTH_V, TAIL, True, PTX,
        )  # fmt: skip
    queries = qkv
    douts = dout
    for begin in tl.range(0, whole, BLOCK, num_stages=STAGES):
        dk, dv = _dkv_queries(
            k, v, queries, douts, lse + begin, deltas + begin, dk, dv, row_stride, out_stride, BLOCK, scale,
            DIM, DIM_V, WIDTH, WIDTH_V, BLOCK, False, PTX,
        )  # fmt: skip
        queries += BLOCK * row_stride
        douts += BLOCK * out_stride
    dk *= scale * 0.6931471805599453  # ln(2): of the scores' own scale
    _store(dqkv + at, row_stride, dk, limit, DIM, WIDTH, ROWS)
    dimage += start.to(tl.int64) * out_stride
    dv += _load(dimage, out_stride, limit, DIM_V, WIDTH_V, ROWS, RAGGED).to(tl.float32)
    _store(dqkv + at + DIM, row_stride, dv, limit, DIM_V, WIDTH_V, ROWS)


@triton.jit(do_not_specialize=["seq_len", "num_heads"])
def area_backward_kv(
    qkv, dout, dimage, lse, deltas, dqkv, seq_len, num_heads, scale, DIM: tl.constexpr, DIM_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ROWS: tl.constexpr, ROWS_TAIL: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v; a program owns keys and walks over queries.

    Args:
        qkv: The packed tensor.
        dout: Gradient of the forward's out, like it.
        dimage: Gradient of the forward's copy of v, like it.
        lse: Statistics of the forward.
        deltas: Statistics of `area_backward_q`.
        dqkv: Receives the gradients of k and v in their places, like qkv.
    """
    start, packed, at, statistics, row_stride, out_stride = _place(seq_len, num_heads, DIM, DIM_V, ROWS)
    if ROWS_TAIL:
        if start + ROWS > seq_len:
            _backward_kv_rows(
                qkv + packed, dout + at, dimage + at, lse + statistics, deltas + statistics, dqkv + packed, seq_len,
                start, row_stride, out_stride, scale,
                DIM, DIM_V, WIDTH, WIDTH_V, ROWS_TAIL, True, BLOCK, TAIL, STAGES, PTX,
            )  # fmt: skip
            return
    _backward_kv_rows(
        qkv + packed, dout + at, dimage + at, lse + statistics, deltas + statistics, dqkv + packed, seq_len,
        start, row_stride, out_stride, scale,
        DIM, DIM_V, WIDTH, WIDTH_V, ROWS, False, BLOCK, TAIL, STAGES, PTX,
    )  # fmt: skip
