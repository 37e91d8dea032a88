"""The pictures of `bench step`, `predict`, `train` and `run`, from the rows of their CSV files alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backends.registry import COLORS
from ..utils.files import Row
from ..utils.plotting import as_png, new_figure
from .rounds import VERSIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TECHNIQUES = {  # of a training step, in the order in which each builds on the one before
    "nchw": "stock, NCHW",
    "unpatched": "+ channels_last\n(stock on CUDA)",
    "sdpa_flash": "+ fused attention\n(torch's flash)",
    "triton_area": "+ our kernel\n(triton_area)",
    "graphs": "+ CUDA graphs\n(network and loss)",
}
RUN_TECHNIQUES = {  # of whole trainings, in the same order; "stock" is the backend
    "unpatched": "stock",
    "stock": "+ direct optimizer step",
    **{arm: TECHNIQUES[arm] for arm in ("sdpa_flash", "triton_area", "graphs")},
}
_MARKERS = "os^DvPhX*d"
_GREY = "#dddddd"
_OUT_OF_MEMORY = "out of memory"
_Texts = dict[str, Callable[[float], str]]  # figure -> how its median is written

# Those that are no backends differ from all backends in lightness.
ARM_COLORS = COLORS | {"nchw": "#999933", "unpatched": "#000000", "auto": "#882255", "graphs": "#332288"}


class Span(NamedTuple):
    """Median, lowest and highest of a figure over the rounds."""

    median: float
    low: float
    high: float


class Panel(NamedTuple):
    """What was measured under the same conditions: arms may be compared within, and only there."""

    command: str
    model: str
    batch: int
    precision: str
    device: str | None
    imgsz: int = 0  # 0 if the panel has all sizes

    @property
    def title(self) -> str:
        """`yolo12n, 640 pixels, batch 16, fp16`."""
        size = [f"{self.imgsz} pixels"] if self.imgsz else []
        return ", ".join([Path(self.model).stem, *size, f"batch {self.batch}", self.precision])


def draw_sizes(rows: list[Row]) -> bytes | None:
    """A PNG with time and peak memory against the image size, two panels for each model, batch and precision.

    Points that ran out of memory are crosses at their size, above all others. None if nothing has several sizes.
    """
    found = _panels(rows, by_size=False)
    panels = {panel: mine for panel, mine in found.items() if len({row["imgsz"] for row in mine}) > 1}
    if not panels:
        return None
    figure = new_figure(12, 0.9 + 4 * len(panels))
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (panel, mine), axes in zip(panels.items(), grid, strict=True):
        time, unit = _time_figure(mine)
        subject = {"step": "training step", "predict": "prediction"}.get(panel.command, panel.command)
        _sizes(axes[0], mine, time, f"{subject}, {unit}")
        _sizes(axes[1], mine, "peak_gib", "peak memory, GiB")
        axes[0].set_title(panel.title, loc="left", fontsize=11)
        axes[1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return _with_heading(figure, panels)


def draw_waterfall(rows: list[Row]) -> bytes | None:
    """A PNG with one technique after the other for each training step, and what each saves on the one before.

    None if no step has two arms.
    """
    steps = _panels([row for row in rows if row["command"] == "step"])
    panels = {panel: mine for panel, mine in steps.items() if len(_arms(mine)) > 1}
    if not panels:
        return None
    figure, grid = _stacked(panels)
    for (axis,), (panel, mine) in zip(grid, panels.items(), strict=True):
        time, unit = _time_figure(mine)
        spans = {arm: _span(mine, arm, time) for arm in _arms(mine)}
        longest = max(span.high for span in spans.values() if span)
        before: float | None = None
        for place, (arm, span) in enumerate(spans.items()):
            if span is None:
                _label(axis, 0.01 * longest, place, _error(mine, arm), color="#b00000")
                continue
            axis.barh(place, span.median, height=0.62, color=_color(arm), zorder=2)
            text = f"{span.median:.1f} ms"
            if before is not None:
                saved = before - span.median
                if saved > 0:  # what this technique took away
                    rest = {"left": span.median, "facecolor": "none", "edgecolor": "#909090", "linestyle": ":"}
                    axis.barh(place, saved, height=0.62, zorder=2, **rest)
                text += f"  ({_signed(-saved, '.1f')} ms, {_signed(-100 * saved / before, '.0f')} %)"
            _label(axis, max(span.median, before or 0) + 0.012 * longest, place, text)
            before = span.median
        names = [TECHNIQUES.get(arm, arm) for arm in spans]
        names[0] = names[0].removeprefix("+ ")
        _horizontal(axis, panel, names, 1.42 * longest)
        axis.set_xlabel(f"training step, {unit}; in brackets, against the bar above")
    return _with_heading(figure, panels)


def draw_run_waterfall(rows: list[Row]) -> bytes | None:
    """A PNG with one technique after the other in whole trainings: speed, memory and mAP, three panels for each model.

    Bars are medians over the rounds, lines go from the lowest to the highest. None if no run has two techniques.
    """
    runs = _panels(
        [row for row in rows if row["command"] == "run" and row["arm"] in RUN_TECHNIQUES], figure="process_s"
    )
    panels = {panel: mine for panel, mine in runs.items() if len(_arms(mine)) > 1}
    if not panels:
        return None
    figure, grid = _stacked(panels, 13, 3)
    columns = {
        "images_per_second": ("training, images/s; in brackets, against above", ",.0f"),
        "peak_gib": ("peak allocated in training, GiB", ".2f"),
        "map50_95": ("mAP50-95 after it", ".3f"),
    }
    for axes, (panel, mine) in zip(grid, panels.items(), strict=True):
        found = _arms(mine, RUN_TECHNIQUES)
        for axis, (column, (label, digits)) in zip(axes, columns.items(), strict=True):
            spans = {arm: _span(mine, arm, column) for arm in found}
            longest = max((span.high for span in spans.values() if span), default=0) or 1
            before: float | None = None
            for place, (arm, span) in enumerate(spans.items()):
                if span is None:
                    error = _error(mine, arm)[:36] if axis is axes[0] else "-"  # why is said once
                    _label(axis, 0.01 * longest, place, error, color="#b00000")
                    continue
                axis.barh(place, span.median, height=0.62, color=_color(arm), zorder=2)
                axis.plot([span.low, span.high], [place, place], color="#a0a0a0", linewidth=1.5, zorder=3)
                text = f"{span.median:{digits}}"
                if before and column != "map50_95":  # a percentage of a mAP would say more than a few seeds can
                    text += f" ({_signed(100 * (span.median / before - 1), '.0f')} %)"
                _label(axis, span.high + 0.012 * longest, place, text)
                before = span.median
            names = [RUN_TECHNIQUES[arm] for arm in found] if axis is axes[0] else [""] * len(found)
            names[0] = names[0].removeprefix("+ ")
            _horizontal(axis, panel, names, 1.5 * longest)
            axis.set_xlabel(label)
            if axis is not axes[0]:
                axis.set_title("", loc="left")
    return _with_heading(figure, panels)


def draw_predict(rows: list[Row]) -> bytes | None:
    """A PNG with the latency of every arm of a prediction: wall time, and within it that of GPU kernels.

    None if no prediction was measured.
    """
    texts: _Texts = {
        "wall_ms": lambda ms: f"{ms:.2f} ms",
        "kernel_ms": lambda ms: f"GPU {ms:.2f} ms",
        "images_per_second": lambda speed: f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.1f} images/s",
    }
    labels = "prediction, ms: wall (light), kernels on the GPU (full)", "prediction, wall ms"
    return _nested_bars(rows, "predict", texts, labels, first=TECHNIQUES)


def draw_train(rows: list[Row]) -> bytes | None:
    """A PNG with an iteration of every arm of a training: on the clock, and within it without the data loader.

    None if no training was measured.
    """
    texts: _Texts = {
        "iteration_ms": lambda ms: f"{ms:.1f} ms",
        "without_loader_ms": lambda ms: f"{ms:.1f} without the loader",
        "peak_gib": lambda memory: f"{memory:.1f} GiB",
    }
    label = "iteration of a training, ms: with the data loader (light), without it (full)"
    return _nested_bars(rows, "train", texts, (label,))


def draw_runs(rows: list[Row]) -> bytes | None:
    """A PNG with the seconds of whole trainings, of every arm, and within them those of the first epoch.

    None if no run was measured.
    """
    texts: _Texts = {
        "process_s": lambda seconds: f"{seconds:.1f} s",
        "first_epoch_s": lambda seconds: f"first {seconds:.1f}",
        "epoch_s": lambda seconds: f"others {seconds:.2f}",
        "map50_95": lambda found: f"mAP {found:.3f}",
    }
    return _nested_bars(rows, "run", texts, ("a whole training, s: process (light), first epoch (full)",))


def _panels(rows: list[Row], by_size: bool = True, figure: str = "wall_ms") -> dict[Panel, list[Row]]:
    """The rows of each panel, of those with something measured in the column `figure`."""
    panels: dict[Panel, list[Row]] = {}
    for row in rows:
        key = Panel(row["command"], row["model"], row["batch"], row["precision"], row["device"])
        panels.setdefault(key._replace(imgsz=row["imgsz"]) if by_size else key, []).append(row)
    return {panel: mine for panel, mine in panels.items() if any(row[figure] is not None for row in mine)}


def _arms(rows: list[Row], first: Iterable[str] = TECHNIQUES) -> list[str]:
    """The techniques in their order, then all others in that of the file."""
    found = [row["arm"] for row in rows]
    return list(dict.fromkeys([*(arm for arm in first if arm in found), *found]))


def _color(arm: str) -> str:
    return ARM_COLORS.get(arm, "#009e73")


def _span(rows: list[Row], arm: str, figure: str) -> Span | None:
    values = [row[figure] for row in rows if row["arm"] == arm and row[figure] is not None]
    return Span(statistics.median(values), min(values), max(values)) if values else None


def _time_figure(rows: list[Row]) -> tuple[str, str]:
    """The figure for time that all rows have, and its unit: the GPU's, but graphs spare the host alone."""
    on_gpu = all(row["kernel_ms"] is not None and row["arm"] != "graphs" for row in rows if row["wall_ms"] is not None)
    return ("kernel_ms", "GPU ms") if on_gpu else ("wall_ms", "wall ms")


def _error(rows: list[Row], arm: str) -> str:
    """Why an arm was not measured, in one short line."""
    error = next((row["error"] for row in rows if row["arm"] == arm and row["error"]), "not measured")
    error = re.sub(r"^[\w.]+Error: ", "", error)
    return error if len(error) <= 90 else error[:87] + "..."


def _signed(change: float, digits: str) -> str:
    """`-1.5` with a true minus sign, and a zero without any."""
    text = f"{change:+{digits}}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def _sizes(axis: Axes, rows: list[Row], figure: str, label: str) -> None:
    """One figure against the image size, a line for each arm."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    sizes = sorted({row["imgsz"] for row in rows})
    places = [math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0]) for size in sizes]  # 0 is left, 1 is right
    top = 0.95  # of the panel: what ran out of memory stands above all points, one arm below the other
    for i, arm in enumerate(_arms(rows)):
        at_size = {size: [row for row in rows if row["imgsz"] == size] for size in sizes}
        spans = {size: span for size, mine in at_size.items() if (span := _span(mine, arm, figure))}
        color = _color(arm)
        axis.plot(
            list(spans),
            [span.median for span in spans.values()],
            color=color,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=max(4, 9 - i),  # equal points stay visible, one within the other
            label=arm,
            zorder=3,
        )
        for size, span in spans.items():
            axis.plot([size, size], [span.low, span.high], color=color, linewidth=1, zorder=2)
        without = [size for size in sizes if size not in spans]
        if lost := [size for size in without if _error(at_size[size], arm).startswith(_OUT_OF_MEMORY)]:
            frame = axis.get_xaxis_transform()
            axis.plot(lost, [top] * len(lost), "x", color=color, markersize=9, markeredgewidth=2.2, transform=frame)
            beside = places[sizes.index(lost[0])] > 0.5  # else there is no room to its left
            text = f"{arm}: {_OUT_OF_MEMORY}"
            place: dict[str, Any] = {"xytext": (-9, 0) if beside else (-4, -14), "textcoords": "offset points"}
            place |= {"xycoords": frame, "ha": "right" if beside else "left", "va": "center"}
            axis.annotate(text, (lost[0], top), fontsize=9, **place)
            top -= 0.075 if beside else 0.135
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    named, last = [], -1.0
    for size, at in zip(sizes, places, strict=True):
        if at - last > 0.035:  # else it would stand on the one before
            named.append(size)
            last = at
    axis.set_xticks(named, [str(size) for size in named])
    if min(b - a for a, b in pairwise(places)) < 0.13:  # else the numbers would touch
        axis.tick_params(axis="x", rotation=60)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())
    figures = [row[figure] for row in rows if row[figure] is not None]
    bottom, highest = min(figures) / 1.4, max(figures)
    few = highest < 4 * min(figures)  # powers of ten and their parts would leave a tick or none
    axis.yaxis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=(1, 2, 5)))
    axis.set_ylim(bottom, bottom * (highest / bottom) ** (1 / max(top - 0.02, 0.3)))
    axis.set_xlim(sizes[0] / 1.12, sizes[-1] * 1.12)
    axis.set_xlabel("image size, pixels")
    axis.set_ylabel(label)
    axis.grid(color=_GREY, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def _nested_bars(
    rows: list[Row], command: str, texts: _Texts, labels: tuple[str, ...], first: Iterable[str] = ()
) -> bytes | None:
    """A PNG with a bar for each arm, those of `first` above all others, by the first figure of `texts`.

    The second figure is a bar within it; without any, the last of the labels is that of the axis.
    """
    whole, part = list(texts)[:2]
    panels = _panels([row for row in rows if row["command"] == command], figure=whole)
    if not panels:
        return None
    figure, grid = _stacked(panels)
    for (axis,), (panel, mine) in zip(grid, panels.items(), strict=True):
        arms = _arms(mine, first)
        longest = max(span.high for arm in arms if (span := _span(mine, arm, whole)))
        for place, arm in enumerate(arms):
            spans = {name: span for name in texts if (span := _span(mine, arm, name))}
            if whole not in spans:
                _label(axis, 0.01 * longest, place, _error(mine, arm), color="#b00000")
                continue
            color, (median, low, high) = _color(arm), spans[whole]
            axis.barh(place, median, height=0.62, color=color, alpha=0.35 if part in spans else 1, zorder=2)
            axis.plot([low, high], [place, place], color="black", linewidth=1, zorder=3)
            if part in spans:
                axis.barh(place, min(spans[part].median, median), height=0.62, color=color, zorder=2)
            text = ", ".join(texts[name](span.median) for name, span in spans.items())
            _label(axis, high + 0.012 * longest, place, text)
        _horizontal(axis, panel, arms, 1.62 * longest)
        axis.set_xlabel(labels[-1 if all(row[part] is None for row in mine) else 0])
    return _with_heading(figure, panels)


def _stacked(panels: dict[Panel, list[Row]], width: float = 9, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with a row of axes for each panel, as high as its arms need."""
    arms = [len({row["arm"] for row in mine}) for mine in panels.values()]
    figure = new_figure(width, 0.7 + sum(0.95 + 0.46 * number for number in arms))
    heights = [0.8 + 0.46 * number for number in arms]
    return figure, figure.subplots(len(arms), columns, squeeze=False, height_ratios=heights)


def _label(axis: Axes, x: float, y: float, text: str, color: str = "black") -> None:
    """Text that begins at a point, readable on top of grid lines."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.text(x, y, text, va="center", fontsize=9, color=color, bbox=box, zorder=4)


def _horizontal(axis: Axes, panel: Panel, names: list[str], longest: float) -> None:
    """What panels of horizontal bars share."""
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, longest)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=_GREY, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def _with_heading(figure: Figure, panels: dict[Panel, list[Row]]) -> bytes:
    """The finished figure as PNG, with devices and versions above, each of them once."""
    rows = [row for mine in panels.values() for row in mine]

    def found(column: str) -> str:
        return " / ".join(dict.fromkeys(str(row[column]) for row in rows if row[column] is not None))

    versions = ", ".join(f"{name} {found(name)}" for name in VERSIONS if found(name))
    figure.set_layout_engine("constrained", w_pad=0.1)
    figure.suptitle(f"{found('device')}\n{versions}", fontsize=9, x=0.01, ha="left")
    return as_png(figure)
