"""Tables and pictures of the files of study_accuracy.py; docs/results/accuracy-h200.md.

python scripts/study_accuracy_report.py folder/accuracy.csv [picture.png]       or folder/resume.csv
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from yolo_flash.bench.pictures import ARM_COLORS
from yolo_flash.utils.files import Row, from_csv, text_and_columns, write_file
from yolo_flash.utils.plotting import as_png, new_figure

NAMES = {"stock": "stock", "auto": "ours as it ships", "graphs": "ours from graphs", "eager": "ours, no graphs"}
NUMBERS = (
    *("imgsz", "batch", "seed", "epoch", "map50_95", "map50", "loss", "epoch_s", "peak_gib", "reserved_gib"),
    *("replayed", "process_s"),
)
COLUMNS = ("model", "arm", *NUMBERS, "device", "torch", "ultralytics", "yolo_flash", "commit")
RESUME_NUMBERS = ("epoch", "map50_95", "loss", "val_loss")
RESUME_COLUMNS = ("model", "run", "arm", *RESUME_NUMBERS, "device", "torch", "ultralytics", "yolo_flash", "commit")
RESUMED = {  # run -> its arms
    "stock": ("stock",),
    "stock, then ours": ("stock", "auto"),
    "ours, then stock": ("auto", "stock"),
}
NOTE = """\
Last epoch against stock: the difference of the means, and in brackets its 95 % interval (Welch). Within the spread
means that the interval contains 0: no difference was seen, and one beyond the interval is unlikely; not that there is
none. Of twenty such intervals one misses by chance. Runs went side by side on one card: the seconds are no times to
quote. Peak is what was allocated, of training alone, the highest of any epoch and seed, captures included."""


def read(file: Path, numbers: tuple[str, ...] = NUMBERS) -> list[Row]:
    return from_csv(text_and_columns(file)[0], numbers) if file.exists() else []


def key_of(row: Row) -> tuple[Any, ...]:
    return row["model"], row["imgsz"], row["arm"], row["seed"]


# Statistics -----------------------------------------------------------------------------------------------------------
def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t: with x = sqrt(freedom) tan(angle) its density is a power of the cosine."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (freedom - 1))
    return float(math.sqrt(freedom) * np.tan(np.interp(0.95, mass / mass[-1], angles[1:])))


def interval(difference: float, error: float, freedom: float) -> tuple[float, float]:
    """The 95 % interval by Student's t."""
    half = student_t(freedom) * error
    return difference - half, difference + half


def welch(ours: list[float], stock: list[float]) -> tuple[float, float, float]:
    """Difference of the means, and the bounds of its 95 % interval by Welch, who takes no equal spreads for granted."""
    parts = [statistics.variance(values) / len(values) for values in (ours, stock)]
    difference, error = statistics.mean(ours) - statistics.mean(stock), math.sqrt(sum(parts))
    if not error:
        return difference, difference, difference
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (ours, stock), strict=True))
    return difference, *interval(difference, error, freedom)


def verdict(ours: list[float], stock: list[float]) -> str:
    """The difference to stock, and whether seeds alone explain it."""
    if min(len(ours), len(stock)) < 2:
        return f"{statistics.mean(ours) - statistics.mean(stock):+.4f}; one seed has no spread"
    difference, low, high = welch(ours, stock)
    where = "within" if low <= 0 <= high else "**outside**"
    apart = min(ours) > max(stock) or max(ours) < min(stock)
    ranges = "ranges do not overlap" if apart else "ranges overlap"
    return f"{difference:+.4f} ({low:+.4f}..{high:+.4f}), {where} the spread; {ranges}"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(rows: list[Row]) -> str:
    """Markdown: last and best mAP50-95 of each arm, the difference to stock, seconds and memory."""
    runs: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        runs[key_of(row)].append(row)
    heads = ("model, pixels", "arm", "seeds", "mAP50-95, last epoch", "best epoch", "last epoch against stock")
    lines = [f"| {' | '.join((*heads, 'epoch s', 'peak, reserved GiB', 'steps replayed'))} |", "| --- " * 9 + "|"]
    pairs: dict[str, list[float]] = defaultdict(list)
    for imgsz, model in sorted({(key[1], key[0]) for key in runs}):
        arms = {arm: {key[3]: mine for key, mine in runs.items() if key[:3] == (model, imgsz, arm)} for arm in NAMES}
        last = {
            arm: {seed: max(mine, key=lambda row: row["epoch"])["map50_95"] for seed, mine in found.items()}
            for arm, found in arms.items()
        }
        for arm, found in arms.items():
            if not found:
                continue
            every = list(itertools.chain(*found.values()))
            seconds = [row["epoch_s"] for row in every if row["epoch_s"] is not None]
            stock, against = last["stock"] if arm != "stock" else {}, ""
            if stock:
                against = verdict(list(last[arm].values()), list(stock.values()))
                pairs[arm] += [last[arm][seed] - stock[seed] for seed in found if seed in stock]
            replayed = [row["replayed"] for row in every if row["replayed"] is not None]
            cells = [
                f"{model}, {imgsz}",
                NAMES[arm],
                str(len(found)),
                spread(list(last[arm].values())),
                spread([max(row["map50_95"] for row in mine) for mine in found.values()]),
                against,
                f"{statistics.median(seconds):.2f}" if seconds else "-",
                ", ".join(f"{max(row[name] or 0 for row in every):.2f}" for name in ("peak_gib", "reserved_gib")),
                f"{statistics.mean(replayed):.0%}" if replayed else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", NOTE, ""]
    for arm, differences in pairs.items():
        if len(differences) > 2:
            mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
            low, high = interval(mean, error, len(differences) - 1)
            text = "contains 0" if low <= 0 <= high else "**does not contain 0**"
            lines.append(
                f"- {NAMES[arm]}, all rows together: mean of {len(differences)} differences to stock of equal seeds "
                f"{mean:+.4f}, 95 % interval {low:+.4f}..{high:+.4f}, which {text}."
            )
    return "\n".join(lines)


def resume_table(rows: list[Row]) -> str:
    """Markdown: the epochs around the seam, and the change across it against the ten around it in the same run."""
    firsts = {run: arms[0] for run, arms in RESUMED.items() if len(arms) > 1}
    seam = max(row["epoch"] for row in rows if firsts.get(row["run"]) == row["arm"])  # the last epoch before it
    around = range(max(1, seam - 2), seam + 4)
    heads = [f"epoch {epoch}" for epoch in around]
    lines = [f"| run | figure | {' | '.join(heads)} | last | at the seam | largest of ten around it |"]
    lines.append("| --- " * (5 + len(around)) + "|")
    worst = 0.0
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = {row["epoch"]: row for row in rows if row["run"] == run}
        for figure, name in (("loss", "training loss"), ("val_loss", "validation loss"), ("map50_95", "mAP50-95")):
            values = {epoch: row[figure] for epoch, row in mine.items()}
            changes = {
                e: values[e + 1] - values[e] for e in range(seam - 5, seam + 6) if e in values and e + 1 in values
            }
            at_seam = changes.pop(seam, 0.0)
            largest = max(map(abs, changes.values()), default=0.0)
            cells = [f"{values[epoch]:.4f}" if epoch in values else "-" for epoch in (*around, max(values))]
            lines.append(f"| {run} | {name} | {' | '.join(cells)} | {at_seam:+.4f} | {largest:.4f} |")
            if run in firsts and largest:
                worst = max(worst, abs(at_seam) / largest)
    lines += ["", f"The largest change across a seam is {worst:.2f} times the largest of the ten around it in its run."]
    return "\n".join(lines)


# Pictures -------------------------------------------------------------------------------------------------------------
STYLE = {
    "stock": ARM_COLORS["unpatched"],
    "auto": ARM_COLORS["sdpa_cudnn"],
    "graphs": ARM_COLORS["graphs"],
    "eager": ARM_COLORS["triton_area"],
}


def draw(rows: list[Row]) -> bytes:
    """A panel for each model and size: mean over the seeds, and a band from the lowest to the highest."""
    panels = sorted({(row["model"], row["imgsz"]) for row in rows}, key=lambda panel: (panel[1], panel[0]))
    figure = new_figure(5.2 * min(len(panels), 2), 0.6 + 3.6 * math.ceil(len(panels) / 2))
    grid = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), squeeze=False).ravel()
    for axis, panel in itertools.zip_longest(grid, panels):
        if panel is None:
            axis.set_visible(False)
            continue
        for arm, color in STYLE.items():
            at: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                if (row["model"], row["imgsz"], row["arm"]) == (*panel, arm):
                    at[row["epoch"]].append(row["map50_95"])
            if at:
                epochs, seeds = sorted(at), max(map(len, at.values()))
                label = f"{NAMES[arm]}, {seeds} seed{'s' * (seeds > 1)}"
                axis.plot(epochs, [statistics.mean(at[e]) for e in epochs], color=color, label=label, zorder=3)
                axis.fill_between(
                    epochs,
                    [min(at[e]) for e in epochs],
                    [max(at[e]) for e in epochs],
                    color=color,
                    alpha=0.18,
                    linewidth=0,
                )
        finish(axis, "mAP50-95", f"{panel[0]}, {panel[1]} pixels")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    return headed(figure, rows, "line: mean of the seeds, band: lowest to highest")


def draw_resume(rows: list[Row]) -> bytes:
    """Training loss and mAP over the epochs, a line for each run."""
    figure = new_figure(10.4, 4.2)
    for axis, (column, label) in zip(
        figure.subplots(1, 2), (("loss", "training loss"), ("map50_95", "mAP50-95")), strict=True
    ):
        for run, color in zip(RESUMED, ("#000000", "#d55e00", "#0072b2"), strict=True):
            mine = [row for row in rows if row["run"] == run]
            axis.plot([row["epoch"] for row in mine], [row[column] for row in mine], color=color, label=run, zorder=3)
            if seam := [a["epoch"] + 0.5 for a, b in itertools.pairwise(mine) if a["arm"] != b["arm"]]:
                axis.axvline(seam[0], color="#909090", linestyle=":", zorder=1)
        finish(axis, label, "killed and resumed in the other arm at the dotted line")
    figure.axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    return headed(figure, rows, rows[0]["model"])


def finish(axis: Any, label: str, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="#dddddd", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def headed(figure: Any, rows: list[Row], text: str) -> bytes:
    versions = ", ".join(f"{name} {rows[0][name]}" for name in ("torch", "ultralytics", "yolo_flash"))
    figure.suptitle(f"{rows[0]['device']}, {versions}\n{text}", fontsize=9, x=0.01, ha="left")
    return as_png(figure)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    file = Path(sys.argv[1])
    if "run" in text_and_columns(file)[1]:
        rows = read(file, RESUME_NUMBERS)
        text, picture = resume_table(rows), draw_resume
    else:
        rows = read(file)
        text, picture = table(rows), draw
    print(text)
    if sys.argv[2:]:
        write_file(Path(sys.argv[2]), picture(rows))


if __name__ == "__main__":
    main()
