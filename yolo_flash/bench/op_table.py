"""The rows of `bench op`, and tables, notes and a plot of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends.registry import BACKENDS, COLORS
from ..backends.spec import AttentionSpec
from ..utils.files import Row
from ..utils.plotting import as_png, new_figure

FORWARD, BOTH = MODES = ("forward", "forward+backward")
OURS, PEER = "triton_area", "flash_attn_4"
OP_ARMS = tuple(backend.name for backend in BACKENDS.values() if backend.fused and backend.exact)
OP_COLUMNS = (  # microseconds of one call: us on the GPU, wall_us from Python; exp_percent of what the SMs can do
    *("shape", "groups", "tokens", "heads", "head_dim", "head_dim_v", "dtype", "mode", "arm", "method", "repeats"),
    *("us", "us_low", "us_high", "wall_us", "tflops", "exp_percent", "peak_mib", "error_out", "error_grad", "note"),
    *("device", "torch", "triton", "cudnn", PEER, "yolo_flash"),
)
OP_NUMBERS = (
    *("groups", "tokens", "heads", "head_dim", "head_dim_v", "repeats", "us", "us_low", "us_high", "wall_us"),
    *("tflops", "exp_percent", "peak_mib", "error_out", "error_grad"),
)


class Shape(NamedTuple):
    """Sizes of a problem: batch x areas, tokens of an area, heads, channels of a query and of a value."""

    groups: int
    tokens: int
    heads: int
    head_dim: int
    head_dim_v: int

    def spec(self, dtype: torch.dtype, mode: str) -> AttentionSpec:
        """The problem as the backends know it."""
        sizes = (self.groups, self.heads, self.tokens, self.tokens, self.head_dim, self.head_dim_v)
        return AttentionSpec(*sizes, dtype, "nhwc", training=mode == BOTH)

    @property
    def scores(self) -> int:
        """Elements of the score matrices, each of which costs one exponential."""
        return self.groups * self.heads * self.tokens**2

    def flops(self, mode: str) -> int:
        """Operations of the two matrix products of the forward, and of the five of the backward."""
        forward = 2 * self.scores * (self.head_dim + self.head_dim_v)
        return forward + (2 * self.scores * (3 * self.head_dim + 2 * self.head_dim_v) if mode == BOTH else 0)


GPU_SHAPES = {  # model and layer, image size, batch
    "12n-p4-640-b64": Shape(256, 400, 2, 32, 32),
    "12n-p5-640-b64": Shape(64, 400, 4, 32, 32),
    "12s-p4-640-b16": Shape(64, 400, 4, 32, 32),
    "12m-p4-640-b32": Shape(128, 400, 8, 32, 32),
    "12l-p4-640-b16": Shape(64, 400, 8, 32, 32),
    "12x-p4-640-b16": Shape(64, 400, 12, 32, 32),
    "12x-p5-640-b16": Shape(16, 400, 12, 32, 32),
    "12l-p4-1280-b4": Shape(16, 1600, 8, 32, 32),
    "12n-p5-2048-b4": Shape(4, 4096, 4, 32, 32),
    "12x-p5-4096-b1": Shape(1, 16384, 12, 32, 32),
    "26n-640-b64": Shape(64, 400, 2, 32, 64),
    "26l-1280-b4": Shape(4, 1600, 4, 32, 64),
    "26n-2560-b4": Shape(4, 6400, 2, 32, 64),
    "one-group": Shape(1, 400, 2, 32, 32),
}
CPU_SHAPES = {"tiny-area": Shape(4, 100, 2, 32, 32), "tiny-psa": Shape(2, 100, 2, 32, 64)}
SHAPES = GPU_SHAPES | CPU_SHAPES


def mode_table(rows: list[Row], mode: str) -> str:
    """Times of one mode as a Markdown table, ready for docs/results.

    The fastest arm of a shape is in bold; the last column has the speed-up of ours over the best of the others.
    """
    mine = [row for row in rows if row["mode"] == mode]
    measured = [row for row in mine if row["us"] is not None]
    arms = list(dict.fromkeys(row["arm"] for row in measured))
    heads = ["shape (groups, tokens, heads, head dims)", *arms, *([f"speed-up of {OURS}"] if OURS in arms else [])]
    clock = "clock" if any(row["method"] == "clock" for row in measured) else "GPU"
    repeats = max((row["repeats"] for row in measured), default=0)
    lines = [f"{mode}, {clock} microseconds, median (low..high) of {repeats}; {_measured_on(rows)}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name in dict.fromkeys(row["shape"] for row in mine):
        us = {row["arm"]: row for row in measured if row["shape"] == name}
        best = min((row["us"] for row in us.values()), default=None)
        cells = [f"{name} ({', '.join(map(str, SHAPES[name]))})"]
        for arm in arms:
            text = f"{us[arm]['us']:.1f}" if arm in us else "-"
            text = f"**{text}**" if arm in us and us[arm]["us"] == best else text
            cells.append(f"{text} ({us[arm]['us_low']:.1f}..{us[arm]['us_high']:.1f})" if arm in us else text)
        if OURS in arms:
            others = [row["us"] for arm, row in us.items() if arm != OURS]
            cells.append(f"{min(others) / us[OURS]['us']:.2f}x" if OURS in us and others else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def error_notes(rows: list[Row]) -> str:
    """The largest error of each arm, and the notes of all rows, equal ones in one line."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        errors = [
            f"{what} {max(found):.1e}"
            for what, key in (("out", "error_out"), ("gradient", "error_grad"))
            if (found := [row[key] for row in rows if row["arm"] == arm and row[key] is not None])
        ]
        if errors:
            lines.append(f"- {arm}: largest relative error against float64: {', '.join(errors)}")
    told: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["note"]:
            told.setdefault((row["arm"], row["note"]), []).append(row)
    for (arm, note), mine in told.items():
        shapes, modes = ({row[key]: None for row in mine} for key in ("shape", "mode"))
        where = [", ".join(shapes)] if len(shapes) < len({row["shape"] for row in rows}) else []
        where += modes if len(modes) == 1 else []
        lines.append(f"- {arm}{' (' + '; '.join(where) + ')' if where else ''}: {note}")
    return "\n".join(lines)


def _measured_on(rows: list[Row]) -> str:
    """Device, dtype and versions, for the head of a table or plot."""
    versions = [f"{name} {rows[0][name]}" for name in ("torch", "triton", "cudnn", PEER, "yolo_flash") if rows[0][name]]
    return f"{rows[0]['dtype']}, {rows[0]['device']}; {', '.join(versions)}"


def draw_op(rows: list[Row]) -> bytes:
    """A PNG with a panel for each mode: speed of the arms on each shape, where 1 is the best arm that is not ours."""
    rows = [row for row in rows if row["us"] is not None]
    shapes, arms, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "arm", "mode"))
    figure = new_figure(max(8.0, 2 + 0.95 * len(shapes)), 1.8 + 3 * len(modes))
    panels = figure.subplots(len(modes), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.84 / len(arms)
    for panel, mode in zip(panels, modes, strict=True):
        us = {(row["shape"], row["arm"]): row["us"] for row in rows if row["mode"] == mode}
        for i, arm in enumerate(arms):
            speeds = {}
            for place, shape in enumerate(shapes):
                times = {other: us[shape, other] for other in arms if (shape, other) in us}
                if arm in times:
                    others = [time for other, time in times.items() if other != OURS]
                    speeds[place + (i - (len(arms) - 1) / 2) * width] = min(others or times.values()) / times[arm]
            color = COLORS.get(arm, "#009e73")
            bars = panel.bar(list(speeds), list(speeds.values()), width, label=arm, color=color, zorder=2)
            if arm == OURS:
                for text in panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=2):
                    text.set(zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.axhline(1, color="black", linewidth=0.8, zorder=3)
        panel.set_title(mode, loc="left", fontsize=11)
        panel.set_ylabel(f"speed (best arm{f' but {OURS}' if OURS in arms else ''} = 1)")
        panel.set_xlim(-0.6, len(shapes) - 0.4)
        panel.margins(y=0.12)
        panel.grid(axis="y", color="#dddddd", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(shapes)), shapes, rotation=30, ha="right", rotation_mode="anchor")
    figure.suptitle(f"Attention alone, {_measured_on(rows)}".replace("; ", "\n"), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), frameon=False)
    return as_png(figure)
