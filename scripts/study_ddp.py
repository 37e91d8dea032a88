"""One GPU and two in Ultralytics' trainer, stock, eager and from CUDA graphs: the tables of docs/results/ddp-h100.md.

    python scripts/study_ddp.py data.yaml model.yaml imgsz batch results.jsonl [arm ...]     batch: images of each GPU

An arm is `1:eager` or `2:graphs`, all six without.

All arms get ready side by side and train one after the other: epochs with the loader, whose losses are compared, then
as many whose batches are the loader's first ones from memory, then one under torch's profiler, to see how
much of the all-reduce overlaps other kernels. The rank that comes first waits in the all-reduce, so that the shorter of
the two times counts. Milliseconds are those of an epoch divided by its iterations; two GPUs have half as many.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from ultralytics import YOLO

from yolo_flash import patch_model
from yolo_flash.bench.train import InMemory, follow

ARMS = [f"{gpus}:{arm}" for gpus in (1, 2) for arm in ("unpatched", "eager", "graphs")]
EPOCHS, WARM_UP, WORKERS = 6, 2, 8


class Follower:
    """Waits for its turn, and keeps milliseconds of an iteration and losses of every epoch of a rank."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.ms: list[float] = []
        self.losses: list[float] = []
        self.profile: profile | None = None

    def on_train_start(self, trainer: Any) -> None:
        (self.folder / f"ready{rank()}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)

    def on_train_epoch_start(self, trainer: Any) -> None:
        if trainer.epoch == EPOCHS:
            trainer.train_loader = InMemory(trainer.train_loader)
        if trainer.epoch == 2 * EPOCHS:
            self.profile = profile(
                activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
            )
            self.profile.start()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count = len(trainer.train_loader)
        if self.profile is None:
            self.ms.append((time.perf_counter() - self.start) / count * 1e3)
            self.losses.append(float(sum(trainer.tloss.values())))
            return
        self.profile.stop()
        facts = {"ms": self.ms, "losses": self.losses, "images": trainer.batch_size}
        facts["all_reduce_ms"], facts["alone_ms"] = [t / count for t in all_reduce(self.profile.events() or [])]
        self.profile = None
        draft = self.folder / f"draft{rank()}"
        draft.write_text(json.dumps(facts))
        draft.rename(self.folder / f"rank{rank()}.json")


def rank() -> str:
    """Asked for in the worker: Ultralytics' constant would travel there as the launching process has it."""
    return os.environ.get("RANK", "0")


def all_reduce(events: Any) -> tuple[float, float]:
    """Milliseconds of NCCL's kernels, and those of them in which no other kernel ran."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem"):
            spans["nccl" in event.name].append((event.time_range.start, event.time_range.end))
    alone, others = 0.0, merged(spans[False])
    talking = merged(spans[True])
    for start, end in talking:
        beside = sum(max(0.0, min(end, b) - max(start, a)) for a, b in others)
        alone += end - start - beside
    return sum(end - start for start, end in talking) / 1e3, alone / 1e3


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time without overlaps."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def one_arm(data: str, config: str, imgsz: int, batch: int, gpus: int, arm: str, folder: str) -> None:
    """Train in the place of a user."""
    model = YOLO(config)
    if arm != "unpatched":
        model = patch_model(model, graphs="on" if arm == "graphs" else "off")
    follow(model, Follower(folder))
    device = list(range(gpus)) if torch.cuda.is_available() else "cpu"
    model.train(
        data=data, imgsz=imgsz, batch=batch * gpus, epochs=2 * EPOCHS + 1, cache="ram", workers=WORKERS, device=device,
        project=folder, plots=False, val=False, save=False, pretrained=False, close_mosaic=0, patience=0, verbose=False,
    )  # fmt: skip


def until(files: list[Path], process: subprocess.Popen[Any], log: Path) -> None:
    """Wait for the files of a process.

    Raises:
        RuntimeError: It has ended without them.
    """
    while not all(file.exists() for file in files):
        if process.poll() is not None and not all(file.exists() for file in files):
            raise RuntimeError(log.read_text()[-3000:])
        time.sleep(0.05)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and the ranks that it has started, which wait for their turn."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    data, config, imgsz, batch, results, *arms = sys.argv[1:]
    if results == "only":
        one_arm(data, config, int(imgsz), int(batch), int(arms[0]), arms[1], arms[2])
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as ends:
        started = []
        for gpus, arm in [(int(name[0]), name[2:]) for name in arms or ARMS]:
            folder = Path(root, f"{arm}{gpus}")
            folder.mkdir()
            command = [sys.executable, __file__, data, config, imgsz, batch, "only", str(gpus), arm, str(folder)]
            with (folder / "log.txt").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
            ends.callback(end, process)
            started.append((gpus, arm, folder, process))
        for gpus, _, folder, process in started:
            until([folder / f"ready{rank}" for rank in range(gpus)], process, folder / "log.txt")
        for gpus, arm, folder, process in started:
            (folder / "go").touch()
            files = [folder / f"rank{rank}.json" for rank in range(gpus)]
            until(files, process, folder / "log.txt")
            ranks = [json.loads(file.read_text()) for file in files]
            quiet = min(ranks, key=lambda rank: float(rank["all_reduce_ms"]))
            found[gpus, arm] = {**ranks[0], "all_reduce_ms": quiet["all_reduce_ms"], "alone_ms": quiet["alone_ms"]}
            process.wait()
            with Path(results).open("a", encoding="utf-8") as file:
                row = {"model": config, "imgsz": int(imgsz), "gpus": gpus, "arm": arm, **found[gpus, arm]}
                print(json.dumps(row), file=file)
    print(f"{config} imgsz={imgsz}, batch of {batch} on each GPU\n")
    print(
        "| GPUs | arm | iteration ms | without the loader | images/s then | efficiency | all-reduce ms | of it alone |"
    )
    print("| --- |" + " --- |" * 7)
    speed: dict[tuple[int, str], float] = {}
    for (gpus, arm), facts in found.items():
        loader, memory = facts["ms"][WARM_UP:EPOCHS], facts["ms"][EPOCHS:]
        speed[gpus, arm] = facts["images"] / statistics.median(memory) * 1e3
        alone = speed.get((1, arm))
        efficiency = f"{speed[gpus, arm] / alone / gpus:.0%}" if gpus > 1 and alone else ""
        print(
            f"| {gpus} | {arm} | {spread(loader)} | {spread(memory)} | {speed[gpus, arm]:.0f} | {efficiency} | "
            f"{facts['all_reduce_ms']:.2f} | {facts['alone_ms']:.2f} |"
        )
    print(f"\n| GPUs | arm | loss of epochs 1 to {EPOCHS} |\n| --- | --- | --- |")
    for (gpus, arm), facts in found.items():
        print(f"| {gpus} | {arm} | {' '.join(f'{loss:.3f}' for loss in facts['losses'][:EPOCHS])} |")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})"


if __name__ == "__main__":
    main()
