"""Whether the plugin changes what a training reaches: mAP of stock and ours over seeds; docs/results/accuracy-h200.md.

    python scripts/study_accuracy.py run data.yaml folder [row ...] [epochs=30] [seeds=0,1,2] [arms=stock,auto]
                                     [parallel=6] [memory=72] [workers=2] [batch=16] [device=0] [seconds=550]
    python scripts/study_accuracy.py resume data.yaml folder [row] [epochs=24] [workers=4] [batch=16] [device=0]

run: a row is a model and an image size, as in `yolo12n-640`; without any, those of ROWS. Each run is a fresh process of
Ultralytics' trainer from fresh weights, by its defaults. Arms: `stock` without the plugin, `auto` the plugin as it
ships, which measures and chooses between the other two, `graphs` and `eager`: flash.graphs=on and off. `parallel`
processes run side by side, the longest first and within `memory` GiB by the estimates of ROWS, so that no second of
them is a time to quote. The rows of a run that has ended go to folder/accuracy.csv at once; a run whose rows are there
is not repeated. After `seconds` the runs under way are killed, and none is started for which less time is left than the
quickest of its row took.

resume: one training of stock from start to end, and two that are killed half way, when the checkpoint is saved, and go
on in the other arm from last.pt; the epochs of all three go to folder/resume.csv. Mosaic stays on until the end, so
that no epoch differs from the one before by plan.

`study_accuracy_report.py` has the tables and pictures of both files.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import ultralytics
from study_accuracy_report import COLUMNS, RESUME_COLUMNS, RESUMED, key_of, read, resume_table
from ultralytics import YOLO

from yolo_flash import __version__, patch_model
from yolo_flash.assets import offline
from yolo_flash.bench.rounds import checkout
from yolo_flash.bench.run import EpochClocks
from yolo_flash.bench.train import follow
from yolo_flash.utils.files import Row, as_csv, write_file
from yolo_flash.utils.memory import GIB

ARMS: dict[str, dict[str, str] | None] = {
    "stock": None,
    "auto": {},
    "graphs": {"graphs": "on"},
    "eager": {"graphs": "off"},
}
ROWS: dict[str, Row] = {  # in the order of their length; gib is what a run may reserve on the card
    "yolo12n-1280": {"arms": "stock,auto", "batch": 8, "workers": 3, "gib": 14},
    "yolo12s-640": {"arms": "stock,auto,graphs", "gib": 10},
    "yolo26n-640": {"arms": "stock,auto,graphs", "gib": 7},
    "yolo12n-640": {"gib": 7},
}


# A process ------------------------------------------------------------------------------------------------------------
class Follower(EpochClocks):
    """Keeps a row of every epoch."""

    def __init__(self, job: Row, device: torch.device) -> None:
        super().__init__(device)
        self.rows: list[Row] = []
        self._job = job

    def on_train_epoch_end(self, trainer: Any) -> None:
        super().on_train_epoch_end(trainer)
        if trainer.batch_size != self._job["batch"]:
            raise RuntimeError(f"the batch was halved to {trainer.batch_size}: run fewer processes side by side.")
        self.loss = sum(float(value) for value in trainer.tloss.values())
        on_gpu = self._device.type == "cuda"
        self.reserved = torch.cuda.max_memory_reserved(self._device) / GIB if on_gpu else None

    def on_fit_epoch_end(self, trainer: Any) -> None:
        super().on_fit_epoch_end(trainer)
        if trainer.epoch == trainer.epochs:
            return  # the final evaluation is told as an epoch too
        ends = self.ends[-2:]
        self.rows.append(
            {name: self._job[name] for name in ("model", "imgsz", "batch", "arm", "seed")}
            | {
                "epoch": trainer.epoch + 1,
                "map50_95": float(trainer.metrics["metrics/mAP50-95(B)"]),
                "map50": float(trainer.metrics["metrics/mAP50(B)"]),
                "loss": self.loss,
                "epoch_s": ends[1] - ends[0] if len(ends) == 2 else None,
                "peak_gib": self.peaks[-1],
                "reserved_gib": self.reserved,
            }
        )


def one(job: Row) -> None:
    """Train in this process, and write a row of every epoch to the job's file. The job is `job_of`'s."""
    folder = Path(job["project"], Path(job["file"]).stem)
    if not job["last"]:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    model = YOLO(job["last"] or f"{job['model']}.yaml")
    if (settings := ARMS[job["arm"]]) is not None:
        patch_model(model, **settings)
    device = torch.device("cpu" if job["device"] == "cpu" else f"cuda:{job['device']}")
    follower = Follower(job, device)
    follow(model, follower)

    def killed(trainer: Any) -> None:
        if trainer.epoch + 1 == job["kill_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    model.add_callback("on_model_save", killed)
    given = {name: job[name] for name in ("data", "imgsz", "batch", "epochs", "workers", "device", "seed", "project")}
    given |= {"name": folder.name, "exist_ok": True, "plots": False, "verbose": False, "patience": 0, **job["more"]}
    with offline.without_amp_weights():
        model.train(**({"resume": True} if job["last"] else given))
    lines = folder / "flash.jsonl"
    epochs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    counts = {line["epoch"]: line["graphs"] for line in epochs if line["event"] == "epoch"}
    replayed = {epoch: of.get("replayed", 0) / of["steps"] for epoch, of in counts.items() if of.get("steps")}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shared = {
        "device": machine,
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
        "yolo_flash": __version__,
        "commit": checkout(),
    }
    rows = [row | shared | {"replayed": replayed.get(row["epoch"])} for row in follower.rows]
    write_file(Path(job["file"]), json.dumps(rows).encode())


def job_of(data: str, folder: Path, row: str, arm: str, seed: int, given: dict[str, str]) -> Row:
    """What a process is told."""
    model, imgsz = row.rsplit("-", 1)
    device = given.get("device", "0")
    defaults: Row = {"epochs": 30, "batch": 16, "workers": 2, "gib": 0} | ROWS.get(row, {})
    defaults.pop("arms", None)
    return {
        "model": model,
        "imgsz": int(imgsz),
        "arm": arm,
        "seed": seed,
        "data": data,
        **{name: int(given.get(name, default)) for name, default in defaults.items()},
        "device": device,
        "project": str(folder.resolve() / "runs"),
        "file": str(folder.resolve() / f"{row}-{arm}-{seed}.json"),
        "last": "",  # a checkpoint to resume from
        "kill_after": 0,
        "more": {"save": False},  # more arguments of `train`
    }


def start(job: Row) -> subprocess.Popen[bytes]:
    log = Path(job["file"]).with_suffix(".txt")
    with log.open("ab") as said:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        command = [sys.executable, __file__, "one", json.dumps(job)]
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def last_lines(job: Row, count: int = 3) -> str:
    text = Path(job["file"]).with_suffix(".txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])[-600:]


# The queue ------------------------------------------------------------------------------------------------------------
def jobs_left(jobs: list[Row], rows: list[Row]) -> list[Row]:
    """The jobs whose last epoch is not the last in the rows."""
    done: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        done[key_of(row)] = max(done[key_of(row)], row["epoch"])
    return [job for job in jobs if done[key_of(job)] != job["epochs"]]


def run(data: str, folder: Path, rows: list[str], given: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, begin = folder / "accuracy.csv", time.perf_counter()
    seconds, parallel = float(given.get("seconds", "inf")), int(given.get("parallel", "6"))
    memory = float(given.get("memory", "72"))
    seeds = [int(seed) for seed in given.get("seeds", "0,1,2").split(",")]
    jobs = [
        job_of(data, folder, row, arm, seed, given)
        for row in sorted(rows or ROWS, key=lambda row: list(ROWS).index(row) if row in ROWS else -1)
        for seed in seeds  # a cut leaves whole comparisons
        for arm in given.get("arms", ROWS.get(row, {}).get("arms", ",".join(ARMS))).split(",")
    ]
    waiting = jobs_left(jobs, read(file))
    print(f"{len(waiting)} of {len(jobs)} runs to go, {parallel} side by side", flush=True)
    running: list[tuple[Row, subprocess.Popen[bytes], float]] = []
    took: dict[tuple[Any, ...], float] = {}
    try:
        while waiting or running:
            now = time.perf_counter() - begin
            waiting = [job for job in waiting if now + took.get(key_of(job)[:2], 0.0) < seconds]
            while len(running) < parallel:
                free = memory - sum(job["gib"] for job, *_ in running)
                job = next((job for job in waiting if job["gib"] <= free or not running), None)
                if job is None:
                    break
                waiting.remove(job)
                running.append((job, start(job), now))
            for job, process, since in list(running):
                over = now >= seconds and process.poll() is None
                if over:
                    kill(process)
                elif process.poll() is None:
                    continue
                running.remove((job, process, since))
                text = f"killed, since {seconds:.0f} s are over" if over else ended(job, process, file, now - since)
                if text.startswith("mAP"):
                    took[key_of(job)[:2]] = min(now - since, took.get(key_of(job)[:2], now))
                print(f"{now:4.0f} s: {'-'.join(map(str, key_of(job)))}, {now - since:.0f} s: {text}", flush=True)
            time.sleep(0.2)
    finally:
        for _, process, _ in running:
            kill(process)
    done = len(jobs) - len(jobs_left(jobs, read(file)))
    print(f"{done} of {len(jobs)} runs are in {file}" + (": call it again" if done < len(jobs) else ""), flush=True)


def ended(job: Row, process: subprocess.Popen[bytes], file: Path, seconds: float) -> str:
    """Take the rows of a process that has ended into the file; what it reached, or why it failed."""
    if process.wait():
        return f"failed: {last_lines(job)}"
    found = json.loads(Path(job["file"]).read_text(encoding="utf-8"))
    others = [row for row in read(file) if key_of(row) != key_of(job)]
    write_file(file, as_csv(COLUMNS, [*others, *(row | {"process_s": seconds} for row in found)]))
    last, best = found[-1], max(row["map50_95"] for row in found)
    memory = f"{last['peak_gib']:.2f} GiB"
    return f"mAP50-95 {last['map50_95']:.4f}, best {best:.4f}, peak {memory}, replayed {last['replayed']}"


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and the workers of its loader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Resume ---------------------------------------------------------------------------------------------------------------
def resume(data: str, folder: Path, rows: list[str], given: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begin, given = time.perf_counter(), {"epochs": "24", "workers": "4"} | given
    half = int(given["epochs"]) // 2
    jobs: dict[str, Row] = {}
    for name, arms in RESUMED.items():
        job = job_of(data, folder, rows[0] if rows else "yolo12n-640", arms[0], 0, given)
        file = folder.resolve() / f"resume-{'-'.join(arms)}.json"
        jobs[name] = job | {"file": str(file), "more": {"close_mosaic": 0}, "kill_after": half if len(arms) > 1 else 0}
    started = {name: start(job) for name, job in jobs.items()}
    for name, (_, *other) in RESUMED.items():
        if other:
            print(f"{name}: killed ({started[name].wait()}) at {time.perf_counter() - begin:.0f} s", flush=True)
            last = Path(jobs[name]["project"], Path(jobs[name]["file"]).stem, "weights", "last.pt")
            started[name] = start(jobs[name] | {"arm": other[0], "last": str(last), "kill_after": 0})
    found: list[Row] = []
    for name, job in jobs.items():
        code = started[name].wait()
        why = f": {last_lines(job)}" if code else ""
        print(f"{name}: exit {code} at {time.perf_counter() - begin:.0f} s{why}", flush=True)
        if not code:
            found += resumed_rows(name, job, half)
    write_file(folder / "resume.csv", as_csv(RESUME_COLUMNS, found))
    print(resume_table(found))


def resumed_rows(name: str, job: Row, half: int) -> list[Row]:
    """A row of every epoch of a run of `resume`, of both its arms, from the results.csv that they wrote."""
    told = json.loads(Path(job["file"]).read_text(encoding="utf-8"))[-1]
    shared = {key: told[key] for key in RESUME_COLUMNS if key in told} | {"run": name}
    lines = Path(job["project"], Path(job["file"]).stem, "results.csv").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in csv.DictReader(lines):
        losses = {
            part: sum(float(value) for key, value in line.items() if key.startswith(part) and key.endswith("loss"))
            for part in ("train/", "val/")
        }
        epoch = int(line["epoch"])
        values = {"map50_95": float(line["metrics/mAP50-95(B)"]), "loss": losses["train/"], "val_loss": losses["val/"]}
        rows.append(shared | {"arm": RESUMED[name][0 if epoch <= half else -1], "epoch": epoch} | values)
    return rows


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that `timeout` ends the runs, too
    what, *words = sys.argv[1:] or [""]
    if what == "one" and len(words) == 1:
        one(json.loads(words[0]))
    elif what in ("run", "resume") and len(words) >= 2:
        data, folder, *others = words
        given = dict(word.split("=", 1) for word in others if "=" in word)
        (run if what == "run" else resume)(data, Path(folder), [word for word in others if "=" not in word], given)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
