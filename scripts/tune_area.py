"""Measure the tiles of the area attention kernels on a GPU: the numbers behind the table in yolo_flash/kernels/area.py.

    python scripts/tune_area.py [kernel or shape ...] [seconds=240] [before=FILE] [json=FILE]

Without a kernel or a shape it takes all. The tiles of the table and those of CANDIDATES are compiled in parallel
processes, and then timed in turns by replaying CUDA graphs; a line a kernel and shape has the table's tiles and the
fastest others, the last lines have where the table is beaten. `before` is another version of area_triton.py, whose
kernels run with the table's tiles too: where both compile to the same code, the difference is noise. What is not done
after so many seconds is left out, with a line. All numbers go to the file of `json`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import yolo_flash.kernels
from yolo_flash.bench.op_table import GPU_SHAPES, Shape
from yolo_flash.kernels import area
from yolo_flash.kernels.area import Tiles
from yolo_flash.utils.timing import events_ms

MORE_SHAPES = {  # pictures of 672 pixels, whose rest by any tile is large; and the odd head dims of YOLOv10m
    "12n-p4-672-b64": Shape(256, 441, 2, 32, 32),
    "26n-672-b64": Shape(64, 441, 2, 32, 64),
    "v10m-640-b16": Shape(16, 400, 4, 36, 72),
}
SHAPES = {name: shape for name, shape in (GPU_SHAPES | MORE_SHAPES).items() if name != "12s-p4-640-b16"}  # 12n-p5's
CANDIDATES: dict[area.Kernel, list[Tiles]] = {  # rows, block, warps, stages, registers
    "area_backward_q": [
        *[Tiles(64, 32, 4, stages) for stages in (3, 4, 5)],
        *[Tiles(64, 64, 4, stages) for stages in (2, 3, 4)],
        *[Tiles(64, 32, 4, 4, 80), Tiles(64, 64, 4, 3, 112), Tiles(128, 32, 4, 3), Tiles(128, 64, 4, 3)],
    ],
    "area_backward_kv": [
        *[Tiles(64, 32, 4, stages, 96) for stages in (2, 3, 4)],
        *[Tiles(64, 32, 4, 3, registers) for registers in (None, 112, 104)],
        *[Tiles(64, 64, 4, stages) for stages in (2, 3)],
        *[Tiles(128, 32, 4, stages) for stages in (2, 3, 4)],
        *[Tiles(64, 64, 4, 3, 168), Tiles(128, 32, 4, 3, 168), Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 4)],
    ],
    "area_forward": [
        *[Tiles(64, 64, 4, 3, registers) for registers in (None, 96, 80, 72)],
        *[Tiles(64, 64, 4, stages, 80) for stages in (2, 4)],
        *[Tiles(64, 32, 4, 3), Tiles(64, 128, 4, 3), Tiles(128, 64, 4, 3)],
    ],
}
CALLS, ROUNDS = 10, 15  # of a kernel in a graph, and of all graphs of a kernel and shape in turn
Launch = Callable[[], object]


class Variant(NamedTuple):
    """A kernel of the package, or of the file `before`, with tiles, compiled for the sizes of a shape."""

    kernel: area.Kernel
    shape: Shape
    tiles: Tiles
    before: str = ""

    def __str__(self) -> str:
        return "before " * bool(self.before) + "/".join(str(n or "-") for n in dataclasses.astuple(self.tiles))

    @property
    def code(self) -> tuple[Any, ...]:
        """What the compiler sees: the same for many shapes."""
        _, tokens, _, dim, dim_v = self.shape
        return self.kernel, self.tiles, self.before, *area.constants_of(self.tiles, tokens, dim, dim_v, True).values()


def variants_of(kernel: area.Kernel, shape: Shape, before: str) -> list[Variant]:
    """The table's tiles first, then those of the other file, then the candidates."""
    card = torch.cuda.get_device_capability()
    now = area.tiles_for(kernel, shape.tokens, shape.head_dim, shape.head_dim_v, card)
    others = [Variant(kernel, shape, tiles) for tiles in CANDIDATES[kernel] if tiles != now]
    return [Variant(kernel, shape, now), *[Variant(kernel, shape, now, before)] * bool(before), *others]


@functools.lru_cache
def kernels_in(file: str) -> ModuleType:
    """Another version of area_triton.py, as a module of the package beside it."""
    if not file:
        return importlib.import_module("yolo_flash.kernels.area_triton")
    spec = importlib.util.spec_from_file_location("yolo_flash.kernels.area_triton_before", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors_for(shape: Shape, attention: Callable[[Tensor, int], tuple[Tensor, ...]]) -> dict[area.Kernel, Any]:
    """The arguments of every kernel, the packed tensor first."""
    groups, tokens, heads, dim, dim_v = shape
    qkv = torch.randn(groups, tokens, heads, 2 * dim + dim_v, device="cuda", dtype=torch.float16)
    out, image, lse = attention(qkv, dim)
    deltas, dqkv = torch.zeros_like(lse), torch.empty_like(qkv)
    return {
        "area_forward": (qkv, out, image, lse),
        "area_backward_q": (qkv, out, out, lse, deltas, dqkv),
        "area_backward_kv": (qkv, out, out, lse, deltas, dqkv),
    }


def launch_of(variant: Variant, tensors: tuple[Tensor, ...]) -> Launch:
    qkv, dim = tensors[0], variant.shape.head_dim
    kinds = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    yolo_flash.kernels.area_triton = kernels_in(variant.before)  # type: ignore[attr-defined]
    prepare = area._prepare.__wrapped__  # without its cache, which knows of one file alone
    launcher = prepare(variant.kernel, qkv.shape, dim, qkv.device.index, kinds, variant.tiles)
    yolo_flash.kernels.area_triton = kernels_in("")  # type: ignore[attr-defined]
    return functools.partial(launcher, tensors)


def compile_one(variant: Variant) -> str:
    """Into Triton's cache on disk; what is wrong with it, if anything."""
    try:
        shape = variant.shape._replace(groups=1, heads=1)
        launch_of(variant, tensors_for(shape, area._outputs)[variant.kernel])()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory for this card, say
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return ""


def compile_all(variants: list[Variant], until: float) -> dict[tuple[Any, ...], str]:
    """What is wrong with each code, where anything is; a code that is not compiled in time is not in it."""
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    jobs = {code: pool.submit(compile_one, variant) for code, variant in {v.code: v for v in variants}.items()}
    start, waiting = time.monotonic(), {*jobs.values()}
    while waiting and time.monotonic() < until:
        waiting = wait(waiting, timeout=10).not_done
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} compiled in {time.monotonic() - start:.0f} s", flush=True)
    pool.shutdown(cancel_futures=True)  # and wait: what still compiles would disturb the timing
    ended = {code: job for code, job in jobs.items() if not job.cancelled()}
    return {code: repr(job.exception()) if job.exception() else job.result() for code, job in ended.items()}


def microseconds(launches: dict[Variant, Launch]) -> dict[Variant, float]:
    """Medians over replays of a graph of each, all in turn, so that the clock of the card changes for all."""
    graphs: dict[Variant, torch.cuda.CUDAGraph] = {}
    for variant, launch in launches.items():
        launch()
        torch.cuda.synchronize()
        graphs[variant] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[variant]):
            for _ in range(CALLS):
                launch()
    times: dict[Variant, list[float]] = {variant: [] for variant in launches}
    for _ in range(ROUNDS + 1):
        for variant, graph in graphs.items():
            times[variant].append(events_ms(graph.replay) * 1000 / CALLS)
    return {variant: statistics.median(found[1:]) for variant, found in times.items()}


def compared(found: dict[Variant, float]) -> tuple[str, float]:
    """The table's tiles and the fastest others in a line, and the share of the time that the fastest would save."""
    (now, us), *others = found.items()
    before = [f"{variant} {t:.1f}" for variant, t in others if variant.before]
    candidates = sorted((t, str(variant)) for variant, t in others if not variant.before)
    words = [f"now {now} {us:.1f}", *before, ", ".join(f"{variant} {t:.1f}" for t, variant in candidates[:5])]
    return "; ".join(words), 1 - min([us, *(t for t, _ in candidates)]) / us


def main(words: list[str]) -> None:
    """See the head of the file."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    if unknown := {*names} - {*CANDIDATES, *SHAPES} | {*options} - {"seconds", "before", "json"}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; kernels {list(CANDIDATES)}, shapes {list(SHAPES)}")
    kernels = [kernel for kernel in CANDIDATES if kernel in names] or list(CANDIDATES)
    shapes = [shape for shape in SHAPES if shape in names] or list(SHAPES)
    seconds, start = float(options.get("seconds", 240)), time.monotonic()
    groups = [(kernel, name) for kernel in kernels for name in shapes]
    variants = {(k, name): variants_of(k, SHAPES[name], options.get("before", "")) for k, name in groups}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; rows/block/warps/stages/registers and us")
    errors = compile_all([v for group in variants.values() for v in group], start + 0.6 * seconds)
    for error in sorted({error for error in errors.values() if error}):
        print(f"  {error}")
    rows, better = [], []
    for (kernel, name), group in variants.items():
        if time.monotonic() - start > seconds:
            print(f"{kernel[5:]:12} {name:15} left out: {seconds:.0f} seconds are over", flush=True)
            continue
        good = [variant for variant in group if errors.get(variant.code) == ""]
        if good[:1] != group[:1]:
            print(f"{kernel[5:]:12} {name:15} left out: the table's own tiles are not compiled", flush=True)
            continue
        tensors = tensors_for(SHAPES[name], torch.ops.yolo_flash.area_attention)[kernel]
        found = microseconds({variant: launch_of(variant, tensors) for variant in good})
        line, saved = compared(found)
        line = f"{kernel[5:]:12} {name:15} {line}"
        print(line + f"; {len(group) - len(good)} failed" * (len(good) < len(group)), flush=True)
        better += [(saved, line)] * (saved > 0.02)
        rows += [{"kernel": kernel, "shape": name, "tiles": str(v), "us": us} for v, us in found.items()]
    print(f"\nThe table is beaten by more than 2 % in {len(better)} of {len(variants)} rows:")
    for saved, line in sorted(better, reverse=True):
        print(f"{saved:6.1%} {line}")
    if "json" in options:
        Path(options["json"]).write_text(json.dumps(rows), encoding="utf-8")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
