"""Memory in bytes: what is free, what a call takes, and the peak of a process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

GIB = 2**30


def readable(size: int) -> str:
    """Bytes as `9.1 GiB` or `37 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated, torch's cache included; on a CPU, within the limits of the container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(psutil.virtual_memory().available, *container_bytes())


def needed_again(device: torch.device) -> int:
    """Bytes of a GPU that the process has reserved at its peak, beyond what it holds now: it may need them again."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_reserved(device) - torch.cuda.memory_allocated(device)


def container_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that the control groups of this process leave it, one number for each limit; none without such groups.

    A container is killed at its own limit or that of a group above, whatever the host has free. The page cache of files
    counts as free. What cannot be read is skipped.
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


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a call, above what was allocated before; None on a device other than CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def peak_memory_gib(device: torch.device) -> tuple[float, float]:
    """Peak allocated and reserved memory in GiB; on a CPU both are the high-water mark of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / GIB, torch.mps.driver_allocated_memory() / GIB
    peak = _high_water_mark() / GIB
    return peak, peak


def _high_water_mark() -> int:
    """Bytes of physical memory that this process has held at most."""
    memory = psutil.Process().memory_info()
    if (peak := getattr(memory, "peak_wset", None)) is not None:  # Windows
        return int(peak)
    import resource

    unit = 1 if psutil.MACOS else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, memory.rss)
