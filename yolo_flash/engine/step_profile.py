"""The profile of one training step: the attention that ran, against the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from ultralytics.utils import LOGGER

from ..backends.profiled import attention_kernels, short_kernel_name
from ..backends.registry import BACKENDS, is_approximate, label
from ..utils.profiler import PROFILER, events_of, hushed, profiler_lets_go, stop_profiler


class StepProfile:
    """Profiles one eager step of a run, and one step from CUDA graphs."""

    def __init__(self) -> None:
        self.running: profile | None = None  # from `start` to `finish` or `stop`
        self._done = False
        self._eager_kernels: Counter[str] = Counter()

    def start(self, device: torch.device) -> bool:
        """Profile the coming step, unless one was profiled already; whether a profiler was started."""
        if self._done or self.running is not None:
            return False
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda" and profiler_lets_go():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)  # may raise: made before the lock is taken
        # The user's own profiler, or that of a training in another thread: a later step will do.
        if torch.autograd._profiler_enabled() or not PROFILER.acquire(blocking=False):
            return False
        self.running = profiler  # from here on `stop` gives the lock back
        with hushed():
            profiler.start()
        return True

    def stop(self) -> list[Any]:
        """Stop the profiler and return its events; none if no profiler is running."""
        running, self.running = self.running, None
        if running is None:
            return []
        try:
            with hushed():
                stop_profiler(running)
        finally:
            PROFILER.release()
        return events_of(running)

    def profile_graphs(self) -> None:
        """Profile a step from CUDA graphs too, where the profiler sees kernels: a replay has no operators."""
        self._done = self._done and not profiler_lets_go()

    def finish(self, replayed: bool) -> dict[str, Any]:
        """End the profiled step and count its calls of attention: `counts` of operators and of kernels.

        `graphs` is whether the step was `replayed` from CUDA graphs, of which kernels alone are visible; `observed` is
        whether the profile has any visible event.
        """
        events = self.stop()
        operators, kernels = attention_kernels(events)
        self._done = True
        observed = any(event.device_type() == DeviceType.CUDA for event in events) if replayed else bool(events)
        if observed and not replayed:
            self._eager_kernels = kernels
        return {"counts": dict(operators | kernels), "graphs": replayed, "observed": observed}

    def compare(self, facts: Mapping[str, Any], planned: Mapping[str, int]) -> None:
        """Log the facts of `finish`; warn if `planned` (backend -> layers) or the step before the graphs differs."""
        counts, replayed = facts["counts"], facts["graphs"]
        step = "one step from graphs" if replayed else "one step"
        if not facts["observed"]:
            LOGGER.info(
                f"yolo-flash: what {step} ran could not be observed here: the profile has no event of "
                f"{'the GPU' if replayed else 'any kind'}. Another profiler may hold it."
            )
            return
        names: Counter[str] = Counter()
        for name, count in counts.items():
            names[label(short_kernel_name(name))] += count
        ran = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no fused attention"
        if replayed and (approximate := [label(backend) for backend in planned if is_approximate(backend)]):
            ran += f", of {', '.join(approximate)}"  # a replay has no operators, whose names say so
        LOGGER.info(f"yolo-flash: {step} ran {ran}")
        if replayed:
            if missing := self._eager_kernels.keys() - counts.keys():
                also = ", ".join(map(short_kernel_name, missing))
                LOGGER.warning(f"yolo-flash: the step before the graphs also ran {also}.")
            return
        for backend, layers in planned.items():
            operators = BACKENDS[backend].operators
            calls = sum(counts.get(name, 0) for name in operators)
            if operators and calls < layers:
                LOGGER.warning(
                    f"yolo-flash: the plan says {label(backend)} for {layers} layers, but the profiled step called it "
                    f"{calls} times. Please report this with flash.jsonl of the run folder."
                )
