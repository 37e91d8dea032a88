"""Draw docs/at-a-glance.png from files in docs/results. Usage: python scripts/draw_at_a_glance.py"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from yolo_flash.bench.rounds import COLUMNS, NUMBERS
from yolo_flash.bench.run import RunJob
from yolo_flash.utils.files import Row, from_csv
from yolo_flash.utils.plotting import COLORS, as_png, new_figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
STOCK, OURS = "#a0a0a0", COLORS["triton_area"]
GREY = "#dddddd"


def rows_of(name: str) -> list[Row]:
    """The samples of a file in docs/results."""
    text = (DOCS / "results" / name).read_text(encoding="utf-8")
    return from_csv(text, (*NUMBERS, *RunJob.more_numbers))


def median(rows: list[Row], arm: str, figure: str) -> float:
    """Of the samples of an arm."""
    return statistics.median(row[figure] for row in rows if row["arm"] == arm)
