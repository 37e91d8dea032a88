"""Is the planned backend the fastest? The plan of every distinct layer, and the same layers measured again afterwards.

    python scripts/study_regret.py [cpu|cuda] [imgsz ...]

Layers of YOLO12, YOLO26 and YOLO11, n to x, at several image sizes, in training (deterministic and not) and
in prediction. The plan is made as a run makes it, with an empty cache; another process then measures every backend
again, with three times the samples. Regret is the excess time of the planned backend there over the fastest one.
Sizes are printed one after the other, so that a run that is cut off leaves its rows.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from yolo_flash import AttentionSpec
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import select
from yolo_flash.kernels import operators
from yolo_flash.machine import detect
from yolo_flash.planning import autotune

LAYERS = [("area 4", heads) for heads in (2, 4, 8, 12)] + [("area 1", heads) for heads in (4, 8, 12)]
LAYERS += [("PSA", heads) for heads in (2, 4, 6)]
BATCHES = {224: 16, 320: 16, 640: 16, 1280: 4, 2048: 2}


def specs(device: str, sizes: list[int]) -> list[AttentionSpec]:
    on_gpu = device == "cuda"
    half, single = torch.float16, torch.float32
    found = []
    for imgsz in sizes:
        pixels = (imgsz // 32) ** 2  # of P5; YOLO12 has area 4 at P4, where there are four times as many
        for kind, heads in LAYERS:
            tokens, cut, dim_v = pixels, 4 if kind == "area 4" else 1, 64 if kind == "PSA" else 32
            common: dict[str, Any] = {"num_heads": heads, "seq_len_q": tokens, "seq_len_k": tokens, "head_dim": 32}
            common |= {"head_dim_v": dim_v, "area": cut}
            batch = cut * (BATCHES[imgsz] if on_gpu else 2)
            if on_gpu:
                for strict in (False, True):
                    found.append(AttentionSpec(batch, dtype=half, layout="nhwc", deterministic=strict, **common))
                for dtype in (half, single):
                    found.append(AttentionSpec(cut, dtype=dtype, layout="nchw", training=False, **common))
            else:
                found.append(AttentionSpec(batch, dtype=single, layout="nchw", **common))
                for layout in ("nchw", "nhwc"):
                    found.append(AttentionSpec(cut, dtype=single, layout=layout, training=False, **common))  # type: ignore[arg-type]
    return found


def compile_one(job: tuple[int, int]) -> None:
    tokens, dim_v = job
    packed = torch.randn(1, tokens, 1, 64 + dim_v, device="cuda", dtype=torch.float16, requires_grad=True)
    operators.call("area_attention", packed, 32)


def again(device: str) -> None:
    """In the other process: for each size on standard input milliseconds of every backend, a line for each spec."""
    where = torch.device(device)
    for size in sys.stdin:
        for spec in specs(device, [int(size)]):
            trials = autotune.judge(spec, where, autotune.candidates(spec, detect(where)), repeats=15)
            print(json.dumps({name: trial.ms for name, trial in trials.items() if trial.ms is not None}), flush=True)
        torch.cuda.empty_cache()


def ask(other: subprocess.Popen[str], size: int, count: int) -> Iterator[dict[str, float]]:
    """The milliseconds that the other process measures for a size, spec by spec."""
    assert other.stdin is not None
    assert other.stdout is not None
    print(size, file=other.stdin, flush=True)
    lines = (line for line in other.stdout if line.startswith("{"))
    yield from map(json.loads, itertools.islice(lines, count))


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    if sys.argv[-1] == "again":
        again(device)
        return
    sizes = [int(word) for word in sys.argv[2:]] or ([320, 640, 1280, 2048] if device == "cuda" else [224, 320, 640])
    where = torch.device(device)
    machine = detect(where)
    if device == "cuda":  # Triton's compiler, once, side by side: what is timed below is the measuring
        jobs = sorted({(spec.seq_len_k, spec.head_dim_v) for spec in specs(device, sizes)})
        with ProcessPoolExecutor(8, get_context("spawn")) as pool:
            list(pool.map(compile_one, jobs))
    print(machine.with_versions)
    regrets: list[float] = []
    command, pipe = [sys.executable, __file__, device, "again"], subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other,
        tempfile.TemporaryDirectory() as folder,
    ):
        trial_cache.USER_CONFIG_DIR = Path(folder)
        for size in sizes:
            wanted = specs(device, [size])
            start = time.perf_counter()
            trials = autotune.measure(wanted, where)
            print(f"\n{size} pixels: {len(wanted)} layers planned in {time.perf_counter() - start:.1f} s\n")
            print("| layer | deterministic | planned | ms | best | ms | regret | stock ms | speed-up |")
            print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for spec, ms in zip(wanted, ask(other, size, len(wanted)), strict=True):
                planned = select(spec, machine, trials=trials[spec]).backend
                best = min(ms, key=ms.__getitem__)
                regrets.append(ms[planned] / ms[best] - 1)
                stock = f"{ms['stock']:.4f} | {ms['stock'] / ms[planned]:.2f}x" if "stock" in ms else "- | -"
                print(
                    f"| {spec}, area {spec.area} | {'yes' if spec.deterministic else 'no'} | {planned} | "
                    f"{ms[planned]:.4f} | {best} | {ms[best]:.4f} | {regrets[-1]:.1%} | {stock} |",
                    flush=True,
                )
        assert other.stdin is not None
        other.stdin.close()
    above = sum(regret > 0.03 for regret in regrets)
    print(f"\nlargest regret {max(regrets):.1%}; {above} of {len(regrets)} above 3 %")


if __name__ == "__main__":
    main()
