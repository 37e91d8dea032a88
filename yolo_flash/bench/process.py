"""How `bench step`, `predict`, `train` and `run` measure: a fresh process for every sample, one measuring at a time.

The parent starts the processes of a round side by side. Each builds its arm, loads the libraries (by small images,
where calls are measured), says that it is ready, and measures when its turn comes. Its last line of output is the
answer, as JSON.
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
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch.profiler import DeviceType

from ..backends.registry import check_name
from ..machine import detect
from ..utils.memory import GIB, peak_memory_gib
from ..utils.profiler import kernels_profiled
from ..utils.timing import clock_ms

UNPATCHED = "unpatched"  # an arm without the plugin
GRAPHS = "graphs"  # an arm with the backends of `auto`, from CUDA graphs
_READY, _GO = "ready", "go\n"  # what a process says that has warmed up, and what the parent says when its turn comes


@dataclass(frozen=True)
class BaseJob:
    """Settings that `bench step`, `predict`, `train` and `run` share.

    Attributes:
        model: A model, YAML or checkpoint.
        imgsz: Sides of the images in pixels, measured one after the other.
        batch: Images a call or iteration.
        arms: Names of backends, `auto`, or arms without the plugin; the first is what the others are compared with.
        rounds: Fresh processes of each arm and size.
        device: `cpu`, or the index of a GPU.
        amp: The precision on a GPU; a CPU always runs in float32, as Ultralytics does.
        csv: File for every sample, a row each; none if empty.
        json: File for the samples and medians of one size; none if empty.
    """

    model: str = "yolo12n.yaml"
    imgsz: tuple[int, ...] = (640,)
    batch: int = 1
    arms: tuple[str, ...] = ()
    rounds: int = 3
    device: str = ""
    amp: str = "fp32"
    csv: str = ""
    json: str = ""

    command: ClassVar[str]  # as typed after `bench`
    precisions: ClassVar[tuple[str, ...]]
    stock_arms: ClassVar[tuple[str, ...]]  # those that run without the plugin
    whole_processes: ClassVar[bool] = False  # whether a process is measured from its start to its end
    columns: ClassVar[dict[str, str]]  # figure -> its head in the table
    more_columns: ClassVar[tuple[str, ...]] = ()  # of the CSV file: keys and figures that only this job has
    at_least: ClassVar[dict[str, int]] = {"batch": 1, "rounds": 1}

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, as a ValueError, before a process is started."""
        for arm in self.arms:
            self.check_arm(arm)
        *others, last = self.precisions
        if self.amp not in self.precisions:
            raise ValueError(f"amp must be {', '.join(others)} or {last}, found {self.amp!r}.")
        counts = [(name, getattr(self, name), least) for name, least in self.at_least.items()]
        for name, value, least in [*(("imgsz", side, 1) for side in self.imgsz), *counts]:
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, found {value!r}.")
        if not self.imgsz:
            raise ValueError("imgsz must name at least one size.")
        if self.json and len(self.imgsz) > 1:
            raise ValueError(f"json= holds one size, imgsz= names {len(self.imgsz)}: csv= holds them all.")

    def check_arm(self, arm: str) -> None:
        """Refuse an arm that does not exist by a ValueError with the nearest valid name."""
        if arm not in self.stock_arms:
            check_name(arm)

    def of_round(self, number: int) -> BaseJob:
        """The job of a round, the first of which is 1."""
        return self

    def torch_device(self) -> torch.device:
        """The device that the job names; the first GPU if it names none and there is one."""
        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        return torch.device(f"cuda:{self.device or 0}" if on_gpu else "cpu")


@dataclass(frozen=True)
class TimedJob(BaseJob):
    """Settings that `bench step` and `bench predict` share: both time calls.

    Attributes:
        steps: Calls timed in each process.
    """

    steps: int = 10

    at_least: ClassVar[dict[str, int]] = {**BaseJob.at_least, "steps": 1}

    def check_arm(self, arm: str) -> None:
        """As in `BaseJob`; `graphs` is no backend, and needs a GPU."""
        if arm != GRAPHS:
            super().check_arm(arm)
        elif self.torch_device().type != "cuda":
            raise ValueError("the arm graphs needs an NVIDIA GPU.")


class Subject(Protocol):
    """One arm in its process, ready to be measured."""

    def parts(self, imgsz: int, batch: int) -> dict[str, Callable[[], None]]:
        """What is measured, on random images: name of its GPU time -> call. The last is the whole."""


def one_round(job: BaseJob, imgsz: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm once, each in a process of its own: they get ready side by side, and then measure one at a time.

    A job that measures whole processes has them one after the other instead, and `process_s` of each.

    Yields:
        The arm and its figures, or its `error`; where the process came so far, also its `machine`.
    """
    if job.whole_processes:
        for arm in job.arms:
            begin = time.perf_counter()
            with start(job, imgsz, arm) as process:
                try:
                    answer = answer_of(process, until_ready(process))
                finally:
                    process.kill()
            yield arm, {"process_s": time.perf_counter() - begin, **answer}
        return
    started = [(arm, start(job, imgsz, arm)) for arm in job.arms]
    try:
        said = [until_ready(process) for _, process in started]
        for (arm, process), before in zip(started, said, strict=True):
            yield arm, answer_of(process, before)
    finally:
        for _, process in started:
            process.kill()
            process.wait()


def start(job: BaseJob, imgsz: int, arm: str) -> subprocess.Popen[str]:
    """A process that gets one arm ready."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", type(job).__module__, json.dumps(dataclasses.asdict(job)), str(imgsz), arm]
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )


def answer_of(process: subprocess.Popen[str], before: list[str]) -> dict[str, Any]:
    """Let a process of `start` measure, which wrote `before` until it was ready; its figures or its `error`."""
    lines = before + process.communicate(_GO)[0].splitlines()
    answers = [line for line in lines if line.startswith("{")]
    if not process.returncode and answers:
        return dict(json.loads(answers[-1]))
    last = ([line for line in lines if line.strip()] or ["the process ended without an answer"])[-1]
    return {"error": last.strip()[:200]}


def until_ready(process: subprocess.Popen[str]) -> list[str]:
    """The lines that a process writes until it is ready or ends."""
    lines: list[str] = []
    while line := process.stdout.readline() if process.stdout else "":
        if line.strip() == _READY:
            break
        lines.append(line.rstrip())
    return lines


AnyJob = TypeVar("AnyJob", bound=BaseJob)
CallsJob = TypeVar("CallsJob", bound=TimedJob)


def serve(make_job: Callable[..., CallsJob], make_subject: Callable[[CallsJob, str], Subject]) -> None:
    """One arm in this process, measured call by call, after one on small images."""

    def get_ready(job: CallsJob, arm: str) -> Callable[[int], dict[str, Any]]:
        subject = make_subject(job, arm)
        list(subject.parts(64, 2).values())[-1]()
        return lambda imgsz: _measure_calls(subject, job, imgsz, job.torch_device())

    take_turn(make_job, get_ready)


def take_turn(
    make_job: Callable[..., AnyJob], get_ready: Callable[[AnyJob, str], Callable[[int], dict[str, Any]]]
) -> None:
    """One arm in this process: job, size and arm are the arguments, one line of JSON the answer.

    Args:
        make_job: Makes the job of its fields.
        get_ready: Builds an arm of the job while other processes do so; what it returns measures at a size.
    """
    values = json.loads(sys.argv[1])
    job = make_job(**{**values, "arms": tuple(values["arms"]), "imgsz": tuple(values["imgsz"])})
    device = job.torch_device()
    try:
        measure = get_ready(job, sys.argv[3])
        print(f"\n{_READY}", flush=True)  # on a line of its own, whatever a library left unfinished
        if sys.stdin.readline() != _GO:
            return  # the parent is gone
        answer = measure(int(sys.argv[2]))
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        answer = {"error": f"out of memory ({total:.0f} GiB)"}
    machine = detect(device)
    precision = job.amp if device.type == "cuda" else "fp32"
    answer["machine"] = dataclasses.asdict(machine) | {"text": machine.with_versions, "precision": precision}
    print(f"\n{json.dumps(answer)}")


def _measure_calls(subject: Subject, job: TimedJob, imgsz: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of GPU kernels of each part, None on a CPU; of the whole, wall time, speed and peak memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    parts = subject.parts(imgsz, job.batch)
    whole = list(parts.values())[-1]
    for _ in range(3 if on_gpu else 1):
        whole()
    wall = statistics.median(clock_ms(whole, device) for _ in range(job.steps))
    peak = peak_memory_gib(device)[0]
    kernels = _kernel_ms(list(parts.values())) if on_gpu else [None] * len(parts)
    figures = {"wall_ms": wall, "images_per_second": job.batch / wall * 1e3, "peak_gib": peak}
    return dict(zip(parts, kernels, strict=True)) | figures


def _kernel_ms(parts: list[Callable[[], None]], calls: int = 4) -> list[float]:
    """Mean milliseconds of all GPU kernels of each part; they vary by 1 %, and not with the speed of Python.

    One profile for all, since a profiler takes seconds to start and stop: a pause tells the parts apart.
    """
    torch.cuda.synchronize()
    with kernels_profiled() as profiler:
        for part in parts:
            for _ in range(calls):
                part()
            torch.cuda.synchronize()
            time.sleep(0.5)
    on_gpu = [event.time_range for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    kernels = sorted((span.start, span.end) for span in on_gpu)
    pauses = [after[0] - before[1] for before, after in pairwise(kernels)]
    cuts = sorted(sorted(range(len(pauses)), key=pauses.__getitem__)[len(pauses) - (len(parts) - 1) :])
    bounds = [0, *(cut + 1 for cut in cuts), len(kernels)]
    return [sum(end - start for start, end in kernels[a:b]) / 1e3 / calls for a, b in pairwise(bounds)]
