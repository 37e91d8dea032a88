"""Which backends a call really ran, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from ..backends.profiled import attention_kernels
from ..backends.registry import BACKENDS
from ..utils.profiler import PROFILER, events_of, hushed

T = TypeVar("T")


def observe(call: Callable[[], T]) -> tuple[T, frozenset[str] | None]:
    """Call something, and name the backends whose operators it called.

    Args:
        call: Runs attention, with its backward where there is one.

    Returns:
        What the call gives; and the names, none where stock matrix products ran, and None where nothing could be
        observed: another profiler is at work, of which torch has one at a time, or torch was built without it.
    """
    if torch.autograd._profiler_enabled() or not PROFILER.acquire(blocking=False):
        return call(), None
    try:
        running = profile(activities=[ProfilerActivity.CPU])  # operators: also of a GPU they are called by the host
        with hushed():
            running.start()
        try:
            result = call()
        finally:
            with hushed():
                running.stop()
    finally:
        PROFILER.release()
    events = events_of(running)
    if not events:
        return result, None
    operators, _ = attention_kernels(events)
    return result, frozenset(name for name, backend in BACKENDS.items() if any(map(operators.get, backend.operators)))
