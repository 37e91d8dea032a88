"""`yolo-flash bench step`: one training step, stock against ours, measured so that the numbers can be quoted.

Every measurement is a fresh process, the arms take turns, and the median over the rounds is reported with its range. A
step is what the trainer of Ultralytics does with a batch: forward, loss, backward, clipping, optimizer and EMA, under
autocast, on random images with eight boxes each.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.utils import LOGGER, TQDM
from ultralytics.utils.torch_utils import ModelEMA, init_seeds

from ._version import __version__
from .backends import check_name
from .config import FlashConfig
from .files import write_file
from .machine import detect
from .patch import patch_modules
from .telemetry import GIB, peak_memory_gib

UNPATCHED = "unpatched"  # an arm without the plugin
_READY, _GO = "ready", "go\n"  # what a process says that has warmed up, and what the parent says when its turn comes


@dataclass(frozen=True)
class StepJob:
    """What `bench step` measures.

    Attributes:
        model: A detection model, YAML or checkpoint.
        imgsz: Side of the images in pixels.
        batch: Images a step.
        arms: `unpatched`, `auto` or names of backends; the first is what the others are compared with.
        rounds: Fresh processes of each arm.
        steps: Steps timed in each process.
        device: `cpu`, or the index of a GPU.
        amp: `fp16`, `bf16` or `fp32`; a CPU always runs in float32, as Ultralytics does.
        json: File for the numbers; none if empty.
    """

    model: str = "yolo12n.yaml"
    imgsz: int = 640
    batch: int = 16
    arms: tuple[str, ...] = (UNPATCHED, "auto")
    rounds: int = 3
    steps: int = 10
    device: str = ""
    amp: str = "fp16"
    json: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured before a process is started.

        Raises:
            ValueError: An arm or a precision that does not exist, or a count below 1.
        """
        for arm in self.arms:
            if arm != UNPATCHED:
                check_name(arm)
        if self.amp not in ("fp16", "bf16", "fp32"):
            raise ValueError(f"amp must be fp16, bf16 or fp32, found {self.amp!r}.")
        for name in ("imgsz", "batch", "rounds", "steps"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {value!r}.")


def bench_step(job: StepJob) -> dict[str, Any]:
    """Measure all arms in turns, log a table, write the JSON file.

    Returns:
        The job, the machine and, for each arm, the samples of every round.
    """
    samples: dict[str, list[dict[str, Any]]] = {arm: [] for arm in job.arms}
    results: dict[str, Any] = {"yolo_flash": __version__, "job": dataclasses.asdict(job), "machine": {}}
    total = job.rounds * len(job.arms)
    turns = (turn for _ in range(job.rounds) for turn in _one_round(job))
    for arm, answer in TQDM(turns, f"bench step {job.model} imgsz={job.imgsz} batch={job.batch}", total):
        results["machine"] = answer.pop("machine", results["machine"])
        samples[arm].append(answer)
        results["arms"] = {arm: {"samples": taken, "median": summary(taken)} for arm, taken in samples.items()}
        if job.json:  # after each process: a borrowed GPU may be taken away
            write_file(Path(job.json), (json.dumps(results, indent=2) + "\n").encode())
    LOGGER.info(table(results))
    return results


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> median, lowest and highest over the rounds; or the error of an arm that failed."""
    failed = [sample["error"] for sample in samples if "error" in sample]
    if failed:
        return {"error": failed[0]}
    figures: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples if sample[name] is not None]
        if values:
            figures[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return figures


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, ready for docs/results."""
    job = results["job"]
    first = results["arms"][job["arms"][0]]["median"]
    lines = [
        f"{job['model']} imgsz={job['imgsz']} batch={job['batch']}, {results['machine'].get('precision', job['amp'])}, "
        f"{job['rounds']} processes an arm, {job['steps']} steps each; {results['machine'].get('text', '')}; "
        f"yolo-flash {results['yolo_flash']}",
        "",
        "| arm | GPU ms, forward to backward | GPU ms, whole step | wall ms | peak GiB | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in job["arms"]:
        median = results["arms"][arm]["median"]
        if "error" in median:
            lines.append(f"| {arm} | {median['error']} | | | | |")
            continue
        key = "kernel_ms" if "kernel_ms" in median else "wall_ms"
        saved = "" if "error" in first else f"{first[key]['median'] / median[key]['median']:.2f}x"
        cells = [_cell(median, name) for name in ("network_kernel_ms", "kernel_ms", "wall_ms", "peak_gib")]
        lines.append(f"| {arm} | {' | '.join(cells)} | {saved} |")
    return "\n".join(lines)


def _cell(median: dict[str, Any], name: str) -> str:
    if name not in median:
        return "-"
    figure = median[name]
    return f"{figure['median']:.2f} ({figure['low']:.2f}..{figure['high']:.2f})"


def _one_round(job: StepJob) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm once, each in a process of its own: they get ready side by side, and then measure one at a time."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "yolo_flash.bench", json.dumps(dataclasses.asdict(job))]
    started = [
        (arm, subprocess.Popen([*command, arm], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        for arm in job.arms
    ]
    try:
        said = [_until_ready(process) for _, process in started]
        for (arm, process), before in zip(started, said, strict=True):
            lines = before + process.communicate(_GO)[0].splitlines()
            answers = [line for line in lines if line.startswith("{")]
            if process.returncode or not answers:
                last = ([line for line in lines if line.strip()] or ["the process ended without an answer"])[-1]
                yield arm, {"error": last.strip()[:200]}
            else:
                yield arm, json.loads(answers[-1])
    finally:
        for _, process in started:
            process.kill()
            process.wait()


def _until_ready(process: subprocess.Popen[str]) -> list[str]:
    """What a process says before it is ready, or before it ends."""
    lines: list[str] = []
    while line := process.stdout.readline() if process.stdout else "":
        if line.strip() == _READY:
            break
        lines.append(line.rstrip())
    return lines


# In the fresh process -------------------------------------------------------------------------------------------------
class Step:
    """A training step of one arm, for batches of any size."""

    def __init__(self, job: StepJob, arm: str) -> None:
        """Build the network, patched unless the arm is `unpatched`, on the device, with optimizer and EMA.

        Raises:
            ValueError: The model has another task than detection.
        """
        self.device = torch.device(
            f"cuda:{job.device or 0}" if job.device != "cpu" and torch.cuda.is_available() else "cpu"
        )
        self.on_gpu = self.device.type == "cuda"
        init_seeds(0, deterministic=False)
        model: Any = YOLO(job.model).model
        if not isinstance(model, nn.Module) or getattr(model, "task", "") != "detect":
            raise ValueError(f"bench step measures detection models, {job.model} is none.")
        model.args = get_cfg()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        self.model: Any = model.to(self.device).train()
        if self.on_gpu:
            self.model = self.model.to(memory_format=torch.channels_last)
        if arm != UNPATCHED:
            patch_modules(self.model, FlashConfig(backend=arm))
        self.ema = ModelEMA(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.on_gpu)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[job.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_gpu and self.dtype is torch.float16)

    def forward_to_backward(self, batch: dict[str, Any]) -> None:
        """Forward, loss and backward of a batch."""
        amp = self.on_gpu and self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=amp):
            loss, _ = self.model(batch)
            loss = loss.sum()
        self.scaler.scale(loss).backward()

    def network(self, batch: dict[str, Any]) -> None:
        """Forward, loss and backward, and no trace of them."""
        self.forward_to_backward(batch)
        self.optimizer.zero_grad()

    def whole(self, batch: dict[str, Any]) -> None:
        """All that the trainer does with a batch."""
        self.forward_to_backward(batch)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


def measure_step(job: StepJob, step: Step) -> dict[str, Any]:
    """Measure one arm in this process.

    Returns:
        Milliseconds of GPU kernels of forward, loss and backward (`network_kernel_ms`) and of the whole step
        (`kernel_ms`), None on a CPU; milliseconds on the clock (`wall_ms`, median); peak memory (`peak_gib`).
    """
    batch = _random_batch(job.batch, job.imgsz, step.device)
    if step.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(step.device)
    for _ in range(3 if step.on_gpu else 1):
        step.whole(batch)
    times = []
    for _ in range(job.steps):
        start = time.perf_counter()
        step.whole(batch)
        if step.on_gpu:
            torch.cuda.synchronize(step.device)
        times.append((time.perf_counter() - start) * 1e3)
    peak = peak_memory_gib(step.device)[0]
    machine = detect(step.device)
    network, whole = _kernel_ms([step.network, step.whole], batch) if step.on_gpu else (None, None)
    return {
        "network_kernel_ms": network,
        "kernel_ms": whole,
        "wall_ms": statistics.median(times),
        "peak_gib": peak,
        "machine": dataclasses.asdict(machine)
        | {"text": machine.with_versions, "precision": job.amp if step.on_gpu else "fp32"},
    }


def _random_batch(batch: int, imgsz: int, device: torch.device) -> dict[str, Any]:
    boxes = batch * 8
    return {
        "img": torch.rand(batch, 3, imgsz, imgsz, device=device),
        "cls": torch.randint(0, 80, (boxes, 1), device=device).float(),
        "bboxes": torch.rand(boxes, 4, device=device) * 0.4 + 0.1,
        "batch_idx": torch.arange(batch, device=device).repeat_interleave(8).float(),
    }


def _kernel_ms(parts: list[Callable[[dict[str, Any]], None]], batch: dict[str, Any], steps: int = 4) -> list[float]:
    """Mean time of all GPU kernels of each part; it varies by 1 %, and not with the speed of Python.

    One profile for all, since a profiler takes seconds to start and stop: a pause tells the parts apart.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for part in parts:
            for _ in range(steps):
                part(batch)
            torch.cuda.synchronize()
            time.sleep(0.5)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA
    )
    pauses = [after[0] - before[1] for before, after in pairwise(kernels)]
    cuts = sorted(sorted(range(len(pauses)), key=pauses.__getitem__)[-(len(parts) - 1) :])
    bounds = [0, *(cut + 1 for cut in cuts), len(kernels)]
    return [sum(end - start for start, end in kernels[a:b]) / 1e3 / steps for a, b in pairwise(bounds)]


def main() -> None:
    """One arm in this process: the job and the arm are the arguments, one line of JSON the answer.

    It warms up on small images, which loads the libraries, and measures when its turn comes.
    """
    values = json.loads(sys.argv[1])
    job = StepJob(**{**values, "arms": tuple(values["arms"])})
    try:
        step = Step(job, sys.argv[2])
        step.whole(_random_batch(2, 64, step.device))
        print(f"\n{_READY}", flush=True)  # on a line of its own, whatever a library left unfinished
        if sys.stdin.readline() != _GO:
            return  # the parent is gone
        answer = measure_step(job, step)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        answer = {"error": f"out of memory ({total:.0f} GiB)"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
