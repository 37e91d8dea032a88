"""Milliseconds of a call: by the clock, or on a GPU by CUDA events or graphs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch

from .numerics import Results, relative_error


def sampler_of(
    call: Callable[[], Results], device: torch.device, graphs: bool = True
) -> tuple[Callable[[], float], str]:
    """Prepare the timing of a call.

    Args:
        call: What to time.
        device: Where it runs; a CUDA device has to be the current one.
        graphs: Replay CUDA graphs where the call can be captured. The time of a launch is in `events` alone: times of
            the two kinds do not compare.

    Returns:
        A function that gives the milliseconds of one call, and how it measures: `graph`, `events`, or `clock` on a CPU.
    """
    if device.type == "cpu":
        return lambda: clock_ms(call, device), "clock"
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
        except Exception:  # an extension may synchronize, allocate or compile
            with contextlib.suppress(RuntimeError):
                wait(device)  # takes what is left of the error
    return lambda: events_ms(call, calls) / calls, "events"


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
        return events_ms(graph.replay) / calls

    return sample


def events_ms(run: Callable[[], object], times: int = 1) -> float:
    """Milliseconds of the current CUDA stream between the first call and the last, of all calls together."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def clock_ms(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of one call from Python, the mean over a number of calls with one wait for the device."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - start) / calls * 1e3


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
