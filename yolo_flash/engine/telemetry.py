"""Proof and numbers of a run: the plan, the kernels that really ran, memory and speed of every epoch.

Goes to Ultralytics' log, to `flash.jsonl` in the run folder (one object a line), to results.csv and to Ultralytics'
loggers. The trainer catches what goes wrong here: telemetry neither fails a run nor changes its result.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch.profiler import DeviceType, ProfilerActivity, profile
from ultralytics.utils import LOGGER

from .._version import __version__
from ..backends.profiled import attention_kernels, short_name
from ..backends.registry import BACKENDS
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..machine import Machine
from ..planning.memory import score_bytes
from ..planning.plan import PlanRow, describe, plan_entry
from ..utils.files import write_file
from ..utils.memory import GIB, peak_memory_gib, readable
from ..utils.profiler import PROFILER, hushed, profiler_lets_go, stop_profiler
from .run_plot import draw_run

PEAK = "flash/peak_allocated_gib"
SPEED = "flash/images_per_second"
COLUMNS = (PEAK, SPEED)


class Telemetry:
    """Follows one training run on rank 0 by the events of Ultralytics' trainer."""

    def __init__(self, config: FlashConfig, dispatcher: Dispatcher) -> None:
        """Follow a run that has these settings and decisions."""
        self._config = config
        self._dispatcher = dispatcher
        self._machine: Machine | None = None
        self._rows: list[PlanRow] = []
        self._file: Path | None = None
        self._profile: profile | None = None
        self._profiled = False
        self._images = 0
        self._since = 0.0
        self._profiled_speed = 0.0
        self._eager_kernels: Counter[str] = Counter()
        self._replays: dict[str, Any] = {}  # of this epoch, see `GraphPolicy.end_epoch`
        self._pool_gib: float | None = None  # memory of the graphs that steps run from; None while they run eager

    def plan(self, trainer: Any, rows: list[PlanRow], machine: Machine) -> None:
        """Log and write the plan; called again when the batch was halved, which also discards a profile under way."""
        self._rows, self._machine = rows, machine
        self._pool_gib = None  # graphs of another batch are gone
        self._stop_profile()
        LOGGER.info(describe(rows, machine))
        if self._file is None:
            if self._dispatcher.memory_limited and trainer.device.type == "cuda" and (avoided := self._avoided()):
                images = trainer.batch_size
                LOGGER.info(
                    f"yolo-flash: AutoBatch took {images} images a step. They need {readable(avoided)} less than with "
                    f"stock attention, {readable(avoided // images)} of score matrices an image: the batch may be "
                    f"larger than without the plugin."
                )
            self._file = Path(trainer.save_dir) / "flash.jsonl"
            if not trainer.resume:
                self._file.unlink(missing_ok=True)
            elif self._file.is_file():
                whole, end, torn = self._file.read_bytes().rpartition(b"\n")
                if torn:  # the run was killed while it wrote
                    write_file(self._file, whole + end)
            self._write(
                "run",
                yolo_flash=__version__,
                ultralytics=ultralytics.__version__,
                resumed=bool(trainer.resume),
                machine=dataclasses.asdict(machine),
                config=dataclasses.asdict(self._config),
            )
        for row in rows:
            self._write("plan", **plan_entry(row))

    def graphs(self, trainer: Any, facts: dict[str, Any]) -> None:
        """Say whether steps run from CUDA graphs, why not, or what they gain; their first step is profiled too."""
        self._write("graphs", **facts)
        if why_not := facts["why_not"]:
            self._pool_gib = None
            LOGGER.info(f"yolo-flash: no CUDA graphs: {why_not}")
            return
        self._pool_gib = facts["pool_bytes"] / GIB
        if again := facts.get("again"):
            LOGGER.info(f"yolo-flash: CUDA graphs captured again in {facts['capture_seconds']:.1f} s: {again}")
            return
        gain = "steps run from CUDA graphs"
        if "graph_ms" in facts:
            eager, replayed = facts["eager_ms"], facts["graph_ms"]
            gain += f": {eager:.1f} -> {replayed:.1f} ms a step ({eager / replayed:.2f}x)"
        cost = f"captured in {facts['capture_seconds']:.1f} s, they hold {readable(facts['pool_bytes'])}"
        outside = facts.get("loss_outside")
        LOGGER.info(f"yolo-flash: {gain}; {cost}" + (f"; the loss stays outside of them: {outside}" if outside else ""))
        self._profiled = self._profiled and not profiler_lets_go()  # replays are kernels, without operators

    def replays(self, trainer: Any, facts: dict[str, Any]) -> None:
        """Keep for the end of the epoch how many of its steps came from CUDA graphs."""
        self._replays = facts

    def saw_images(self, count: int) -> None:
        """Count the images of a batch on their way to the model."""
        self._images += count

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Begin the clock and the peak memory of an epoch."""
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        self._restart_clock()

    def on_train_batch_start(self, trainer: Any) -> None:
        """Profile one step: the first, or the second under `compile`, whose first one compiles."""
        if self._profiled or self._profile is not None or (trainer.args.compile and not self._images):
            return
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda" and profiler_lets_go():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)  # which may fail: before there is a lock to give back
        # The user's own profiler, or that of a training in another thread: a later step will do.
        if torch.autograd._profiler_enabled() or not PROFILER.acquire(blocking=False):
            return
        self._profile = profiler  # from here on `_stop_profile` gives the lock back
        with hushed():
            self._profile.start()
        self._restart_clock()

    def on_train_batch_end(self, trainer: Any) -> None:
        """Read the profile of the step, if there is one, and compare it with the plan."""
        if self._profile is None:
            return
        self._profiled_speed = self._speed(trainer)
        events = self._stop_profile()
        operators, kernels = attention_kernels(events)
        self._profiled = True
        replayed = self._pool_gib is not None  # operators are Python's, kernels the GPU's
        observed = any(event.device_type == DeviceType.CUDA for event in events) if replayed else bool(events)
        counts = dict(operators | kernels)
        self._write("kernels", counts=counts, graphs=replayed, observed=observed)
        if not observed:
            LOGGER.info(
                f"yolo-flash: what one step {'from graphs ' if replayed else ''}ran could not be observed here: the "
                f"profile has no event of {'the GPU' if replayed else 'any kind'}. Another profiler may hold it."
            )
            self._restart_clock()
            return
        names: Counter[str] = Counter()
        for name, count in counts.items():
            names[short_name(name)] += count
        ran = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no fused attention"
        if replayed:
            LOGGER.info(f"yolo-flash: one step from graphs ran {ran}")
            if missing := self._eager_kernels.keys() - kernels.keys():
                LOGGER.warning(
                    f"yolo-flash: the step before the graphs also ran {', '.join(map(short_name, missing))}."
                )
            self._restart_clock()
            return
        LOGGER.info(f"yolo-flash: one step ran {ran}")
        self._eager_kernels = kernels
        for backend, layers in self._in_force().items():
            calls = sum(operators[name] for name in BACKENDS[backend].operators)
            if BACKENDS[backend].operators and calls < layers:
                LOGGER.warning(
                    f"yolo-flash: the plan says {backend} for {layers} layers, but the profiled step called it "
                    f"{calls} times. Please report this with flash.jsonl of the run folder."
                )
        self._restart_clock()

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Close the epoch, before the loggers and results.csv read `trainer.lr`, which carries our numbers to them."""
        alone = not self._images  # an epoch of one step, which was profiled
        speed = self._profiled_speed if alone else self._speed(trainer)
        allocated, reserved = peak_memory_gib(trainer.device)
        allocated = min(allocated + (self._pool_gib or 0.0), reserved)  # torch leaves the memory of graphs out
        backends = self._in_force()
        failed = self._dispatcher.failed
        trainer.lr.update({PEAK: round(allocated, 4), SPEED: round(speed, 2)})
        self._write(
            "epoch",
            epoch=trainer.epoch + 1,
            images_per_second=round(speed, 2),
            peak_allocated_gib=round(allocated, 4),
            peak_reserved_gib=round(reserved, 4),
            backends=dict(backends),
            fallbacks=dict(failed),
            unplanned=len(self._dispatcher.unplanned),
            graphs=self._replays,
        )
        used = f"peak {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved"
        ran = ", ".join(f"{name} x {count}" for name, count in backends.items())
        LOGGER.info(
            f"yolo-flash: {speed:.1f} images/s{' (the profiled step alone)' if alone else ''}, {used}"
            + (f"; {ran}; attention: {readable(self._avoided())} of score matrices avoided" if ran else "")
            + (f"; failed: {', '.join(failed)}" if failed else "")
            + _replays_text(self._replays)
        )

    def on_train_end(self, trainer: Any) -> None:
        """Draw flash.png beside Ultralytics' own plots."""
        if self._file is None or not trainer.args.plots or (picture := draw_run(self._file)) is None:
            return
        write_file(self._file.with_name("flash.png"), picture)

    def teardown(self, trainer: Any) -> None:
        """Leave no profiler behind when a run ends in the middle of a step."""
        self._stop_profile()

    def _training_rows(self) -> list[PlanRow]:
        return [row for row in self._rows if row.mode == "train"]

    def _avoided(self) -> int:
        """Bytes of score matrices that stock blocks would keep in a step, and the planned backends do not."""
        return score_bytes(row.decision.spec for row in self._training_rows() if BACKENDS[row.decision.backend].fused)

    def _in_force(self) -> Counter[str]:
        """Backend -> training layers, after what failed since the plan."""
        backends: Counter[str] = Counter()
        for row in self._training_rows():
            decision = row.decision
            if decision.backend in self._dispatcher.failed and self._machine is not None:
                decision = self._dispatcher.select(decision.spec, "auto", self._machine)
            backends[decision.backend] += 1
        return backends

    def _restart_clock(self) -> None:
        self._images, self._since = 0, time.perf_counter()

    def _speed(self, trainer: Any) -> float:
        """Images a second of all ranks since the clock was started."""
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return self._images * max(trainer.world_size, 1) / (time.perf_counter() - self._since)

    def _stop_profile(self) -> Any:
        running, self._profile = self._profile, None
        if running is None:
            return []
        try:
            with hushed():
                stop_profiler(running)
        finally:
            PROFILER.release()
        return running.events() or []

    def _write(self, event: str, **facts: Any) -> None:
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


def _replays_text(facts: dict[str, Any]) -> str:
    """`; 23 of 24 steps from CUDA graphs, 1 not: more boxes than the graphs have room for`; empty if none is."""
    if not facts.get("replayed"):
        return ""
    eager = "".join(f", {count} not: {reason}" for reason, count in facts["eager"].items())
    return f"; {facts['replayed']} of {facts['steps']} steps from CUDA graphs{eager}"


def known_columns(csv: Path, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that fit into an existing results.csv: a run that was begun without us has no column for ours."""
    if not csv.is_file():
        return dict(metrics)
    with csv.open(encoding="utf-8") as file:
        header = {column.strip() for column in file.readline().split(",")}
    return {name: value for name, value in metrics.items() if name not in COLUMNS or name in header}
