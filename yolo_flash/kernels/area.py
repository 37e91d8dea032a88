"""`yolo_flash::area_attention`: attention over the packed output of a 1x1 convolution, as torch operators.

The operators have fake kernels and an autograd formula, so that they run under torch.compile, in CUDA graphs, with
autocast and DDP. Both directions give the same bits every time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .operators import call

Kernel = Literal["area_forward", "area_backward_q", "area_backward_kv"]

HEAD_DIM_MAX = 128


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        rows: Rows that a program owns: queries, or keys in `area_backward_kv`.
        block: Rows of the other side that it takes in a step.
        num_warps: Warps of a program.
        num_stages: Steps whose tiles are in shared memory at once.
        max_registers: Registers of a thread at most: fewer let more programs share a multiprocessor. None: no limit.
    """

    rows: int
    block: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def tiles_for(kernel: Kernel, seq_len: int, head_dim: int, head_dim_v: int, capability: tuple[int, int]) -> Tiles:
    """The tiles of a kernel: on Hopper as measured (docs/results/area-h100.md), elsewhere tiles that fit every card.

    Blackwell does not get Hopper's: an RTX 5090 has less shared memory, and the tiles were not measured on a B200.
    """
    width = _power_of_2(head_dim) + _power_of_2(head_dim_v)
    hopper = capability[0] == 9
    if width > 96:  # of all YOLO models only YOLOv10m has such heads: one choice that fits every card
        block = 64 if kernel == "area_forward" and width <= 128 else 32
        return Tiles(64, block, 4, 2) if width <= 192 else Tiles(64, 32, 4, 1)
    if not hopper:
        return Tiles(64, 64 if kernel == "area_forward" else 32, 4, 3)
    if kernel == "area_forward":
        return Tiles(64, 64, 4, 3, 80 if width <= 64 else None)
    if kernel == "area_backward_q":
        return Tiles(64, 32, 4, 4) if width <= 64 and seq_len < 1024 else Tiles(64, 64, 4, 3)
    if width <= 64 and seq_len < 8192:
        return Tiles(64, 32, 4, 3, 96) if seq_len < 2048 else Tiles(128, 64, 4, 3)
    return Tiles(128, 32, 4, 3, 168 if width <= 64 else None)


# Operators ------------------------------------------------------------------------------------------------------------
_library = torch.library.Library("yolo_flash", "DEF")
_library.define("area_attention(Tensor qkv, int head_dim) -> (Tensor, Tensor, Tensor)")
_library.define(
    "area_attention_backward(Tensor qkv, Tensor out, Tensor lse, Tensor dout, Tensor dimage, int head_dim) -> Tensor"
)


def _outputs(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.ndim != 4 or not 0 < 2 * head_dim < qkv.shape[-1]:
        raise ValueError(
            f"expected [groups, seq_len, num_heads, 2*head_dim + head_dim_v] with head_dim {head_dim}, "
            f"found {list(qkv.shape)}."
        )
    groups, seq_len, num_heads, packed = qkv.shape
    if (largest := max(head_dim, packed - 2 * head_dim)) > HEAD_DIM_MAX:
        raise ValueError(f"head dims go up to {HEAD_DIM_MAX}, found {largest}.")
    shape = (groups, seq_len, num_heads, packed - 2 * head_dim)
    lse = qkv.new_empty((groups, num_heads, (seq_len + 15) // 16 * 16), dtype=torch.float32)
    return qkv.new_empty(shape), qkv.new_empty(shape), lse


def _forward(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact attention within each group and head: softmax(q k^T / sqrt(head_dim)) v.

    Args:
        qkv: Queries, keys and values `[groups, seq_len, num_heads, 2*head_dim + head_dim_v]`, float16 or bfloat16, on a
            CUDA device of compute capability 8.0 or above.
        head_dim: Channels of a query and of a key.

    Returns:
        Attention, and a copy of v for the positional convolution: both contiguous
        `[groups, seq_len, num_heads, head_dim_v]`, of the dtype of `qkv`; and the statistics for the backward.

    Raises:
        ValueError: `qkv` has another shape, or a head_dim is above 128.
    """
    qkv = qkv.contiguous()
    out, image, lse = _outputs(qkv, head_dim)
    launch("area_forward", qkv, head_dim, (qkv, out, image, lse))
    return out, image, lse


def _backward(qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dimage: Tensor, head_dim: int) -> Tensor:
    qkv, dout, dimage = qkv.contiguous(), dout.contiguous(), dimage.contiguous()
    deltas, dqkv = torch.empty_like(lse), torch.empty_like(qkv)
    launch("area_backward_q", qkv, head_dim, (qkv, out, dout, lse, deltas, dqkv))
    launch("area_backward_kv", qkv, head_dim, (qkv, dout, dimage, lse, deltas, dqkv))
    return dqkv


def try_backward(qkv: Tensor, head_dim: int) -> None:
    """Raise before the forward what the backward would raise, see `_try_backward`."""
    if qkv.is_cuda and type(qkv) is Tensor and qkv.numel():  # neither in Triton's interpreter nor under a tracer
        _try_backward(qkv.shape[1], qkv.shape[3], head_dim, qkv.dtype, qkv.device)


@functools.lru_cache(maxsize=256)
def _try_backward(seq_len: int, packed: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and run the backward on one head, once a shape.

    An error here, in a forward, lets another backend run; an error in a backward of the operator would end the run.
    """
    qkv = torch.zeros(1, seq_len, 1, packed, dtype=dtype, device=device)
    out, image, lse = _outputs(qkv, head_dim)
    _backward(qkv, out.zero_(), lse.zero_(), image.zero_(), image, head_dim)


class Problem(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        seq_len: Tokens of a group.
        head_dim: Channels of a query and of a key.
        head_dim_v: Channels of a value.
        dtype: Of the packed tensor.
        backward: Whether the gradients are needed too.
    """

    seq_len: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    backward: bool


def compile_ahead(problems: Iterable[Problem], device: torch.device) -> None:
    """Compile the kernels of problems for a device side by side, which the first calls would do one by one.

    What cannot be compiled raises in its first call, and not here.
    """
    jobs: dict[Any, tuple[Kernel, Problem]] = {}  # by what makes a kernel another one
    for problem in problems:
        seq_len, head_dim, head_dim_v, dtype, backward = problem
        kernels: tuple[Kernel, ...] = ("area_forward", "area_backward_q", "area_backward_kv")
        for kernel in kernels if backward else kernels[:1]:
            tiles = tiles_for(kernel, seq_len, head_dim, head_dim_v, _capability(device.index))
            constants = constants_of(tiles, seq_len, head_dim, head_dim_v, ptx=True)
            jobs.setdefault((kernel, dtype, tiles, *constants.values()), (kernel, problem))
    with ThreadPoolExecutor(max_workers=max(1, len(jobs))) as pool:
        for job in [pool.submit(_compile, *job, device) for job in jobs.values()]:
            with contextlib.suppress(Exception):
                job.result()


def _compile(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    """Run a kernel on one head, and on values of no meaning."""
    seq_len, head_dim, head_dim_v, dtype, _ = problem
    qkv = torch.zeros(1, seq_len, 1, 2 * head_dim + head_dim_v, dtype=dtype, device=device)
    out, image, lse = (tensor.zero_() for tensor in _outputs(qkv, head_dim))
    tensors: tuple[Tensor, ...] = qkv, out, image, lse
    if kernel != "area_forward":  # both take three tensors, the statistics, and what they write
        tensors = *tensors, torch.zeros_like(lse), torch.zeros_like(qkv)
    launch(kernel, qkv, head_dim, tensors)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, ctx.head_dim = inputs
    out, _, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)
    try_backward(qkv, ctx.head_dim)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dimage: Tensor | None, dlse: None) -> tuple[Tensor | None, None]:
    qkv, out, lse = ctx.saved_tensors
    if dout is None and dimage is None:
        return None, None
    dout = torch.zeros_like(out) if dout is None else dout
    dimage = torch.zeros_like(out) if dimage is None else dimage
    return call("area_attention_backward", qkv, out, lse, dout, dimage, ctx.head_dim), None


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise NotImplementedError(
        "area_attention has no gradient of its gradient (create_graph=True); flash.backend=sdpa_math has one."
    )


_library.impl("area_attention", _forward, "CompositeExplicitAutograd")
_library.impl("area_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("yolo_flash::area_attention", _outputs, lib=_library)
torch.library.register_fake(
    "yolo_flash::area_attention_backward",
    lambda qkv, out, lse, dout, dimage, head_dim: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    lib=_library,
)
torch.library.register_autograd("yolo_flash::area_attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("yolo_flash::area_attention_backward", _refuse, lib=_library)


# Launch ---------------------------------------------------------------------------------------------------------------
def launch(kernel: Kernel, qkv: Tensor, head_dim: int, tensors: tuple[Tensor, ...], tiles: Tiles | None = None) -> None:
    """Start a kernel on its tensors, all contiguous, for the sizes of `qkv`; measurements bring tiles of their own."""
    if qkv.numel() == 0:
        return
    device = qkv.device.index
    kinds = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    start = _prepare(kernel, qkv.shape, head_dim, device, kinds, tiles)
    if device is None or device == torch.cuda.current_device():
        start(tensors)
    else:
        with torch.cuda.device(device):
            start(tensors)


class _Launcher:
    """Starts one kernel on tensors of the same shapes, dtypes and alignments, on one device.

    The first launch is Triton's, which compiles. Each launch by Triton inspects every argument, which takes 6 us in
    version 3.8: later launches call the compiled kernel directly, in a tenth of that.
    """

    def __init__(self, function: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        self._function, self._grid = function, (programs, 1, 1)
        self._arguments, self._options = arguments, options
        self._run: Callable[..., object] | None = None

    def __call__(self, tensors: tuple[Tensor, ...]) -> None:
        if self._run is not None:
            self._run(*tensors, *self._arguments)
            return
        compiled = self._function[self._grid](*tensors, *self._arguments, **self._options)
        self._run = None if compiled is None else compiled[self._grid]  # Triton's interpreter compiles nothing


@functools.lru_cache(maxsize=1024)
def _prepare(
    kernel: Kernel,
    sizes: tuple[int, ...],
    head_dim: int,
    device: int | None,
    kinds: tuple[tuple[torch.dtype, bool], ...],
    tiles: Tiles | None,
) -> _Launcher:
    """The launcher of a kernel, compiled for these arguments; `kinds` are dtype and alignment of each tensor."""
    import triton

    from . import area_triton

    groups, seq_len, num_heads, packed = sizes
    head_dim_v = packed - 2 * head_dim
    function = getattr(area_triton, kernel)
    interpreted = not isinstance(function, triton.JITFunction)
    tiles = tiles or tiles_for(kernel, seq_len, head_dim, head_dim_v, _capability(device))
    constants = constants_of(tiles, seq_len, head_dim, head_dim_v, ptx=not interpreted)
    programs = -(-seq_len // tiles.rows) * groups * num_heads
    scalars = seq_len, num_heads, math.log2(math.e) * head_dim**-0.5
    arguments = (*scalars, *constants.values())  # in the order of the kernels' signatures
    return _Launcher(function, programs, arguments, options_of(tiles))


def _capability(device: int | None) -> tuple[int, int]:
    return (9, 0) if device is None else torch.cuda.get_device_capability(device)  # Triton's interpreter takes Hopper's


def constants_of(tiles: Tiles, seq_len: int, head_dim: int, head_dim_v: int, ptx: bool) -> dict[str, Any]:
    """The compile-time constants of a kernel, by the names and in the order of its signature."""
    return {
        "DIM": head_dim,
        "DIM_V": head_dim_v,
        "WIDTH": _power_of_2(head_dim),
        "WIDTH_V": _power_of_2(head_dim_v),
        "ROWS": tiles.rows,
        "ROWS_TAIL": _tail(seq_len, tiles.rows),
        "BLOCK": tiles.block,
        "TAIL": _tail(seq_len, tiles.block),
        "STAGES": tiles.num_stages,
        "PTX": ptx,
    }


def options_of(tiles: Tiles) -> dict[str, int]:
    """The options of Triton's compiler."""
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if tiles.max_registers is not None:
        options["maxnreg"] = tiles.max_registers
    return options


def _tail(seq_len: int, tile: int) -> int:
    rest = seq_len % tile
    return _power_of_2(rest) if rest else 0


def _power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`, and 16 at least, as a matrix product in Triton needs."""
    return max(16, 1 << (size - 1).bit_length())
