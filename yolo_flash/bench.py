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
from .machine import detect
from .patch import patch_modules
from .telemetry import GIB, peak_memory_gib

UNPATCHED = "unpatched"  # an arm without the plugin
_GO = "go\n"  # what the parent writes to a process whose turn it is


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
    for _ in TQDM(range(job.rounds), desc=f"bench step {job.model} imgsz={job.imgsz} batch={job.batch}"):
        for arm, answer in _one_round(job):
            samples[arm].append(answer)
    machine: dict[str, Any] = {}
    for sample in (sample for arm in job.arms for sample in samples[arm]):
        machine = sample.pop("machine", machine)
    results = {
        "yolo_flash": __version__,
        "job": dataclasses.asdict(job),
        "machine": machine,
        "arms": {arm: {"samples": samples[arm], "median": summary(samples[arm])} for arm in job.arms},
    }
    LOGGER.info(table(results))
    if job.json:
        Path(job.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> median, lowest and highest over the rounds; or the error of an arm that failed."""
    failed = [sample["error"] for sample in samples if "error" in sample]
    if failed:
        return {"error": failed[0]}
    figures: dict[str, Any] = {}
    for name in samples[0]:
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
    """Every arm once, each in a process of its own: they import side by side, and then measure one at a time."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "yolo_flash.bench", json.dumps(dataclasses.asdict(job))]
    started = [
        (arm, subprocess.Popen([*command, arm], stdin=pipe, stdout=pipe, stderr=pipe, text=True)) for arm in job.arms
    ]
    try:
        for arm, process in started:
            stdout, stderr = process.communicate(_GO)
            answers = [line for line in stdout.splitlines() if line.startswith("{")]
            if process.returncode or not answers:
                last = (stderr.strip().splitlines() or ["the process ended without an answer"])[-1]
                yield arm, {"error": last[:200]}
            else:
                yield arm, json.loads(answers[-1])
    finally:
        for _, process in started:
            process.kill()
            process.wait()


# In the fresh process -------------------------------------------------------------------------------------------------
def measure_step(job: StepJob, arm: str, model: Any) -> dict[str, Any]:
    """Measure one arm in this process.

    Args:
        job: What to measure.
        arm: One of its arms.
        model: The network in main memory, as `build_network` makes it; it is patched and moved.

    Returns:
        Milliseconds of GPU kernels of forward, loss and backward (`network_kernel_ms`) and of the whole step
        (`kernel_ms`), None on a CPU; milliseconds on the clock (`wall_ms`, median); peak memory (`peak_gib`).
    """
    device = torch.device(f"cuda:{job.device or 0}" if job.device != "cpu" and torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    init_seeds(0, deterministic=False)
    step, forward_to_backward = _make_step(job, arm, device, model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3 if on_gpu else 1):
        step()
    times = []
    for _ in range(job.steps):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    peak = peak_memory_gib(device)[0]
    machine = detect(device)
    return {
        "network_kernel_ms": _kernel_ms(forward_to_backward) if on_gpu else None,
        "kernel_ms": _kernel_ms(step) if on_gpu else None,
        "wall_ms": statistics.median(times),
        "peak_gib": peak,
        "machine": dataclasses.asdict(machine)
        | {"text": machine.with_versions, "precision": job.amp if on_gpu else "fp32"},
    }


def build_network(job: StepJob) -> nn.Module:
    """The detection model as the trainer has it.

    Raises:
        ValueError: The model has another task.
    """
    model = YOLO(job.model).model
    if not isinstance(model, nn.Module) or model.task != "detect":
        raise ValueError(f"bench step measures detection models, {job.model} is none.")
    model.args = get_cfg()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point)
    return model


def _make_step(
    job: StepJob, arm: str, device: torch.device, model: Any
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The whole step, and its part from forward to backward."""
    on_gpu = device.type == "cuda"
    model = model.to(device).train()
    if on_gpu:
        model = model.to(memory_format=torch.channels_last)
    if arm != UNPATCHED:
        patch_modules(model, FlashConfig(backend=arm))
    ema = ModelEMA(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[job.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu and dtype is torch.float16)
    batch = _random_batch(job.batch, job.imgsz, device)

    def forward_to_backward() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=on_gpu and dtype is not torch.float32):
            loss, _ = model(batch)
            loss = loss.sum()
        scaler.scale(loss).backward()

    def network() -> None:
        forward_to_backward()
        optimizer.zero_grad()

    def step() -> None:
        forward_to_backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(model)

    return step, network


def _random_batch(batch: int, imgsz: int, device: torch.device) -> dict[str, Any]:
    boxes = batch * 8
    return {
        "img": torch.rand(batch, 3, imgsz, imgsz, device=device),
        "cls": torch.randint(0, 80, (boxes, 1), device=device).float(),
        "bboxes": torch.rand(boxes, 4, device=device) * 0.4 + 0.1,
        "batch_idx": torch.arange(batch, device=device).repeat_interleave(8).float(),
    }


def _kernel_ms(run: Callable[[], None], steps: int = 4) -> float:
    """Mean time of all GPU kernels of a step; it varies by 1 %, and not with the speed of Python."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels) / 1e3 / steps


def main() -> None:
    """One arm in this process: the job and the arm are the arguments, one line of JSON the answer.

    The device is touched only after the word to go on standard input, so that the arms do not disturb each other.
    """
    values = json.loads(sys.argv[1])
    job = StepJob(**{**values, "arms": tuple(values["arms"])})
    model = build_network(job)
    if sys.stdin.readline() != _GO:
        return  # the parent is gone
    try:
        answer = measure_step(job, sys.argv[2], model)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        answer = {"error": f"out of memory ({total:.0f} GiB)"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
