"""The kernels and operators of attention among the events of a profile."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.profiler import DeviceType

from .registry import BACKENDS

_ATTENTION_KERNEL = re.compile(r"flash|fmha|sdpa|attention|dot_do_o|convert_dq|area_(?:for|back)ward", re.IGNORECASE)


def attention_kernels(events: Iterable[Any]) -> tuple[Counter[str], Counter[str]]:
    """Calls of each operator of attention, forward and backward, and launches of each kernel of attention.

    Args:
        events: Of a torch profile, as `utils.profiler.events_of` gives them.
    """
    names = {f"{name}{suffix}" for b in BACKENDS.values() for name in b.operators for suffix in ("", "_backward")}
    calls: list[tuple[int, str, int, int]] = []
    kernels: Counter[str] = Counter()
    for event in events:
        name = event.name()
        if name in names:
            if event.device_type() != DeviceType.CUDA:  # where marks of the host are shown once more, beside kernels
                calls.append((event.start_thread_id(), name, event.start_ns(), event.start_ns() + event.duration_ns()))
        elif event.device_type() == DeviceType.CUDA and _ATTENTION_KERNEL.search(name):
            kernels[name] += 1
    operators: Counter[str] = Counter()
    until: tuple[int, str, int] = (0, "", 0)
    for thread, name, start, end in sorted(calls):
        if (thread, name) != until[:2] or start >= until[2]:  # else a redispatch of the call that is under way
            operators[name] += 1
            until = thread, name, end
    return operators, kernels


def short_kernel_name(kernel: str) -> str:
    """`void pytorch_flash::flash_fwd_kernel<...>(...)` -> `flash_fwd_kernel`."""
    return re.split(r"[<(]", kernel.removeprefix("void "))[0].rsplit("::", 1)[-1]
