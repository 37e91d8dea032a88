"""`yolo-flash bench run`: whole trainings, stock against ours, as users start them: seconds until the end, and mAP."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..assets import offline
from ..assets.models import open_model
from ..engine.model import patch_model
from .process import take_turn
from .train import PLUGIN, SETTINGS, UNPATCHED, TrainJob

_MAP = "metrics/mAP50-95(B)"


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
        "map50_95": "mAP50-95",
    }
    more_numbers: ClassVar[tuple[str, ...]] = tuple(columns)
    more_columns: ClassVar[tuple[str, ...]] = (*SETTINGS, *columns)
    at_least: ClassVar[dict[str, int]] = {"batch": 1, "rounds": 1, "epochs": 2, "workers": 0, "seed": 0}

    def default_arms(self) -> tuple[str, ...]:
        """Stock, and the plugin as users have it."""
        return UNPATCHED, "auto"

    def of_round(self, number: int) -> RunJob:
        """The job with the seed of a round."""
        return dataclasses.replace(self, seed=self.seed + number - 1)


def get_ready(job: RunJob, arm: str) -> Callable[[int], dict[str, Any]]:
    """Nothing is done ahead: the whole process counts."""

    def measure(imgsz: int) -> dict[str, Any]:
        """Train; `first_epoch_s` begins with the call of `train`, `epoch_s` is the median of the others."""
        model = open_model(job.model)
        if arm in PLUGIN:
            patch_model(model, **PLUGIN[arm])
        ends: list[float] = []
        model.add_callback("on_fit_epoch_end", lambda trainer: ends.append(time.perf_counter()))
        with tempfile.TemporaryDirectory(prefix="yolo-flash-") as folder, offline.without_amp_weights():
            data, begin = offline.training_data(job.data), time.perf_counter()
            model.train(data=data, imgsz=imgsz, project=folder, **job.arguments(arm))
        ends = ends[: job.epochs]  # the final evaluation is told as an epoch too
        epochs = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
        trainer: Any = model.trainer
        return {
            "seed": job.seed,
            "first_epoch_s": epochs[0],
            "epoch_s": statistics.median(epochs[1:]),
            "map50_95": float(trainer.metrics[_MAP]),
            "epoch_seconds": epochs,
        }

    return measure


if __name__ == "__main__":
    take_turn(RunJob, get_ready)
