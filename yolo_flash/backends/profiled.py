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
    """Attention in the events of a torch profile.

    Returns:
        operator of attention -> calls, forward and backward; and, on CUDA, kernel of attention -> launches.
    """
    names = {f"{name}{suffix}" for b in BACKENDS.values() for name in b.operators for suffix in ("", "_backward")}
    operators: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        nested = event.cpu_parent is not None and event.cpu_parent.name == event.name  # a redispatch of the same call
        if event.name in names and not nested:
            operators[event.name] += 1
        elif event.device_type == DeviceType.CUDA and _ATTENTION_KERNEL.search(event.name):
            kernels[event.name] += 1
    return operators, kernels


def short_kernel_name(kernel: str) -> str:
    """`void pytorch_flash::flash_fwd_kernel<...>(...)` -> `flash_fwd_kernel`."""
    return re.split(r"[<(]", kernel.removeprefix("void "))[0].rsplit("::", 1)[-1]
