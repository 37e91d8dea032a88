"""`yolo-flash bench train`: an iteration of Ultralytics' own training, stock against ours, on a real data set.

`bench step` times the network on random images. Here Ultralytics' trainer runs as users run it, with its data loader,
augmentation, optimizer and progress bar; callbacks hold the clocks.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.checks import check_file

from ..assets import offline
from ..assets.models import open_model
from ..backends.registry import BACKENDS
from ..engine.model import patch_model
from ..utils.errors import did_you_mean
from ..utils.memory import peak_memory_gib
from .process import UNPATCHED, BaseJob, take_turn
from .rounds import bench

# Arms without the plugin -> Ultralytics' own compile=
STOCK: dict[str, bool | str] = {UNPATCHED: False, "compile": True, "compile_max_autotune": "max-autotune"}
PLUGIN: dict[str, dict[str, Any]] = {
    **{name: {"backend": name, "graphs": "off"} for name in BACKENDS},
    "eager": {"graphs": "off"},
    "graphs": {"graphs": "on"},
    "auto": {"graphs": "auto"},
}
TRAIN_ARMS = (*STOCK, *PLUGIN)
WARMUP_EPOCHS = 2  # in which caches fill, kernels are compiled, the plugin profiles a step and graphs are captured
_IN_MEMORY = 16  # batches at most
SETTINGS = ("data", "epochs", "workers", "cache", "seed", "mosaic")  # columns of a CSV file beside the figures


@dataclass(frozen=True)
class TrainJob(BaseJob):
    """What `bench train` measures: a model in Ultralytics' trainer, from fresh weights.

    Without `arms`, `unpatched`, which is stock Ultralytics, `eager`, the plugin without CUDA graphs, and on a GPU
    `graphs`, the plugin with them. There are also `auto`, where the plugin decides about them; each backend by its
    name, without graphs; and `compile` and `compile_max_autotune`, stock Ultralytics with `compile=True` and
    `compile=max-autotune`. Those compile for minutes, and drop the last batch of an epoch if it is smaller than the
    others.

    Attributes:
        data: A data set.
        epochs: Epochs of each process; the first two are not measured. As many as are measured follow, whose batches
            are the first ones of the loader, held in memory: what an iteration takes where the loader is no limit.
        workers: Processes of the data loader; a CPU trains without, as Ultralytics does.
        cache: Where the images are held, `ram` or `disk`; False reads them in every epoch.
        seed: Of weights and augmentation.
        mosaic: Probability of the augmentation that takes most of the loader's time, to the last epoch.

    `amp` is `fp16`, `bf16` or `fp32`.
    """

    batch: int = 16
    rounds: int = 1
    amp: str = "fp16"
    data: str = "coco8.yaml"
    epochs: int = 10
    workers: int = 8
    cache: str | bool = "ram"
    seed: int = 0
    mosaic: float = float(DEFAULT_CFG_DICT["mosaic"])

    command: ClassVar[str] = "train"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    columns: ClassVar[dict[str, str]] = {
        "iteration_ms": "iteration ms",
        "without_loader_ms": "without the loader",
        "wait_ms": "wait ms",
        "images_per_second": "images/s",
        "peak_gib": "peak GiB",
        "reserved_gib": "reserved GiB",
    }
    more_numbers: ClassVar[tuple[str, ...]] = (
        *("iterations", "iteration_ms", "without_loader_ms", "wait_ms", "reserved_gib"),
    )
    more_columns: ClassVar[tuple[str, ...]] = (*SETTINGS, *more_numbers)
    at_least: ClassVar[dict[str, int]] = {**BaseJob.at_least, "epochs": WARMUP_EPOCHS + 1, "workers": 0, "seed": 0}

    def __post_init__(self) -> None:
        """As in `BaseJob`; one GPU, and a mosaic and cache that Ultralytics knows."""
        super().__post_init__()
        if self.device not in ("", "cpu") and not self.device.isdigit():
            raise ValueError(f"device must be cpu or the index of one GPU, found {self.device!r}.")
        if not isinstance(self.mosaic, (int, float)) or not 0 <= self.mosaic <= 1:
            raise ValueError(f"mosaic must be a number from 0 to 1, found {self.mosaic!r}.")
        if self.cache not in ("ram", "disk", True, False):
            raise ValueError(f"cache must be ram, disk or False, found {self.cache!r}.")

    def check_arm(self, arm: str) -> None:
        """As in `BaseJob`, among `TRAIN_ARMS`."""
        if arm not in TRAIN_ARMS:
            raise ValueError(f"there is no arm {arm!r}.{did_you_mean(arm, TRAIN_ARMS)}")

    def default_arms(self) -> tuple[str, ...]:
        """The arms of a job that names none."""
        return (UNPATCHED, "eager", "graphs") if self.torch_device().type == "cuda" else (UNPATCHED, "eager")

    def arguments(self, arm: str) -> dict[str, Any]:
        """Arguments of `YOLO.train` that say what the job says."""
        device = self.torch_device()
        amp: bool | str = "bf16" if self.amp == "bf16" else self.amp == "fp16"
        return {
            **{name: getattr(self, name) for name in ("batch", "epochs", "workers", "cache", "seed")},
            "device": str(device.index) if device.type == "cuda" else "cpu",
            "amp": amp if device.type == "cuda" else False,
            "mosaic": float(self.mosaic),
            "compile": STOCK.get(arm, False),
            "verbose": False,
        }


def bench_train(job: TrainJob) -> list[dict[str, Any]]:
    """Measure all arms in turns; the results are those of `bench`.

    Raises:
        OSError: A file cannot be written, or the data set is not there.
    """
    data = offline.data_within_reach(job.data)  # also makes the stand-in, before several processes would
    if str(data).endswith((".yaml", ".yml")) and "://" not in str(data):
        check_file(data, download=False)
    return bench(job if job.arms else dataclasses.replace(job, arms=job.default_arms()))


class Clocks:
    """Follows a training by the events of Ultralytics' trainer, and keeps the times of every epoch.

    CUDA is waited for at the end of an epoch only, so that an iteration is its share of the epoch.
    """

    def __init__(self, job: TrainJob) -> None:
        """Follow a training of this job."""
        self.epochs: list[dict[str, float]] = []
        self._job = job
        self._device = job.torch_device()
        self._starts: list[float] = []
        self._ends: list[float] = []

    def on_train_start(self, trainer: Any) -> None:
        """Refuse a GPU that Ultralytics has found unable to train with AMP, if the job wants that."""
        if self._device.type == "cuda" and trainer.amp != (self._job.amp != "fp32"):
            raise ValueError(f"Ultralytics does not train in {self._job.amp} on this GPU: measure with amp=fp32.")

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Begin an epoch."""
        if trainer.batch_size != self._job.batch:  # halved by Ultralytics, which begins the epoch again
            raise torch.OutOfMemoryError
        if len(self.epochs) == self._job.epochs:
            trainer.train_loader = InMemory(trainer.train_loader)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._starts, self._ends = [], [time.perf_counter()]

    def on_train_batch_start(self, trainer: Any) -> None:
        """The loader has given a batch."""
        self._starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any) -> None:
        """The step is done."""
        self._ends.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Close an epoch, before its validation."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._ends[0]
        loader, losses = trainer.train_loader, trainer.tloss
        count, images = len(self._starts), min(len(loader.dataset), len(self._starts) * loader.batch_size)
        waits = [start - end for start, end in zip(self._starts, self._ends, strict=False)]
        peak, reserved = peak_memory_gib(self._device)
        self.epochs.append(
            {
                "iteration_ms": seconds / count * 1e3,
                "wait_ms": sum(waits) / count * 1e3,
                "images_per_second": images / seconds,
                "peak_gib": peak,
                "reserved_gib": reserved,
                "iterations": count,
                "loss": sum(float(loss) for loss in (losses.values() if isinstance(losses, dict) else losses)),
            }
        )

    def figures(self) -> dict[str, Any]:
        """What a process answers.

        Returns:
            Medians over the epochs with the loader behind the first two: milliseconds of an iteration (`iteration_ms`,
            mean over the epoch, from its start) and of waiting for the loader in it (`wait_ms`, mean), and
            `images_per_second`; the highest memory in those epochs, `peak_gib` allocated and `reserved_gib`; the
            iterations of an epoch. The median `without_loader_ms` of an iteration over the epochs with batches from
            memory. As lists of all epochs, `losses` with the loader, `epoch_iteration_ms` and
            `epoch_without_loader_ms`.
        """
        epochs = self.epochs[: self._job.epochs]
        kept = epochs[WARMUP_EPOCHS:]
        times = ("iteration_ms", "wait_ms", "images_per_second")
        without_loader = [epoch["iteration_ms"] for epoch in self.epochs[len(epochs) :]]
        return {
            **{name: statistics.median(epoch[name] for epoch in kept) for name in times},
            **{name: max(epoch[name] for epoch in kept) for name in ("peak_gib", "reserved_gib", "iterations")},
            "without_loader_ms": statistics.median(without_loader),
            "losses": [epoch["loss"] for epoch in epochs],
            "epoch_iteration_ms": [epoch["iteration_ms"] for epoch in epochs],
            "epoch_without_loader_ms": without_loader,
        }


def follow(model: Any, follower: object) -> None:
    """Have Ultralytics call the methods `on_...` of an object at the events of those names."""
    for event in [name for name in dir(follower) if name.startswith("on_")]:
        model.add_callback(event, getattr(follower, event))


class InMemory:
    """A data loader whose batches are its first ones, again and again, without its work."""

    def __init__(self, loader: Any) -> None:
        """Take the first batches."""
        self._loader = loader
        self._batches = list(itertools.islice(iter(loader), min(len(loader), _IN_MEMORY)))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """An epoch; the trainer puts tensors of the device into what it gets."""
        return (dict(batch) for batch in self._batches)

    def __getattr__(self, name: str) -> Any:
        """Anything else that the trainer asks of a loader."""
        return getattr(self._loader, name)


def get_ready(job: TrainJob, arm: str) -> Callable[[int], dict[str, Any]]:
    """Load the libraries, build the model, patched unless the arm is a stock one, and find the data set.

    Returns:
        Trains at a size and gives the figures of `Clocks`.
    """
    model = open_model(job.model)
    if arm in PLUGIN:
        patch_model(model, **PLUGIN[arm])
    data = offline.data_within_reach(job.data)
    torch.zeros(1, device=job.torch_device())  # loads CUDA

    def measure(imgsz: int) -> dict[str, Any]:
        clocks = Clocks(job)
        follow(model, clocks)
        with tempfile.TemporaryDirectory(prefix="yolo-flash-") as folder, offline.without_amp_weights():
            model.train(data=data, imgsz=imgsz, project=folder, **train_arguments(job, arm))
        return clocks.figures()

    return measure


def train_arguments(job: TrainJob, arm: str) -> dict[str, Any]:
    """Arguments of `YOLO.train`; all others are Ultralytics' defaults.

    Ultralytics saves and validates after the last epoch whatever it is told, which is behind the last clock.
    """
    return {
        **job.arguments(arm),
        "epochs": 2 * job.epochs - WARMUP_EPOCHS,  # the latter ones from memory
        "close_mosaic": 0,  # epochs are alike
        "patience": 0,
        "exist_ok": True,
        **dict.fromkeys(("pretrained", "val", "save", "plots"), False),
    }


if __name__ == "__main__":
    take_turn(TrainJob, get_ready)
