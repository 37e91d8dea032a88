"""Models as Ultralytics' command line opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics import RTDETR, YOLO


def open_model(model: str | Path) -> Any:
    """A checkpoint or YAML, as `RTDETR` if its name says so, else as `YOLO`, which knows no YAML of RT-DETR."""
    return RTDETR(model) if "rtdetr" in Path(model).stem.lower() else YOLO(model)
