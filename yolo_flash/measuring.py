"""How trials, benchmarks and proofs measure: errors, arithmetic, milliseconds, memory, kernels."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Results = tuple[Tensor, ...]

_BACKENDS: Any = torch.backends  # torch's stubs lack the newer switches

GIB = 2**30
_SCORES_AT_ONCE = 2**26  # half a GiB in float64
_BYTES_A_SCORE = 128  # four matrices in float64, in a quarter of the free memory
_LET_GO = "TEARDOWN_CUPTI"  # of torch's profiler


# Errors ---------------------------------------------------------------------------------------------------------------
def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; NaN if there is one in `found`.

    Where `wanted` is zero, the norm of `found`.
    """
    wanted = wanted.double()
    norm = wanted.norm()
    return float((found.double() - wanted).norm() / (norm if norm > 0 else 1))


def allowed_error(stock_error: float, dtype: torch.dtype) -> float:
    """How far a backend may be off: twice what the stock block is off in the same dtype, plus rounding.

    Args:
        stock_error: Relative error of the stock block.
        dtype: What it computes in.
    """
    return 2 * stock_error + torch.finfo(dtype).eps


@torch.no_grad()
def reference(
    packed: Tensor,
    dout: Tensor,
    dimage: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain attention in high precision, a slice of queries of one group at a time: 0.5 GiB a matrix at most.

    Args:
        packed: Queries, keys and values `[groups, tokens, heads, 2*head_dim + head_dim_v]`.
        dout: Upstream gradient of attention `[groups, tokens, heads, head_dim_v]`.
        dimage: Upstream gradient of the copy of v, of the same shape.
        head_dim: Channels of a query and of a key.
        dtype: To compute in.
        mask: Bool `[tokens, tokens]`, True where a key is not seen.

    Returns:
        Attention, and the gradient of `packed`, both in `dtype`.
    """
    sizes = (head_dim, head_dim, dout.shape[-1])
    out, dpacked = torch.zeros_like(dout, dtype=dtype), torch.zeros_like(packed, dtype=dtype)
    groups, tokens, heads, _ = packed.shape
    at_once = min(_SCORES_AT_ONCE, free_bytes(packed.device) // _BYTES_A_SCORE)
    step, scale = max(1, at_once // (heads * tokens)), head_dim**-0.5
    for group in range(groups):
        q, k, v = packed[group].to(dtype).transpose(0, 1).split(sizes, dim=-1)  # [heads, tokens, channels]
        dq, dk, dv = dpacked[group].transpose(0, 1).split(sizes, dim=-1)  # views, written in place
        dv += dimage[group].to(dtype).transpose(0, 1)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            do = dout[group, part].to(dtype).transpose(0, 1)
            scores = scale * q[:, part] @ k.mT
            p = torch.softmax(scores if mask is None else scores.masked_fill_(mask[part], -math.inf), dim=-1)
            dv += p.mT @ do
            ds = do @ v.mT
            ds = p * (ds - (p * ds).sum(-1, keepdim=True))
            dq[:, part] = scale * ds @ k
            dk += scale * ds.mT @ q[:, part]
            out[group, part] = (p @ v).transpose(0, 1)
    return out, dpacked


# Memory ---------------------------------------------------------------------------------------------------------------
def readable(size: int) -> str:
    """Bytes as `9.1 GiB` or `37 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated, what torch has cached included; on a CPU within the limits of a container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(psutil.virtual_memory().available, *container_bytes())


def container_bytes(root: Path = Path("/")) -> Iterator[int]:
    """What the control groups of this process leave it, whatever the host has free: one number for each limit.

    A container is killed at its own limit. Every group above counts too. What files fill of the memory is given back
    under pressure, and counts as free. Nothing on a system without control groups, and nothing that cannot be read.

    Args:
        root: Of the file system.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            old = bool(controllers)  # version 1 has a tree for each controller
            top = root / "sys/fs/cgroup" / ("memory" if old else "")
            folder = top / path.lstrip("/")
            for group in (folder, *folder.parents):  # in a container the path may be the host's, and only the top there
                yield from _group_bytes(group, old)
                if group == top:
                    break


def _group_bytes(group: Path, old: bool) -> Iterator[int]:
    """What one control group leaves, if it has a limit."""
    limit, used, files = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        if old
        else ("memory.max", "memory.current", ("inactive_file", "active_file"))
    )
    with contextlib.suppress(OSError, ValueError):  # `max`, where there is no limit, is no number
        most, now = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
        given_back = 0
        with contextlib.suppress(OSError, ValueError):
            statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            given_back = sum(int(statistics.get(name, 0)) for name in files)
        yield max(0, most - max(0, now - given_back))


def extra_bytes(call: Callable[[], Results], device: torch.device) -> int | None:
    """Peak memory of a call above what is there before; None where the device does not tell."""
    if device.type != "cuda":
        return None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Arithmetic -----------------------------------------------------------------------------------------------------------
def arithmetic() -> Iterator[tuple[str, str]]:
    """How torch multiplies: by switches of the process, of which torch 2.9 has new ones.

    Once a new one is set, torch refuses to read the old one beside it.
    """
    gpu, cudnn, cpu = _BACKENDS.cuda.matmul, _BACKENDS.cudnn, _BACKENDS.mkldnn
    switches: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "float32": (torch.get_float32_matmul_precision, lambda: (gpu.fp32_precision, cpu.matmul.fp32_precision)),
        "tf32": (lambda: gpu.allow_tf32, lambda: gpu.fp32_precision),
        "cudnn tf32": (lambda: cudnn.allow_tf32, lambda: (cudnn.fp32_precision, cudnn.conv.fp32_precision)),
        "float16 sums": (lambda: gpu.allow_fp16_reduced_precision_reduction, lambda: ""),
        "bfloat16 sums": (lambda: gpu.allow_bf16_reduced_precision_reduction, lambda: ""),
    }
    for name, (old, new) in switches.items():
        try:
            yield name, str(old())
        except RuntimeError:  # only where there are new ones
            yield name, str(new())


# Profiles -------------------------------------------------------------------------------------------------------------
def profiler_lets_go() -> bool:
    """Whether torch's profiler of kernels can let go of the driver.

    Where it does not, every later launch takes the host longer, for the rest of the process: by a third in
    docs/results/ddp-h100.md (pytorch issue 144455).
    """
    return torch.version.cuda is None or Version(torch.version.cuda) >= Version("12.6")


def stop_profiler(running: profile) -> None:
    """Stop a profiler, and have it let go of the driver unless the user has said whether it shall.

    A thread of the profiler's own asks for the variable, twice, and detaches within some later call of CUDA (kineto,
    CuptiActivityApi.cpp). It does not say when: a fifth of a second is many times what it needs. Without the variable
    at its end it would attach again.

    Args:
        running: That was started.
    """
    if _LET_GO in os.environ or not profiler_lets_go() or ProfilerActivity.CUDA not in running.activities:
        running.stop()
        return
    os.environ[_LET_GO] = "1"
    try:
        running.stop()
        for _ in range(20):
            torch.cuda.synchronize()
            time.sleep(0.01)
    finally:
        os.environ.pop(_LET_GO, None)


@contextlib.contextmanager
def kernels_profiled() -> Iterator[profile]:
    """Profile kernels of the GPU; the events are there behind the block."""
    running = profile(activities=[ProfilerActivity.CUDA])
    running.start()
    try:
        yield running
    finally:
        stop_profiler(running)


# Timing ---------------------------------------------------------------------------------------------------------------
def sampler_of(
    call: Callable[[], Results], device: torch.device, graphs: bool = True
) -> tuple[Callable[[], float], str]:
    """What gives the milliseconds of one call, and how it measures: `graph`, `events` or, on a CPU, `clock`.

    Args:
        call: What to time.
        device: Where it runs; a CUDA device has to be the current one.
        graphs: Replay CUDA graphs where the call can be captured. The time of a launch is in `events` alone: times of
            the two kinds do not compare.
    """
    if device.type == "cpu":
        return lambda: _clock_ms(call), "clock"
    seconds = []
    for _ in range(3):  # one alone may hiccup, and the graph then hold a single short call: mostly launch
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    calls = max(1, min(10, int(2e-3 / min(seconds))))
    if graphs:
        try:
            return graph_ms(call, calls), "graph"
        except Exception:  # an extension may synchronise, allocate, or compile
            with contextlib.suppress(RuntimeError):
                wait(device)  # takes what is left of the error
    return lambda: _event_ms(call, calls), "events"


def graph_ms(call: Callable[[], Results], calls: int = 10) -> Callable[[], float]:
    """Capture calls in a CUDA graph; the result replays them and gives the milliseconds of one.

    Raises:
        RuntimeError: The capture failed, or the replay does not compute what the call does.
    """
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # also gives back the stream after a capture that failed, which torch does not
        for _ in range(2):
            wanted = call()
        # Other threads, of a data loader say, may go on with what a capture forbids in its own.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            for _ in range(calls):
                found = call()
    torch.cuda.synchronize()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    if not all(relative_error(*pair) <= 0.05 for pair in zip(found, wanted, strict=True)):
        raise RuntimeError("kernels are missing in it")  # launched on a stream of the extension's own, say

    def sample(read: object = call) -> float:  # the graph reads the tensors that the call holds
        return _between_events(graph.replay) / calls

    return sample


def _event_ms(call: Callable[[], Results], calls: int) -> float:
    def run() -> None:
        for _ in range(calls):
            call()

    return _between_events(run) / calls


def _between_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock_ms(call: Callable[[], Results]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def first_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
