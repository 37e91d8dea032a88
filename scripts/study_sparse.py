"""What sparse_window gains and costs: speed and memory on large images, and mAP; docs/results/sparse-h100.md.

    python scripts/study_sparse.py speed rows.jsonl [device=0] [sizes=2048,4096,8192] [windows=17,33,65] [train=4096]
    python scripts/study_sparse.py accuracy rows.jsonl data=bccd/data.yaml [epochs=30] [imgsz=640] [batch=16]
                                   [windows=5,9,17,33] [trained=exact,9,17] [device=0] [workers=4]

speed: the area attention layers of yolo12n alone (model.6 with 4 areas, model.8 with 1; convolutions included), and the
whole network, in training (forward, loss and backward under float16 autocast, channels_last; batch 1, sizes up to
`train`) and in prediction (float16, batch 1). Milliseconds are medians of calls between CUDA events, with the lowest
and the highest; peak is what a call allocates above what was there before. On a CPU in float32, for a dry run.

accuracy: yolo12n from scratch, once with exact attention and once for each window in `trained`, side by side in
processes of their own, so that nothing of it is a time; then best.pt of each is evaluated with exact attention and with
every window. Rows are lines of JSON, printed and written as they come, with a table in the end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.block import AAttn

from yolo_flash import patch_model
from yolo_flash.backends.registry import label
from yolo_flash.config import FlashConfig
from yolo_flash.machine import detect
from yolo_flash.patching.patch import patch_modules
from yolo_flash.utils.memory import extra_bytes
from yolo_flash.utils.timing import clock_ms, events_ms, wait

LAYERS = {"model.6, 4 areas": (64, 2, 4, 16), "model.8": (128, 4, 1, 32)}  # channels, heads, areas, stride of yolo12n
EXACT = "exact"


def write(file: str, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with Path(file).open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


def settings_of(arm: str) -> dict[str, Any]:
    """An arm is `exact`, which is auto by its rules, or the window."""
    if arm == EXACT:
        return {"autotune": False}
    return {"backend": "sparse_window", "window": int(arm)}


# Speed ----------------------------------------------------------------------------------------------------------------
def measured(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Median, lowest and highest milliseconds of a call, the MiB that it allocates, and the seconds of the first."""
    start = time.perf_counter()
    call()
    wait(device)
    first = time.perf_counter() - start
    extra = extra_bytes(call, device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - begin < 0.6):
        times.append(events_ms(call) if device.type == "cuda" else clock_ms(call, device))
    peak = None if extra is None else extra / 2**20
    found = {"ms": statistics.median(times), "low": min(times), "high": max(times), "peak_mib": peak}
    return {name: None if value is None else round(value, 3) for name, value in found.items()} | {
        "calls": len(times),
        "first_seconds": round(first, 2),
    }


def layer_call(kind: str, imgsz: int, training: bool, arm: str, device: torch.device) -> Callable[[], object]:
    channels, heads, area, stride = LAYERS[kind]
    block = AAttn(channels, heads, area).to(device)
    patch_modules(block, FlashConfig(**settings_of(arm)))
    side = imgsz // stride
    if training:
        block = block.train().to(memory_format=torch.channels_last)
        x = torch.randn(1, channels, side, side, device=device).to(memory_format=torch.channels_last).requires_grad_()

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
                out = block(x)
            out.float().sum().backward()
            block.zero_grad(set_to_none=True)
            x.grad = None

        return step
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    block, image = block.eval().to(dtype), torch.randn(1, channels, side, side, device=device, dtype=dtype)
    return lambda: inferred(block, image)


@torch.inference_mode()
def inferred(network: Any, images: torch.Tensor) -> object:
    return network(images)


def network_call(imgsz: int, training: bool, arm: str, device: torch.device) -> Callable[[], object]:
    model: Any = YOLO("yolo12n.yaml").model
    model.args = get_cfg()
    for parameter in model.parameters():
        parameter.requires_grad_(training)
    if not training:
        model = model.fuse(verbose=False)
    model = model.to(device)
    patch_modules(model, FlashConfig(**settings_of(arm)))
    if not training:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model, images = model.eval().to(dtype), torch.rand(1, 3, imgsz, imgsz, device=device, dtype=dtype)
        return lambda: inferred(model, images)
    model = model.train().to(memory_format=torch.channels_last)
    images = torch.rand(1, 3, imgsz, imgsz, device=device).to(memory_format=torch.channels_last)
    batch = {
        "img": images,
        "batch_idx": torch.zeros(8, device=device),
        "cls": torch.zeros(8, 1, device=device),
        "bboxes": torch.full((8, 4), 0.3, device=device),
    }

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
            loss, _ = model(batch)
        loss.sum().backward()
        model.zero_grad(set_to_none=True)

    return step


def speed(file: str, given: dict[str, str]) -> None:
    name = given.get("device", "0")
    device = torch.device("cpu" if name == "cpu" else f"cuda:{name}")
    sizes = [int(size) for size in given.get("sizes", "2048,4096,8192").split(",")]
    arms = [EXACT, *given.get("windows", "17,33,65").split(",")]
    largest = int(given.get("train", "4096"))
    print(detect(device).with_versions, flush=True)
    rows = []
    for what in ("yolo12n", *LAYERS):
        for imgsz in sizes:
            for mode in ("train", "predict"):
                if mode == "train" and imgsz > largest:
                    continue
                for arm in arms:
                    row = {"what": what, "imgsz": imgsz, "mode": mode, "arm": arm}
                    try:
                        make = network_call if what == "yolo12n" else lambda *rest, kind=what: layer_call(kind, *rest)
                        row |= measured(make(imgsz, mode == "train", arm, device), device)
                    except Exception as error:  # out of memory, or what FlexAttention refuses: the others go on
                        row["error"] = f"{type(error).__name__}: {error}"[:300]
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    write(file, row)
                    rows.append(row)
    print(speed_table(rows, arms))


def speed_table(rows: list[dict[str, Any]], arms: list[str]) -> str:
    heads = [EXACT, *(f"{label('sparse_window')} {arm}" for arm in arms[1:])]
    lines = [f"| what | pixels | mode | {' | '.join(heads)} |", "| --- " * (3 + len(heads)) + "|"]
    for key in dict.fromkeys((row["what"], row["imgsz"], row["mode"]) for row in rows):
        mine = {row["arm"]: row for row in rows if (row["what"], row["imgsz"], row["mode"]) == key}
        exact = mine[EXACT].get("ms")
        cells = []
        for arm in arms:
            row = mine[arm]
            if "error" in row:
                cells.append(row["error"].split(":")[0])
                continue
            gain = f", {exact / row['ms']:.2f}x" if exact and arm != EXACT else ""
            peak = "" if row["peak_mib"] is None else f", {row['peak_mib']:.0f} MiB"
            cells.append(f"{row['ms']:.2f} ms{gain}{peak}")
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Accuracy -------------------------------------------------------------------------------------------------------------
def accuracy(file: str, given: dict[str, str]) -> None:
    trained = given.get("trained", "exact,9,17").split(",")
    words = [f"{key}={value}" for key, value in given.items() if key != "trained"]
    start = time.perf_counter()
    started = [subprocess.Popen([sys.executable, __file__, "train", file, *words, f"arm={arm}"]) for arm in trained]
    for arm, process in zip(trained, started, strict=True):
        print(f"trained {arm}: exit {process.wait()} after {time.perf_counter() - start:.0f} s", flush=True)
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "map" in row]
    evaluated = list(dict.fromkeys(row["evaluated"] for row in rows))
    print("mAP50-95 (mAP50) of best.pt; numbers are windows of sparse_window (approximate), in tokens")
    print("| trained with | " + " | ".join(f"evaluated with {arm}" for arm in evaluated) + " |")
    print("| --- " * (1 + len(evaluated)) + "|")
    for arm in dict.fromkeys(row["trained"] for row in rows):
        found = {row["evaluated"]: row for row in rows if row["trained"] == arm}
        cells = [f"{found[e]['map']:.4f} ({found[e]['map50']:.4f})" if e in found else "-" for e in evaluated]
        print(f"| {arm} | {' | '.join(cells)} |")


def train(file: str, given: dict[str, str]) -> None:
    """Train one arm, and evaluate it with all."""
    arm, device = given["arm"], given.get("device", "0")
    run: dict[str, Any] = {
        "data": given["data"],
        "imgsz": int(given.get("imgsz", "640")),
        "batch": int(given.get("batch", "16")),
        "workers": int(given.get("workers", "4")),
        "device": "cpu" if device == "cpu" else int(device),
        "plots": False,
        "verbose": False,
        "project": str(Path(file).resolve().parent / "sparse-runs"),
        "exist_ok": True,
    }
    model: Any = patch_model(YOLO("yolo12n.yaml"), **settings_of(arm))
    start = time.perf_counter()
    model.train(**run, name=arm, epochs=int(given.get("epochs", "30")), seed=0)
    seconds, best = time.perf_counter() - start, str(model.trainer.best)
    for other in (EXACT, *given.get("windows", "5,9,17,33").split(",")):
        metrics = patch_model(YOLO(best), **settings_of(other)).val(**run, name=f"{arm}-{other}")
        facts = {"trained": arm, "evaluated": other, "map": float(metrics.box.map), "map50": float(metrics.box.map50)}
        write(file, facts | {"train_seconds": round(seconds, 1)})


def main() -> None:
    parts = {"speed": speed, "accuracy": accuracy, "train": train}
    if len(sys.argv) < 3 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    parts[sys.argv[1]](sys.argv[2], dict(arg.split("=", 1) for arg in sys.argv[3:]))


if __name__ == "__main__":
    main()
