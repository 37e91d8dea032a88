"""Measure the tiles of the area attention kernels on a GPU: the numbers behind the table in yolo_flash/kernels/area.py.

    python scripts/tune_area.py tiles.json [shape ...]

Every shape, kernel and tile is compiled in parallel processes and then timed by replaying a CUDA graph; the fastest
tiles of each kernel and shape are printed, all numbers go to the file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from yolo_flash.bench.op_table import GPU_SHAPES, Shape
from yolo_flash.kernels import area
from yolo_flash.kernels.area import Tiles

SHAPES = GPU_SHAPES | {"v10m-640-b16": Shape(16, 400, 4, 36, 72)}
CANDIDATES: dict[area.Kernel, list[Tiles]] = {  # rows, block, warps, stages, registers
    "area_forward": [
        *[Tiles(64, 64, 4, stages, registers) for stages in (3, 4) for registers in (None, 96, 80, 72, 64)],
        *[Tiles(64, 128, 4, 3, registers) for registers in (None, 128, 112)],
        *[Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 3, 168)],
    ],
    "area_backward_q": [
        *[Tiles(64, 32, 4, stages, registers) for stages in (3, 4, 5) for registers in (None, 64)],
        *[Tiles(64, 64, 4, stages, registers) for stages in (2, 3, 4) for registers in (None, 96)],
        *[Tiles(128, 32, 4, 3, 128), Tiles(128, 64, 4, 3, 168)],
    ],
    "area_backward_kv": [
        *[Tiles(64, 32, 4, stages, registers) for stages in (2, 3, 4) for registers in (None, 96, 80)],
        *[Tiles(64, 64, 4, 3, registers) for registers in (None, 128, 96)],
        *[Tiles(128, 32, 4, 3, registers) for registers in (None, 168, 160, 128)],
        *[Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 4), Tiles(64, 128, 4, 3)],
    ],
}
Launch = Callable[[], object]


def launch_of(kernel: area.Kernel, tiles: Tiles, groups: int, tokens: int, heads: int, dim: int, dim_v: int) -> Launch:
    """A kernel on random tensors: the time does not depend on what is in them."""
    qkv = torch.randn(groups, tokens, heads, 2 * dim + dim_v, device="cuda", dtype=torch.float16)
    out, image, lse = torch.ops.yolo_flash.area_attention(qkv, dim)
    tensors = {
        "area_forward": (qkv, out, image, lse),
        "area_backward_q": (qkv, out, out, lse, torch.empty_like(lse), torch.empty_like(qkv)),
        "area_backward_kv": (qkv, out, out, lse, torch.zeros_like(lse), torch.empty_like(qkv)),
    }
    return functools.partial(area.launch, kernel, qkv, dim, tensors[kernel], tiles)


def compile_one(job: tuple[area.Kernel, str, Tiles]) -> str:
    kernel, shape, tiles = job
    _, tokens, _, dim, dim_v = SHAPES[shape]
    try:
        launch_of(kernel, tiles, 1, tokens, 1, dim, dim_v)()
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory for this card, say
        return f"{type(error).__name__}: {error}"
    return ""


def microseconds(launch: Launch, repeats: int = 5) -> float:
    """Median over replays of a graph of 10 launches."""
    launch()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            launch()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return statistics.median(times[1:])


def main() -> None:
    file, shapes = Path(sys.argv[1]), sys.argv[2:] or list(SHAPES)
    jobs = [(kernel, shape, tiles) for shape in shapes for kernel in CANDIDATES for tiles in CANDIDATES[kernel]]
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(compile_one, jobs, chunksize=4))
    rows = []
    for (kernel, shape, tiles), error in zip(jobs, errors, strict=True):
        row = {"kernel": kernel, "shape": shape, "tiles": dataclasses.asdict(tiles)}
        if error:
            rows.append(row | {"error": error})
        else:
            rows.append(row | {"us": microseconds(launch_of(kernel, tiles, *SHAPES[shape]))})
    file.write_text(json.dumps(rows), encoding="utf-8")
    for kernel, shape in itertools.product(CANDIDATES, shapes):
        mine = [row for row in rows if row["kernel"] == kernel and row["shape"] == shape]
        best = sorted((row for row in mine if "us" in row), key=lambda row: row["us"])
        line = ", ".join("/".join(map(str, row["tiles"].values())) + f" {row['us']:.1f}" for row in best[:6])
        print(f"{kernel[5:]:12} {shape:16} {line}; {len(mine) - len(best)} failed")


if __name__ == "__main__":
    main()
