"""How `bench op` measures an arm: error against float64, memory, time on the GPU and from Python.

The arms take turns within every repeat. An arm that raises gets a note in its row.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import DeviceType

from ..backends.registry import BACKENDS
from ..utils.errors import first_line
from ..utils.files import Row
from ..utils.memory import extra_bytes
from ..utils.numerics import Results, reference, relative_error
from ..utils.profiler import kernels_profiled
from ..utils.timing import clock_ms, graph_ms
from .op_table import BOTH, FORWARD, MODES, SHAPES

Call = Callable[[], Results]

_CALLS = 10  # in one sample
_WALL_CALLS = 50
_WRONG = 0.05  # relative error; bfloat16 stays below 0.01


@dataclass
class _Timer:
    """An arm that is ready to be timed; `sample()` gives the microseconds of one call, averaged over 10."""

    row: Row
    call: Call
    sample: Callable[[], float]
    method: str
    note: str = ""


def measure_shape(rows: list[Row], repeats: int, device: torch.device) -> None:
    """Fill in the rows of one shape; an exception becomes a note."""
    if not (rows := [row for row in rows if not row["note"]]):
        return
    with _noted(rows):
        shape, dtype = SHAPES[rows[0]["shape"]], getattr(torch, rows[0]["dtype"])
        source = torch.Generator(device).manual_seed(0)  # its own: a capture that fails can leave torch's unusable

        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype, generator=source)

        packed = random(*shape[:3], 2 * shape.head_dim + shape.head_dim_v)
        dout, dimage = (random(*shape[:3], shape.head_dim_v) for _ in range(2))
        # As small as what comes through attention: else the copy of v would hide errors in the gradients of q, k and v.
        upstream = [dout, dimage * shape.tokens**-0.5]
        calls = _right_calls(rows, packed, upstream)
        for mode in MODES:
            _time_in_turns([(row, call) for row, call in calls if row["mode"] == mode], repeats, device)


def _right_calls(rows: list[Row], packed: Tensor, upstream: list[Tensor]) -> list[tuple[Row, Call]]:
    """The calls whose results are right; their rows get errors and memory."""
    out, grad = reference(packed, *upstream, head_dim=rows[0]["head_dim"])
    right = []
    for row in rows:
        with _noted([row]):
            call = _caller(row, packed, upstream)
            results = call()
            row["error_out"] = relative_error(results[0], out)
            if row["mode"] == BOTH:
                row["error_grad"] = relative_error(results[2], grad)
            del results
            for name in ("error_out", "error_grad"):
                if row[name] is not None and not row[name] <= _WRONG:  # NaN too
                    raise ArithmeticError(f"{name} is {row[name]:.2g}, more than {_WRONG}: wrong, so it is not timed")
            if row["mode"] == BOTH and packed.is_cuda:
                row["peak_mib"] = (extra_bytes(call, packed.device) or 0) / 2**20
            right.append((row, call))
    return right


def _time_in_turns(calls: list[tuple[Row, Call]], repeats: int, device: torch.device) -> None:
    """Time the arms of one shape and mode in turns, and fill in their rows."""
    timers: list[_Timer] = []
    for row, call in calls:
        with _noted([row]):
            timer = _timer(row, call, device)
            timer.sample()  # the first replay of a graph also uploads it
            timers.append(timer)
    samples: list[list[float]] = [[] for _ in timers]
    for _ in range(repeats):
        for timer, mine in zip(timers, samples, strict=True):
            mine.append(timer.sample())
    exponentials = _exponentials(device)  # now: the clock of an idle GPU is another
    for timer, mine in zip(timers, samples, strict=True):
        row, us = timer.row, statistics.median(mine)
        shape = SHAPES[row["shape"]]
        timer.call()  # captures have emptied the allocator's cache
        wall_us = clock_ms(timer.call, device, _WALL_CALLS) * 1e3
        row |= {"method": timer.method, "note": timer.note, "wall_us": wall_us}
        row["repeats"] = 1 if timer.method == "profiler" else repeats
        row |= {"us": us, "us_low": min(mine), "us_high": max(mine), "tflops": shape.flops(row["mode"]) / us / 1e6}
        if exponentials and row["mode"] == FORWARD:
            row["exp_percent"] = 100 * shape.scores / (us * 1e-6 * exponentials)


def _timer(row: Row, call: Call, device: torch.device) -> _Timer:
    if device.type == "cpu":
        return _Timer(row, call, lambda: clock_ms(call, device, _CALLS) * 1e3, "clock")
    try:
        sample = graph_ms(call, _CALLS)
        return _Timer(row, call, lambda: sample() * 1e3, "graph")
    except Exception as error:  # an extension may synchronize, allocate or compile
        note = f"kernels summed by the profiler, as no CUDA graph could be made: {first_line(error)}"
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)  # takes what is left of the error
    us = _profiled_us(call)
    return _Timer(row, call, lambda: us, "profiler", note)


def _profiled_us(call: Call) -> float:
    """Microseconds of all GPU kernels of one call, over 10: once and not in turns, for a profiler is slow to start."""
    torch.cuda.synchronize()
    with kernels_profiled() as profiler:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    if not (total := sum(event.self_device_time_total for event in kernels)):
        raise RuntimeError("no CUDA graph could be made, and the profiler saw no kernel")
    return total / _CALLS


def _exponentials(device: torch.device) -> float | None:
    """Exponentials a second at the present clock: 16 a cycle on each multiprocessor of NVIDIA. None if unknown."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        mhz = float(torch.cuda.clock_rate(device))
    except Exception:  # without nvidia-ml-py, or where the driver does not tell
        mhz = getattr(properties, "clock_rate", 0) / 1e3
    return properties.multi_processor_count * 16 * mhz * 1e6 or None


@contextlib.contextmanager
def _noted(rows: Iterable[Row]) -> Iterator[None]:
    """Turn an exception into a note on those rows that have neither numbers nor a note yet."""
    try:
        yield
    except Exception as error:  # a kernel that fails must not cost the numbers of the others
        for row in rows:
            if row["us"] is None and not row["note"]:
                row["note"] = first_line(error)


def _caller(row: Row, packed: Tensor, upstream: list[Tensor]) -> Call:
    """One call of an arm: `() -> (out, v)`, or `(out, v, gradient of packed)` with the backward."""
    spec = SHAPES[row["shape"]].spec(packed.dtype, row["mode"])
    run = BACKENDS[row["arm"]].run

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return run(packed, spec)

    def both() -> tuple[Tensor, ...]:
        # A leaf of its own for every call: autograd ties a leaf to the stream of its first use, and a captured graph
        # must not wait for another stream. The memory is the same, as replays need it.
        leaf = packed.detach().requires_grad_()
        with torch.enable_grad():
            results = run(leaf, spec)
        return (*(result.detach() for result in results), *torch.autograd.grad(results, leaf, upstream))

    return both if row["mode"] == BOTH else forward
