"""Work that comes again in every optimizer step, on tensors that stay where they are, as small CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import first_line
from ..utils.memory import readable
from .graphed_step import mended_generator
from .limits import no_nvidia_gpu

_CALM = 8  # calls in a row with the same key before the first capture: not in the steps that `auto` times


class Recurring:
    """A function that is called in every step: from a graph once its calls have the same key.

    The key is all that a graph keeps. Calls with another one run the function; one that stays is captured anew, each
    time after twice as many calls.

    Attributes:
        why_not: Why nothing is captured any more; empty as long as calls may come from a graph.
        captures: Graphs that were made.
        replayed: Calls that came from a graph.
        pool_bytes: Memory of the graph.
    """

    def __init__(
        self, run: Callable[..., Any], key: Callable[..., Any], capture: Callable[..., Any], why_not: str = ""
    ) -> None:
        """Start without a graph.

        Args:
            run: The function.
            key: Takes its arguments.
            capture: Makes a graph from its arguments, and has made a first call: an object with the `results` of that,
                `pool_bytes`, and a call for later arguments. Raises where there can be none, and has changed nothing.
            why_not: Why nothing is to be captured at all.
        """
        self.why_not = why_not
        self.captures = self.replayed = self.pool_bytes = 0
        self._run, self._find_key, self._capture = run, key, capture
        self._graph: Any = None
        self._captured: Any = None  # the key of the graph
        self._last: Any = None  # the key of the last call
        self._calls = 0  # in a row that had it
        self._calm = _CALM

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns; tensors of a graph are overwritten by the next call."""
        if self.why_not:
            return self._run(*arguments)
        key = self._find_key(*arguments)
        if self._graph is not None and key == self._captured:
            self._last = None
            self.replayed += 1
            return self._graph(*arguments)
        self._calls, self._last = (self._calls + 1 if key == self._last else 1), key
        if self._calls < self._calm:
            return self._run(*arguments)
        self._graph, self._captured, self.pool_bytes, self._calm = None, None, 0, 2 * self._calm
        try:
            self._graph = self._capture(*arguments)
        except Exception as error:
            self.why_not = first_line(error)
            return self._run(*arguments)
        self._captured, self.pool_bytes = key, self._graph.pool_bytes
        self.captures, self.replayed = self.captures + 1, self.replayed + 1
        return self._graph.results


class SmallGraph:
    """Some launches as one.

    Attributes:
        results: What the work returned, in the memory of the graph where it is new.
        pool_bytes: Memory of the graph, which other work cannot use.
    """

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], object], device: torch.device) -> None:
        """Capture `work`, which does not run, behind `warm_up`, which does.

        Raises:
            RuntimeError: There is no NVIDIA GPU, or the work cannot be captured.
        """
        if no_gpu := no_nvidia_gpu(device):
            raise RuntimeError(f"a CUDA graph {no_gpu}")
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), mended_generator(device), torch.cuda.stream(side):
            warm_up()
            side.synchronize()
            torch.cuda.empty_cache()  # as `torch.cuda.graph` does: what it frees is not of the graph
            before = torch.cuda.memory_reserved(device)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin the next batch, may make calls that a capture forbids in its thread.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self.results = work()
            self.pool_bytes = max(0, torch.cuda.memory_reserved(device) - before)
        torch.cuda.current_stream(device).wait_stream(side)

    def replay(self) -> None:
        """Run the work."""
        self._graph.replay()


@functools.lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for each stream that it has seen."""
    return torch.cuda.Stream(device)


def check_room(device: torch.device, needed: int) -> None:
    """Look whether a graph may hold so many bytes besides what the steps of a training have reserved so far.

    Raises:
        RuntimeError: Less than twice as much is free.
    """
    if device.type == "cuda" and (room := torch.cuda.mem_get_info(device)[0]) < 2 * needed:
        raise RuntimeError(
            f"its graph needs {readable(needed)}, and {readable(room)} are free: a smaller batch would do"
        )


def same_bits(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether float32 tensors are equal bit by bit, NaN included, and lie in memory in the same order."""
    pairs = zip(found, wanted, strict=True)
    return all(a.stride() == b.stride() and torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
