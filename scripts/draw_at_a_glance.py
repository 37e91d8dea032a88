"""Draw docs/at-a-glance.png from docs/results alone. Usage: python scripts/draw_at_a_glance.py [FILE.png]"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

from yolo_flash.bench.pictures import ARM_COLORS
from yolo_flash.bench.rounds import NUMBERS
from yolo_flash.bench.run import RunJob
from yolo_flash.utils.files import Row, from_csv, write_file
from yolo_flash.utils.plotting import as_png, new_figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results"
STOCK, OURS = "#9a9a9a", ARM_COLORS["triton_area"]
NAMED = (1280, 2048, 4096, 8192, 14336)  # pixels, of the sizes in the picture
RUNS = [f"run-{model}-bccd-h200.csv" for model in ("yolo12n", "yolo12s", "rtdetr-l")]


def rows_of(name: str) -> list[Row]:
    """The samples of a CSV file of results."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return from_csv(text, (*NUMBERS, *RunJob.more_numbers))


def draw() -> bytes:
    """The picture: GPU time of steps, their memory against the image size, seconds of whole runs."""
    steps, sizes, runs = rows_of("steps-h100.csv"), rows_of("high-resolution-step-h100.csv"), list(map(rows_of, RUNS))
    figure = new_figure(13, 5.1)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 0.9, 1])
    of_step: dict[str, list[Row]] = {}
    for row in steps:
        of_step.setdefault(f"{stem(row)}\n{row['imgsz']} pixels\nbatch {row['batch']}", []).append(row)
    pairs(left, "A training step: time on the GPU", of_step, ("unpatched", "triton_area"), "kernel_ms", "ms")
    memory(middle, sizes)
    of_run = {f"{stem(rows[0])}\n{rows[0]['epochs']} epochs": rows for rows in runs}
    pairs(right, "A whole training, start to end", of_run, ("unpatched", "auto"), "process_s", "s")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=12)
    all_runs = [row for rows in runs for row in rows]
    right_told = f"Right: BCCD, 640 pixels, batch 16, {told(all_runs)}. Medians; a black line spans all samples."
    machines = f"Left and middle: {told(steps + sizes)}.\n{right_told}"
    figure.supxlabel(machines, fontsize=8.5, x=0.01, ha="left")
    return as_png(figure)


def stem(row: Row) -> str:
    """Name of a model without its suffix."""
    return Path(row["model"]).stem


def pairs(axis: Any, title: str, groups: dict[str, list[Row]], arms: tuple[str, str], figure: str, unit: str) -> None:
    """Two bars a group, stock above ours: medians, lines from the lowest to the highest sample, and the gain."""
    found = [[sorted(row[figure] for row in rows if row["arm"] == arm) for arm in arms] for rows in groups.values()]
    longest = max(max(stock) for stock, _ in found)
    for place, (stock, ours) in enumerate(found):
        for offset, samples, color in ((-0.19, stock, STOCK), (0.19, ours, OURS)):
            middle = statistics.median(samples)
            axis.barh(place + offset, middle, height=0.36, color=color)
            axis.plot([samples[0], samples[-1]], [place + offset] * 2, color="black", linewidth=1)
            text = f"{middle:.0f} {unit}"
            axis.text(samples[-1] + 0.02 * longest, place + offset, text, va="center", fontsize=10)
        gain = statistics.median(stock) / statistics.median(ours)
        axis.text(
            1.62 * longest, place, f"{gain:.2f}x", va="center", ha="right", fontsize=15, color=OURS, weight="bold"
        )
    axis.set_xlim(0, 1.65 * longest)
    axis.set_title(title, fontsize=12, loc="left")
    axis.set_yticks(range(len(groups)), groups, fontsize=10)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def memory(axis: Any, rows: list[Row]) -> None:
    """Peak memory of a step against the image size, and a cross at the first size that each has no memory for."""
    for arm, color, name in (("unpatched", STOCK, "stock Ultralytics"), ("triton_area", OURS, "yolo-flash")):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["imgsz"])
        points = [(row["imgsz"], row["peak_gib"]) for row in mine if not row["error"]]
        axis.plot(*zip(*points, strict=True), "o-", color=color, linewidth=2.5, markersize=7, label=name)
        for size, gib in (point for point in points if point[0] in NAMED):
            above = arm == "unpatched"
            place = {"xytext": (-4, 7) if above else (6, -13), "textcoords": "offset points"}
            axis.annotate(f"{gib:.1f}", (size, gib), fontsize=10, ha="right" if above else "left", **place)
        lost = next(row for row in mine if row["error"])
        found = re.fullmatch(r"out of memory \((\d+) GiB\)", lost["error"])
        card = float(found[1])  # a figure of another kind has no place here
        axis.plot([lost["imgsz"]], [card], "x", color=color, markersize=11, markeredgewidth=3)
    place = {"textcoords": "offset points", "ha": "right", "va": "center"}
    axis.annotate(f"out of memory\n({card:.0f} GiB)", (NAMED[2], card), (-10, 0), fontsize=10, **place)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlim(880, 19000)
    axis.set_ylim(0.35, 1.5 * card)
    axis.set_xticks(NAMED, map(str, NAMED))
    axis.set_yticks([1, 4, 16, 64], ["1", "4", "16", "64 GiB"])
    axis.minorticks_off()
    axis.set_xlabel("image size in pixels; yolo12n, batch 1")
    axis.grid(color="#e4e4e4")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("A training step: peak memory", fontsize=12, loc="left")


def told(rows: list[Row]) -> str:
    """Machine, precision and versions of samples."""
    names = {"device": "", "precision": "", "torch": "torch ", "cudnn": "cuDNN ", "triton": "Triton "}
    names["ultralytics"] = "ultralytics "
    return ", ".join(f"{name}{' / '.join(dict.fromkeys(row[key] for row in rows))}" for key, name in names.items())


if __name__ == "__main__":
    write_file(Path(*sys.argv[1:2] or [DOCS / "at-a-glance.png"]), draw())
