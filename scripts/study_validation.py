"""Where the milliseconds of a validation batch go, in Ultralytics' own validators: stock, eager and from CUDA graphs.

    python scripts/study_validation.py data.yaml model imgsz batch [arm ...]     arms: unpatched, eager, graphs, auto

Three validations: that of a training (the EMA, autocast, losses; twice as many images as `batch`), and `val` by itself
in float32 and in float16. Each runs over the loader's first batches again and again, from memory: the first passes
warm up and capture, the others are measured. Every phase is timed by Ultralytics' own profiles, which wait for the GPU;
`metrics` is what follows the postprocess, and `batch` the time from one batch's start to its end. Of every measured
pass the median over its batches of full size counts; the tables have the median over all passes of an arm, and the
lowest and highest. Fresh processes, in two rounds in which the arms take turns. Give a trained checkpoint: what fresh
weights detect is not what NMS and metrics have to do in a real validation; the tables name the detections of an image.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import ultralytics.engine.validator as validator_module
from ultralytics.utils.ops import Profile

from yolo_flash import patch_model
from yolo_flash.assets import offline
from yolo_flash.assets.models import open_model
from yolo_flash.bench.process import until_ready
from yolo_flash.bench.train import PLUGIN, InMemory, follow

PHASES = ("preprocess", "inference", "loss", "postprocess")  # in the order in which the validator makes its profiles
WARM_UP, MEASURED, ROUNDS = 3, 5, 2
ARMS = ("unpatched", "eager", "graphs", "auto")


class DoneError(Exception):
    """Ends a training whose validation is measured."""


class Passes(InMemory):
    """The first batches of a loader, as often as there are passes."""

    def __len__(self) -> int:
        return len(self._batches) * (WARM_UP + MEASURED)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(WARM_UP + MEASURED):
            yield from super().__iter__()


class Recorded(Profile):
    """Ultralytics' profile, which keeps every time."""

    made: list[Recorded] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[float] = []
        Recorded.made.append(self)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.times.append(self.dt * 1e3)


class Follower:
    """Follows the validations of a model by its callbacks."""

    def on_val_start(self, validator: Any) -> None:
        validator.dataloader = Passes(validator.dataloader)
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.images: list[int] = []
        Recorded.made = []

    def on_val_batch_start(self, validator: Any) -> None:
        self.starts.append(time.perf_counter() * 1e3)

    def on_val_batch_end(self, validator: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() * 1e3)
        self.images.append(validator.seen - sum(self.images))
        self.detections = sum(map(len, validator.metrics.stats["conf"])) / validator.seen

    def on_val_end(self, validator: Any) -> None:
        times = {name: profile.times for name, profile in zip(PHASES, Recorded.made, strict=True)}
        times["batch"] = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        named = [times[name] for name in PHASES]
        times["metrics"] = [whole - sum(parts) for whole, *parts in zip(times["batch"], *named, strict=True)]
        count = len(self.images) // (WARM_UP + MEASURED)
        full = [i for i in range(count) if self.images[i] == max(self.images)]
        self.facts = {
            "images": max(self.images),
            "batches": count,
            "detections": round(self.detections, 1),
            "shapes": len({tuple(batch["img"].shape) for batch in validator.dataloader._batches}),
            "results": {name: round(float(value), 6) for name, value in validator.metrics.results_dict.items()},
            "passes": {
                name: [
                    statistics.median(values[number * count + i] for i in full)
                    for number in range(WARM_UP, WARM_UP + MEASURED)
                ]
                for name, values in times.items()
            },
        }


def say(section: str, facts: dict[str, Any]) -> None:
    """One line of JSON for the parent."""
    print("\n" + json.dumps({"section": section, **facts}), flush=True)


def one_arm(data: str, config: str, imgsz: int, batch: int, arm: str) -> None:
    """Get ready, wait for the turn, and validate."""
    validator_module.Profile = Recorded  # type: ignore[misc,attr-defined]
    on_gpu = torch.cuda.is_available()
    torch.zeros(1, device="cuda" if on_gpu else "cpu")  # loads CUDA
    common: dict[str, Any] = {
        "data": data,
        "imgsz": imgsz,
        "batch": batch,
        "device": 0 if on_gpu else "cpu",
        "plots": False,
        "verbose": False,
        "workers": 4,
    }
    print("ready", flush=True)
    sys.stdin.readline()
    model, follower = prepared(config, arm)

    def shorten(trainer: Any) -> None:
        trainer.train_loader = InMemory(trainer.train_loader)

    def end(trainer: Any) -> None:
        run = getattr(trainer, "flash_run", None)
        say("training", follower.facts | {"flash": {} if run is None else run.validation.facts})
        raise DoneError

    model.add_callback("on_train_start", shorten)
    model.add_callback("on_fit_epoch_end", end)
    still: dict[str, Any] = {"optimizer": "SGD", "lr0": 1e-9, "warmup_epochs": 0.0, "mosaic": 0.0}  # detects as before
    with tempfile.TemporaryDirectory() as folder, offline.without_amp_weights():
        try:
            model.train(**common, **still, epochs=2, project=folder, save=False)
        except DoneError:
            model.trainer.run_callbacks("teardown")
        for section, quantize in (("val, float32", None), ("val, float16", 16)):
            model, follower = prepared(config, arm)
            model.val(**common, quantize=quantize, project=folder)
            say(section, follower.facts)


def prepared(config: str, arm: str) -> tuple[Any, Follower]:
    """The model of an arm, with the same weights in all of them."""
    torch.manual_seed(0)
    model, follower = open_model(config), Follower()
    if arm != "unpatched":
        patch_model(model, **PLUGIN[arm])
    follow(model, follower)
    return model, follower


def table(section: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Median, lowest and highest over the passes of all rounds."""
    arms = {arm: facts for arm, facts in found.items() if facts}
    first = next(iter(arms.values()))[0]
    lines = [
        f"{section}: {first['images']} images a batch, {first['batches']} batches of {first['shapes']} shapes, "
        f"{first['detections']} detections an image",
        "",
        f"| milliseconds | {' | '.join(arms)} |",
        f"| --- |{' --- |' * len(arms)}",
    ]
    medians: dict[str, dict[str, float]] = defaultdict(dict)
    for phase in ("batch", *PHASES, "metrics"):
        cells = []
        for arm, facts in arms.items():
            values = [value for one in facts for value in one["passes"][phase]]
            medians[phase][arm] = statistics.median(values)
            cells.append(f"{medians[phase][arm]:.1f} ({min(values):.1f}..{max(values):.1f})")
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    for phase in ("batch", "inference"):
        base = next(iter(medians[phase].values()))
        gains = " | ".join(f"{base / value:.2f}x" for value in medians[phase].values())
        lines.append(f"| {phase}, speed-up | {gains} |")
    for arm, facts in arms.items():
        lines.append(f"{arm}: {facts[0].get('flash') or ''} {facts[0]['results']}")
    return "\n".join(lines)


def main() -> None:
    data, config, imgsz, batch, *arms = sys.argv[1:]
    if arms[-1:] == ["only"]:
        one_arm(data, config, int(imgsz), int(batch), arms[0])
        return
    arms = arms or list(ARMS)
    print(f"{config} on {data}, imgsz={imgsz}, batch={batch}\n", flush=True)
    sections: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: {arm: [] for arm in arms})
    for number in range(1, ROUNDS + 1):
        pipe, started = subprocess.PIPE, []
        for arm in arms:
            command = [sys.executable, __file__, data, config, imgsz, batch, arm, "only"]
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            started.append((arm, process))
        for _, process in started:
            until_ready(process)
        for arm, process in started:
            text, _ = process.communicate("go\n")
            answers = [json.loads(line) for line in text.splitlines() if line.startswith('{"section"')]
            told = [line for line in text.splitlines() if "CUDA graphs" in line]
            print(f"round {number}, {arm}: {len(answers)} validations", *told, sep="\n  ", flush=True)
            if len(answers) < 3:
                print(text[-2000:], flush=True)
            for facts in answers:
                section = facts.pop("section")
                sections[section][arm].append(facts)
                passes = {phase: round(statistics.median(values), 2) for phase, values in facts["passes"].items()}
                print(f"  {section}: {passes}", flush=True)
    for section, found in sections.items():
        print("\n" + table(section, found), flush=True)


if __name__ == "__main__":
    main()
