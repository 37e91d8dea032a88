"""Torch's profiler: one at a time, silent, and detached from the driver afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile

PROFILER = threading.Lock()  # torch has one for the process: two at a time mix their events
_LET_GO = "TEARDOWN_CUPTI"  # has torch's profiler detach from the driver
_VARIABLE = "KINETO_LOG_LEVEL"  # torch reads it before the first profile of the process; Ultralytics sets it to 5
_LEVEL = "_ZN9libkineto6Logger14severityLevel_E"  # libkineto::Logger::severityLevel_: what the variable sets
_ERRORS, _NOTHING = 4, 6  # what torch sets where there is no variable; above the highest severity, which is 5
_LOCK = threading.Lock()
_blocks = 0  # under way, of all threads
_before: tuple[int, str | None] = (_ERRORS, None)  # the number and the variable, to give back


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silence torch's profiler on the terminal within the block.

    Afterwards the user's own profilers write as before. Where a build of torch does not export its level of logging,
    nothing is silenced.
    """
    global _blocks, _before
    if (level := _level()) is None:
        yield
        return
    with _LOCK:
        if not _blocks:
            variable = os.environ.get(_VARIABLE)
            first = variable if variable and variable.isdecimal() else _ERRORS
            _before = level.value or int(first), variable
            if not level.value:  # the first profile is still to come, and will set it by the variable
                os.environ[_VARIABLE] = str(_NOTHING)
            level.value = _NOTHING
        _blocks += 1
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                level.value, variable = _before
                if variable is not None:
                    os.environ[_VARIABLE] = variable
                else:
                    os.environ.pop(_VARIABLE, None)


@functools.cache
def _level() -> ctypes.c_int | None:
    """The lowest severity that is written, in the library that torch has loaded; None where it cannot be found."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with contextlib.suppress(OSError, ValueError):
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), _LEVEL)
    return None


def profiler_lets_go() -> bool:
    """Whether torch's profiler of kernels can detach from the driver.

    While the profiler is attached, every launch takes the host longer: by a third in docs/results/ddp-h100.md (pytorch
    issue 144455).
    """
    return torch.version.cuda is None or Version(torch.version.cuda) >= Version("12.6")


def stop_profiler(running: profile) -> None:
    """Stop a profiler and detach it from the driver, unless the user has set TEARDOWN_CUPTI.

    A thread of kineto (CuptiActivityApi.cpp) reads the variable twice, has the profiler detach within some later call
    of CUDA, and ends. Where the thread cannot be seen, a fifth of a second is many times what the thread needs. Without
    the variable the thread would attach again.
    """
    if _LET_GO in os.environ or not profiler_lets_go() or ProfilerActivity.CUDA not in running.activities:
        running.stop()
        return
    os.environ[_LET_GO] = "1"
    try:
        before = _threads()
        running.stop()
        begun = _threads() - before
        for _ in range(20):
            torch.cuda.synchronize()
            if begun and not begun & _threads():
                break
            time.sleep(0.01)
    finally:
        os.environ.pop(_LET_GO, None)


def _threads() -> set[str]:
    """The threads of this process, those of libraries too; none where the system does not tell."""
    try:
        return {file.name for file in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


def events_of(stopped: profile) -> list[Any]:
    """The events of a profile as kineto holds them.

    `profile.events()` builds a tree of Python objects first, which takes 2 s for the 38,000 events of a step on a GPU.
    """
    found = stopped.profiler and stopped.profiler.kineto_results
    return list(found.events()) if found else []


@contextlib.contextmanager
def kernels_profiled() -> Iterator[profile]:
    """Profile kernels of the GPU, and write nothing to the terminal; the events are there after the block."""
    with hushed():
        running = profile(activities=[ProfilerActivity.CUDA])
        running.start()
        try:
            yield running
        finally:
            stop_profiler(running)
