"""Where the milliseconds of a training step go, in Ultralytics' real trainer: stock, eager and from CUDA graphs.

    python scripts/study_clock.py data.yaml model.yaml imgsz batch [arm ...]

Arms: unpatched, eager, graphs; outside: graphs of a task whose loss is not in them, which is timed; and stock-step:
graphs with the optimizer step of Ultralytics. Each may have `:MuSGD`, or another optimizer, behind it; else the
optimizer is Ultralytics' choice. There is no warm-up, whose momentum changes in every step.

Each phase is timed by the host's clock, without waiting for the GPU: GPU time counts in the phase that waits. Medians
over the steps of three epochs but the first step of each, in one process for each arm; the batches are the loader's
first ones, from memory, and every step has an optimizer step. With graphs, nothing of Ultralytics' is replaced, since
graphs refuse what is a user's: network, loss and backward are one phase, and optimizer, EMA and rest another. Of
RT-DETR, drawing noisy labels and matching have phases of their own. Then some steps run under torch's profiler: how
long the GPU was busy, and how often the host waited for the GPU.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from ultralytics.models.utils import ops

from yolo_flash import patch_model
from yolo_flash.assets.models import open_model
from yolo_flash.bench.process import until_ready
from yolo_flash.bench.train import InMemory, follow
from yolo_flash.utils.profiler import events_of

WITHIN = {"noisy labels": "network", "matching": "loss"}  # phase of RT-DETR -> the phase in which it lies
PHASES = ("to device", "network", *WITHIN, "loss", "backward", "optimizer and EMA", "rest")
WARM_UP, EPOCHS = 2, 7


class Clock:
    """Follows a run and keeps the milliseconds of every phase of every step."""

    def __init__(self, arm: str) -> None:
        self.graphs = arm in ("graphs", "outside", "stock-step")
        self.loss_alone = arm in ("unpatched", "eager", "outside")
        self.steps: defaultdict[str, list[float]] = defaultdict(list)
        self.now: dict[str, float] = {}
        self.epoch = -1
        self.begun = self.start = 0.0
        self.profile: profile | None = None
        self.profiled = 0
        self.gpu: dict[str, float] = {}

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.now[phase] = self.now.get(phase, 0.0) + (time.perf_counter() - start) * 1e3

        return run

    def on_train_start(self, trainer: Any) -> None:
        if self.graphs:
            policy = trainer.flash_run.graphs
            policy.before_forward = self.until("to device", policy.before_forward)
            policy.before_optimizer = self.until("network", policy.before_optimizer, before=True)
            return
        ops.get_cdn_group = self.timed("noisy labels", ops.get_cdn_group)  # which the decoder imports in every call
        trainer.preprocess_batch = self.until("to device", trainer.preprocess_batch)
        trainer.optimizer_step = self.timed("optimizer and EMA", trainer.optimizer_step)
        scale = trainer.scaler.scale

        def scaled(loss: torch.Tensor) -> Any:
            self.now["network"] = (time.perf_counter() - self.begun) * 1e3 - self.now.get("loss", 0.0)
            result = scale(loss)
            result.backward = self.timed("backward", result.backward)
            return result

        trainer.scaler.scale = scaled

    def until(self, phase: str, call: Callable[..., Any], before: bool = False) -> Callable[..., Any]:
        """A phase from the end of the last one to the end of a call, or to its beginning."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = None if before else call(*args, **kwargs)
            now = time.perf_counter()
            self.now[phase], self.begun = (now - self.begun) * 1e3 - self.now.get("loss", 0.0), now
            return call(*args, **kwargs) if before else result

        return run

    def on_train_epoch_start(self, trainer: Any) -> None:
        if trainer.epoch == WARM_UP:
            trainer.train_loader = InMemory(trainer.train_loader)

    def on_train_batch_start(self, trainer: Any) -> None:
        criterion = getattr(trainer.model, "criterion", None)
        if self.loss_alone and criterion is not None and not hasattr(criterion, "timed"):
            if isinstance(criterion, nn.Module):  # of RT-DETR
                criterion.forward = self.timed("loss", criterion.forward)
                criterion.matcher.forward = self.timed("matching", criterion.matcher.forward)
                criterion.timed = True
            else:
                trainer.model.criterion = self.timed("loss", criterion)
                trainer.model.criterion.timed = True
                if hasattr(criterion, "update"):
                    trainer.model.criterion.update = criterion.update
        self.now = {}
        self.start = self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any) -> None:
        now, end = self.now, time.perf_counter()
        total = (end - self.start) * 1e3
        if self.graphs:
            now["optimizer and EMA"] = (end - self.begun) * 1e3
        for inner, outer in WITHIN.items():
            now[outer] = now.get(outer, 0.0) - now.get(inner, 0.0)
        now["rest"] = total - sum(now.values())
        first, self.epoch = trainer.epoch != self.epoch, trainer.epoch
        if WARM_UP <= trainer.epoch < EPOCHS - 2 and not first:
            for phase in PHASES:
                self.steps[phase].append(now.get(phase, 0.0))
            self.steps["step"].append(total)
        if trainer.epoch >= EPOCHS - 2 and torch.cuda.is_available():
            self.count(last=trainer.epoch == EPOCHS - 1)

    def count(self, last: bool) -> None:
        """The steps of the last epoch but one, under the profiler."""
        if self.profile is None and not self.gpu:
            self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profile.start()
        elif self.profile is not None:
            self.profiled += not last
            if not last:
                return
            self.profile.stop()
            waits: Counter[str] = Counter()
            busy = 0.0
            for event in events_of(self.profile):
                if event.device_type() == DeviceType.CUDA:
                    busy += event.duration_ns() / 1e6
                elif event.name() in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
                    waits["waits of the host"] += 1
                elif event.name().startswith(("cudaLaunchKernel", "cuLaunchKernel")):
                    waits["kernels launched by the host"] += 1
            steps = self.profiled + 1
            self.gpu = {"GPU busy, ms": busy / steps} | {name: n / steps for name, n in waits.items()}
            self.profile = None


def one_arm(data: str, config: str, imgsz: int, batch: int, arm: str) -> dict[str, float]:
    """Get ready, wait for the turn, and train."""
    arm, _, optimizer = arm.partition(":")
    clock, model = Clock(arm), open_model(config)
    if arm != "unpatched":
        model = patch_model(model, graphs="on" if clock.graphs else "off")
    if arm == "stock-step":
        model.add_callback("on_train_start", lambda trainer: setattr(trainer.flash_run.optimizer, "_mode", "off"))
    follow(model, clock)
    device = 0 if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device="cuda" if device == 0 else "cpu")  # loads CUDA
    print("ready", flush=True)
    sys.stdin.readline()
    with tempfile.TemporaryDirectory() as folder:
        model.train(
            data=data, imgsz=imgsz, batch=batch, nbs=batch, epochs=EPOCHS, cache="ram", project=folder, plots=False,
            val=False, save=False, pretrained=False, close_mosaic=0, device=device, verbose=False, warmup_epochs=0.0,
            optimizer=optimizer or "auto",
        )  # fmt: skip
    direct = {} if arm == "unpatched" else {"direct optimizer steps": float(model.trainer.flash_run.optimizer.direct)}
    return {name: statistics.median(values) for name, values in clock.steps.items()} | clock.gpu | direct


def main() -> None:
    data, config, imgsz, batch, *arms = sys.argv[1:]
    if arms[-1:] == ["only"]:
        print("\n" + json.dumps(one_arm(data, config, int(imgsz), int(batch), arms[0])))
        return
    arms = arms or ["unpatched", "eager", "graphs"]
    pipe, found = subprocess.PIPE, {}
    commands = [[sys.executable, __file__, data, config, imgsz, batch, arm, "only"] for arm in arms]
    started = [subprocess.Popen(c, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) for c in commands]
    told = [until_ready(process) for process in started]
    for arm, process, before in zip(arms, started, told, strict=True):
        text, _ = process.communicate("go\n")
        lines = [line for line in text.splitlines() if line.startswith('{"')]
        if not lines:
            sys.exit("\n".join([f"{arm}:", *before, text[-2000:]]))
        found[arm] = json.loads(lines[-1])
        print(arm, lines[-1], flush=True)
    print(f"\n{config} imgsz={imgsz} batch={batch}\n")
    print(f"| milliseconds of the host | {' | '.join(arms)} |\n| --- |{' --- |' * len(arms)}")
    for name in dict.fromkeys(name for values in found.values() for name in ("step", *values)):
        print(f"| {name} | {' | '.join(f'{found[arm].get(name, 0.0):.1f}' for arm in arms)} |")


if __name__ == "__main__":
    main()
