"""Models by name, opened as Ultralytics' command line does."""

from __future__ import annotations

from pathlib import Path

from ultralytics import RTDETR, YOLO


def open_model(model: str | Path) -> RTDETR | YOLO:
    """Open a checkpoint or YAML: as `RTDETR` if its name says so, since `YOLO` knows no YAML of RT-DETR."""
    return RTDETR(model) if "rtdetr" in Path(model).stem.lower() else YOLO(model)
