"""`flash.png` of a training run: memory, speed, where the time goes, and the backends of its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..backends.registry import COLORS, label
from ..utils.plotting import as_png, new_figure
from .clock import PARTS

_PART_COLORS = dict(zip(PARTS, ("#332288", "#882255", "#44aa99", "#ddcc77", "#dddddd"), strict=True))


def draw_run(file: Path) -> bytes | None:
    """Draw a run.

    Args:
        file: The flash.jsonl of a run folder; the last line of an epoch counts, as a resumed run may repeat it.

    Returns:
        A PNG; None before the first epoch has ended.
    """
    from matplotlib.ticker import MaxNLocator

    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    epochs = {line["epoch"]: line for line in lines if line["event"] == "epoch"}
    if not epochs:
        return None
    rows = {(line["mode"], line["layer"]): line for line in lines if line["event"] == "plan"}
    figure = new_figure(14, 3.6)
    memory, speed, parts, layers = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    numbers = sorted(epochs)
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(numbers) < 50 else {}
    for kind, color in (("reserved", "#56b4e9"), ("allocated", "#0072b2")):
        memory.plot(numbers, [epochs[n][f"peak_{kind}_gib"] for n in numbers], label=kind, color=color, **style)
    speed.plot(numbers, [epochs[n]["images_per_second"] for n in numbers], color="#d55e00", **style)
    heights = [0.0] * len(numbers)
    for part, color in _PART_COLORS.items():
        # A run that was begun by an older version has epochs without this.
        seconds = [epochs[n].get("seconds", {}).get(part, 0.0) for n in numbers]
        parts.bar(numbers, seconds, 0.8, bottom=heights, label=part, color=color)
        heights = [height + more for height, more in zip(heights, seconds, strict=True)]
    for panel, title, unit in (
        (memory, "Peak memory", "GiB"),
        (speed, "Speed", "images/s"),
        (parts, "Time of an epoch", "s"),
    ):
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("epoch")
        panel.set_ylabel(unit)
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set_axisbelow(True)
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False, fontsize=8)
    parts.set_ylim(0, 1.4 * max(*heights, 1e-3))  # room for the legend
    parts.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    _layers(layers, rows)
    run: dict[str, Any] = next((line for line in reversed(lines) if line["event"] == "run"), {})
    name = run.get("machine", {}).get("name", "")
    figure.suptitle(f"yolo-flash {run.get('yolo_flash', '')}, {name}", fontsize=10, x=0.01, ha="left")
    return as_png(figure)


def _layers(panel: Any, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A cell for each layer and mode, in the colour of its backend."""
    modes = list(dict.fromkeys(mode for mode, _ in rows))
    names = list(dict.fromkeys(layer for _, layer in rows))
    drawn: dict[str, Any] = {}
    for (mode, layer), row in rows.items():
        backend, left, color = row["backend"], modes.index(mode) - 0.47, COLORS.get(row["backend"], "#000000")
        drawn[label(backend)] = panel.barh(names.index(layer), 0.94, left=left, height=0.86, color=color)
    panel.set_title("Backend of each layer", loc="left", fontsize=11)
    panel.set_xticks(range(len(modes)), modes)
    panel.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= 10 else 6)
    panel.set_xlim(-0.5, max(len(modes), 1) - 0.5)
    panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.legend(drawn.values(), drawn, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
