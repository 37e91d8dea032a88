"""Where the time of an epoch goes, by the host's clock."""

from __future__ import annotations

import time

import torch

PARTS = ("steps", "data", "validation", "saving", "rest")
_STARVED = 0.3  # share of an epoch's training for which a GPU has to wait for data before a run is told


class EpochClock:
    """Splits an epoch among its parts: each lap belongs to what has just ended.

    Attributes:
        seconds: Part -> seconds of the epoch. `data` is from the end of a step to the next batch: the host waits for
            the loader, and runs the callbacks of users.
        starved: Seconds of `data` that began when the GPU had done all its work; all of `data` on a CPU.
        batches: Batches that the loader gave.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.starved, self.batches = 0.0, 0
        self._since = time.perf_counter()

    def lap(self, part: str) -> float:
        """Count the time since the last lap to a part."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds[part] += seconds
        return seconds

    def got_batch(self) -> None:
        """Count the wait for a batch."""
        waited = self.lap("data")
        self.batches += 1
        # A GPU that still works has not waited; one that is done waited, at the end at least.
        if self._event is None or self._event.query():
            self.starved += waited

    def did_step(self) -> None:
        """Count a step, whose kernels may still be under way."""
        self.lap("steps")
        if self._event is not None:
            self._event.record()

    def text(self) -> str:
        """`epoch of 3.1 s: 1.3 steps, 0.2 data, 0.9 validation, 0.5 saving, 0.2 rest`."""
        parts = ", ".join(f"{seconds:.1f} {part}" for part, seconds in self.seconds.items())
        return f"epoch of {sum(self.seconds.values()):.1f} s: {parts}"

    def hungry(self) -> str:
        """How much of the training waited for the loader, where that is much; else empty."""
        training = self.seconds["steps"] + self.seconds["data"]
        if self.starved <= _STARVED * training or not self.batches:
            return ""
        waited, whole = (seconds / self.batches * 1e3 for seconds in (self.starved, training))
        return f"{waited:.0f} of {whole:.0f} ms an iteration"
