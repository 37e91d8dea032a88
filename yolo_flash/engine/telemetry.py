"""The record of a training run: plan, kernels, memory and speed, in the log and in `flash.jsonl` of the run folder."""

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
from ultralytics.utils import LOGGER

from .._version import __version__
from ..backends.registry import BACKENDS, label
from ..config import FlashConfig
from ..dispatch.decision import Decision
from ..dispatch.dispatcher import Dispatcher
from ..machine import Machine
from ..planning.memory import score_bytes
from ..planning.plan import PlanRow, describe, plan_entry
from ..utils.files import write_file
from ..utils.memory import GIB, peak_memory_gib, readable
from .clock import EpochClock
from .run_plot import draw_run
from .step_profile import StepProfile

RESULT_COLUMNS = PEAK, SPEED = "flash/peak_allocated_gib", "flash/images_per_second"


class Telemetry:
    """Records one training run on rank 0; a method for each event of Ultralytics' trainer that matters.

    Each line of `flash.jsonl` is one JSON object. Memory and speed also go to results.csv and to Ultralytics' loggers.
    `FlashRun.tell` catches errors: telemetry neither fails a run nor changes its result.
    """

    def __init__(self, config: FlashConfig, dispatcher: Dispatcher) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._machine: Machine | None = None
        self._decisions: list[Decision] = []  # of the layers in training
        self._file: Path | None = None
        self._profile = StepProfile()
        self._images = 0
        self._since = 0.0
        self._profiled_speed = 0.0
        self._pool_gib: float | None = None  # memory of the graphs that steps run from; None while steps run eager
        self._update_gib = 0.0  # and of those in optimizer steps
        self._clock: EpochClock | None = None  # from the first epoch on
        self._epoch: tuple[dict[str, Any], str] | None = None  # facts and line of an epoch whose validation is to come
        self._hungry = False  # whether the run was told that its GPU waits for data

    def plan(self, trainer: Any, rows: list[PlanRow], machine: Machine) -> None:
        """Record the plan; a new one, after the batch was halved, also discards a profile under way."""
        self._decisions, self._machine = [row.decision for row in rows if row.mode == "train"], machine
        self._pool_gib = None  # graphs of another batch are gone
        self._profile.stop()
        LOGGER.info(describe(rows, machine))
        if self._file is None:
            if self._dispatcher.memory_limited and trainer.device.type == "cuda" and (avoided := self._avoided()):
                images = trainer.batch_size
                LOGGER.info(
                    f"yolo-flash: AutoBatch took {images} images a step. They need {readable(avoided)} less than with "
                    f"stock attention, {readable(avoided // images)} of score matrices an image: the batch may be "
                    f"larger than without the plugin."
                )
            self._file = _begin_file(trainer)
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
        """Record whether steps run from CUDA graphs: why not, or the gain; the first such step is profiled too."""
        self._write("graphs", **facts)
        if why_not := facts["why_not"]:
            self._pool_gib = None
            LOGGER.info(f"yolo-flash: no CUDA graphs: {why_not}")
            return
        self._pool_gib = facts["pool_bytes"] / GIB
        seconds = f"{facts['capture_seconds']:.1f} s"
        if again := facts.get("again"):
            LOGGER.info(f"yolo-flash: CUDA graphs captured again in {seconds}: {again}")
            return
        gain = ""
        if "graph_ms" in facts:
            eager, replayed = facts["eager_ms"], facts["graph_ms"]
            gain = f": {eager:.1f} -> {replayed:.1f} ms a step ({eager / replayed:.2f}x)"
        outside = facts.get("loss_outside")
        LOGGER.info(
            f"yolo-flash: steps run from CUDA graphs{gain}; captured in {seconds}, they hold "
            f"{readable(facts['pool_bytes'])}" + (f"; the loss stays outside of them: {outside}" if outside else "")
        )
        self._profile.profile_graphs()

    def optimizer(self, trainer: Any, facts: dict[str, Any]) -> None:
        """Record whether optimizer steps are direct, and what of them comes from graphs."""
        self._write("optimizer", **facts)
        self._update_gib = facts.get("pool_bytes", 0) / GIB
        if why_not := facts["why_not"]:
            LOGGER.info(f"yolo-flash: the optimizer step stays Ultralytics' own: {why_not}")
        elif why_not := facts.get("no_graphs"):
            LOGGER.info(f"yolo-flash: no CUDA graphs in the optimizer step: {why_not}")

    def saw_images(self, trainer: Any, count: int) -> None:
        """Count the images of a batch."""
        self._images += count

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Start the clocks and the peak memory of an epoch."""
        self._close_epoch()  # one without an end, whose losses were NaN
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        if self._clock is None:
            self._clock = EpochClock(trainer.device)
        self._clock.restart()
        self._restart_clock()

    def on_train_batch_start(self, trainer: Any) -> None:
        """Profile one step: the first, or with `compile` the second, since the first one compiles."""
        if self._clock is not None:
            self._clock.got_batch()
        compiles = trainer.args.compile and not self._images
        if not compiles and self._profile.start(trainer.device):
            self._restart_clock()

    def on_train_batch_end(self, trainer: Any) -> None:
        """Record the attention of a profiled step."""
        if self._clock is not None:
            self._clock.did_step()
        if self._profile.running is None:
            return
        self._profiled_speed = self._speed(trainer)
        facts = self._profile.finish(replayed=self._pool_gib is not None)
        self._write("kernels", **facts)
        self._profile.compare(facts, self._in_force())
        self._restart_clock()
        if self._clock is not None:
            self._clock.lap("rest")  # what the profile took: no wait for the loader

    def on_train_epoch_end(self, trainer: Any, replays: dict[str, Any]) -> None:
        """Sum up an epoch, before its validation, with what `GraphPolicy.end_epoch` counted.

        `trainer.lr` carries our numbers to the loggers and to results.csv, which read it next.
        """
        alone = not self._images  # an epoch of one step, which was profiled
        speed = self._profiled_speed if alone else self._speed(trainer)
        allocated, reserved = peak_memory_gib(trainer.device)
        held = (self._pool_gib or 0.0) + self._update_gib  # torch leaves the memory of graphs out
        allocated = min(allocated + held, reserved)
        backends = self._in_force()
        failed = self._dispatcher.failed
        trainer.lr.update({PEAK: round(allocated, 4), SPEED: round(speed, 2)})
        facts = {
            "epoch": trainer.epoch + 1,
            "images_per_second": round(speed, 2),
            "peak_allocated_gib": round(allocated, 4),
            "peak_reserved_gib": round(reserved, 4),
            "backends": dict(backends),
            "fallbacks": dict(failed),
            "unplanned": len(self._dispatcher.unplanned),
            "graphs": replays,
        }
        used = f"peak {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved"
        ran = ", ".join(f"{label(name)} x {count}" for name, count in backends.items())
        eager = "".join(f", {count} not: {reason}" for reason, count in replays.get("eager", {}).items())
        replayed = replays.get("replayed")
        line = (
            f"yolo-flash: {speed:.1f} images/s{' (the profiled step alone)' if alone else ''}, {used}"
            + (f"; {ran}; attention: {readable(self._avoided())} of score matrices avoided" if ran else "")
            + (f"; failed: {', '.join(failed)}" if failed else "")
            + (f"; {replayed} of {replays['steps']} steps from CUDA graphs{eager}" if replayed else "")
        )
        self._epoch = facts, line
        self._lap("rest")

    def validated(self, trainer: Any, replays: dict[str, Any]) -> None:
        """Count the time of a validation, and what `ValidationGraphs` counted in it."""
        self._lap("validation")
        if self._epoch is not None and replays:
            facts, line = self._epoch
            replayed = f"; {replays['replayed']} of {replays['batches']} validation batches from CUDA graphs"
            self._epoch = facts | {"validation": replays}, line + (replayed if replays["replayed"] else "")

    def on_model_save(self, trainer: Any) -> None:
        """Count the time of saving."""
        self._lap("saving")

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Record the epoch, and once in a run that the GPU waits for data."""
        self._lap("rest")
        self._close_epoch()
        # The first epoch reads images from the disk that later ones may find in memory.
        if self._hungry or self._clock is None or not trainer.epoch or not (waits := self._clock.hungry()):
            return
        self._hungry = True
        helps = [f"more workers= than {trainer.args.workers}"]
        helps += ["cache=ram"] if not trainer.args.cache else []
        helps += ["less augmentation (mosaic=0)"] if trainer.args.mosaic else []
        LOGGER.info(
            f"yolo-flash: the data loader is the limit: {waits} wait for it. What may help: {', '.join(helps)}."
        )

    def on_train_end(self, trainer: Any) -> None:
        """Draw flash.png beside Ultralytics' own plots."""
        if self._file is not None and trainer.args.plots and (picture := draw_run(self._file)) is not None:
            write_file(self._file.with_name("flash.png"), picture)

    def teardown(self, trainer: Any) -> None:
        """Stop the profiler of a run that ends in the middle of a step; record an epoch that is still to be."""
        self._profile.stop()
        self._close_epoch()

    def _lap(self, part: str) -> None:
        if self._clock is not None and self._epoch is not None:
            self._clock.lap(part)

    def _close_epoch(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is None or self._clock is None:
            return
        facts, line = epoch
        self._write("epoch", **facts, seconds={part: round(s, 3) for part, s in self._clock.seconds.items()})
        LOGGER.info(f"{line}; {self._clock.text()}")

    def _avoided(self) -> int:
        """Bytes of score matrices that stock blocks would keep in a step, and the planned backends do not."""
        return score_bytes(decision.spec for decision in self._decisions if BACKENDS[decision.backend].fused)

    def _in_force(self) -> Counter[str]:
        """Backend -> training layers, after what failed since the plan."""
        backends: Counter[str] = Counter()
        for decision in self._decisions:
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

    def _write(self, event: str, **facts: Any) -> None:
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **facts}) + "\n")


def known_columns(csv: Path, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that fit into an existing results.csv: a run that began without the plugin lacks our columns."""
    if not csv.is_file():
        return dict(metrics)
    with csv.open(encoding="utf-8") as file:
        header = {column.strip() for column in file.readline().split(",")}
    return {name: value for name, value in metrics.items() if name not in RESULT_COLUMNS or name in header}


def _begin_file(trainer: Any) -> Path:
    """The flash.jsonl of a run: absent for a new run, whole lines alone for a resumed one."""
    file = Path(trainer.save_dir) / "flash.jsonl"
    if not trainer.resume:
        file.unlink(missing_ok=True)
    elif file.is_file():
        whole, end, torn = file.read_bytes().rpartition(b"\n")
        if torn:  # the run was killed while it wrote
            write_file(file, whole + end)
    return file
