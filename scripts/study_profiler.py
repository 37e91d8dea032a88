"""Time steps that wait for the host before and after torch's profiler ran, for docs/results/ddp-h100.md.

python scripts/study_profiler.py keep|let-go        keep: the profiler stays attached to the driver, as by default
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from yolo_flash.utils.profiler import stop_profiler
from yolo_flash.utils.timing import clock_ms

STEPS, REPEATS = 30, 5


def timed(label: str, call: Callable[[], object]) -> None:
    """Print the median milliseconds of a call."""
    found = [clock_ms(call, torch.device("cuda"), STEPS) for _ in range(REPEATS + 1)]  # the first one warms up
    print(f"| {label} | {statistics.median(found[1:]):.2f} |", flush=True)


def profiled(call: Callable[[], object], let_go: bool) -> None:
    """Run a call under the profiler."""
    running = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    running.start()
    call()
    torch.cuda.synchronize()
    if let_go:
        stop_profiler(running)
    else:
        running.stop()
    if not any(event.device_type == DeviceType.CUDA for event in running.events() or []):
        sys.exit("The profiler saw no kernel.")


def main() -> None:
    let_go = sys.argv[1:] == ["let-go"]
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()) for _ in range(100)]
    network, images = nn.Sequential(*layers).cuda(), torch.rand(2, 8, 16, 16, device="cuda")

    def step() -> None:
        network.zero_grad()
        network(images).sum().backward()

    def captured() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            network(images)
        return graph

    timed("before the profile", step)
    profiled(step, let_go)
    timed("after one", step)
    graph = captured()
    timed("replay of a graph captured after one", graph.replay)
    profiled(graph.replay, let_go)
    timed("after two, the second of a graph's replay", step)
    profiled(captured().replay, let_go)
    profiled(step, let_go)
    timed("after four, the last two in quick succession", step)


if __name__ == "__main__":
    main()
