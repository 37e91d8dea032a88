"""`yolo-flash bench run`: whole trainings as users start them, stock against ours: seconds, memory, mAP."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..assets import offline
from ..assets.models import open_model
from ..engine.model import patch_model
from ..utils.memory import peak_memory_gib
from .process import UNPATCHED, take_turn
from .train import PLUGIN, SETTINGS, TrainJob, follow


@dataclass(frozen=True)
class RunJob(TrainJob):
    """What `bench run` measures: a process that trains, validates and saves by Ultralytics' defaults, then ends.

    Arms are those of `bench train`; `unpatched` and `auto`, the plugin's default, if none are named. Processes run one
    after the other. Each round has another seed, so that mAP has a spread.

    Attributes:
        epochs: Epochs of each process.
        cache: As in Ultralytics, whose default is to read images in every epoch.
        seed: Of the first round; the others count from there.
    """

    epochs: int = 30
    cache: str | bool = False

    command: ClassVar[str] = "run"
    whole_processes: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "process_s": "process s",
        "first_epoch_s": "first epoch s",
        "epoch_s": "median epoch s",
        "images_per_second": "images/s",
        "peak_gib": "peak GiB",
        "map50_95": "mAP50-95",
    }
    more_numbers: ClassVar[tuple[str, ...]] = ("process_s", "first_epoch_s", "epoch_s", "map50_95")
    more_columns: ClassVar[tuple[str, ...]] = (*SETTINGS, *more_numbers)
    at_least: ClassVar[dict[str, int]] = {**TrainJob.at_least, "epochs": 2}

    def default_arms(self) -> tuple[str, ...]:
        """Stock, and the plugin as users have it."""
        return UNPATCHED, "auto"

    def of_round(self, number: int) -> RunJob:
        """The job with the seed of a round."""
        return dataclasses.replace(self, seed=self.seed + number - 1)


class EpochClocks:
    """Follows a training by the events of Ultralytics' trainer.

    Attributes:
        ends: When each epoch ended, with its validation and saving, in seconds of `time.perf_counter`.
        speeds: Images a second of each epoch's training alone.
        peaks: GiB allocated at the peak of each epoch's training.
    """

    def __init__(self, device: torch.device) -> None:
        """Follow a training on this device."""
        self.ends: list[float] = []
        self.speeds: list[float] = []
        self.peaks: list[float] = []
        self._device = device

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Begin an epoch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Its steps are done; validation follows."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        loader = trainer.train_loader
        images = min(len(loader.dataset), len(loader) * loader.batch_size)  # the arms that compile drop some
        self.speeds.append(images / (time.perf_counter() - self._start))
        self.peaks.append(peak_memory_gib(self._device)[0])

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Its validation and saving are done, too."""
        self.ends.append(time.perf_counter())


def get_ready(job: RunJob, arm: str) -> Callable[[int], dict[str, Any]]:
    """Nothing is done ahead: the whole process counts."""

    def measure(imgsz: int) -> dict[str, Any]:
        """Train; `first_epoch_s` begins with the call of `train`, `epoch_s` is the median of the others.

        `images_per_second` is of training alone, without validation and saving, in the median of the epochs behind the
        first; `peak_gib` is the highest of training in any epoch.
        """
        model = open_model(job.model)
        if arm in PLUGIN:
            patch_model(model, **PLUGIN[arm])
        clocks = EpochClocks(job.torch_device())
        follow(model, clocks)
        with tempfile.TemporaryDirectory(prefix="yolo-flash-") as folder, offline.without_amp_weights():
            data, begin = offline.data_within_reach(job.data), time.perf_counter()
            model.train(data=data, imgsz=imgsz, project=folder, **job.arguments(arm))
        ends = clocks.ends[: job.epochs]  # the final evaluation is told as an epoch too
        epochs = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
        trainer: Any = model.trainer
        return {
            "seed": job.seed,
            "first_epoch_s": epochs[0],
            "epoch_s": statistics.median(epochs[1:]),
            "images_per_second": statistics.median(clocks.speeds[1:]),
            "peak_gib": max(clocks.peaks),
            "map50_95": float(trainer.metrics["metrics/mAP50-95(B)"]),
            "epoch_seconds": epochs,
        }

    return measure


if __name__ == "__main__":
    take_turn(RunJob, get_ready)
