"""Tiny data sets of every task in Ultralytics' own formats: coloured quadrilaterals on noise, labelled exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ultralytics.data.utils import save_depth_png
from ultralytics.utils import YAML

NAMES = {0: "red", 1: "blue"}
COLOURS = ((0, 0, 255), (255, 0, 0))  # BGR
FLIP = [1, 0, 3, 2]  # corners after a picture is mirrored

SETTINGS: dict[str, dict[str, Any]] = {
    "semantic": {"masks_dir": "masks"},
    "pose": {"kpt_shape": [4, 3], "flip_idx": FLIP},
    "depth": {"names": {0: "depth"}, "depth_scale": 1000},
}


def create_dataset(folder: Path, task: str, side: int = 64, train: int = 4, val: int = 2, classes: int = 2) -> str:
    """Write a data set.

    Args:
        folder: A new folder for it.
        task: `detect`, `segment`, `semantic`, `pose`, `obb`, `depth` or `classify`.
        side: Height and width of the pictures in pixels.
        train: Number of pictures to train on.
        val: Number of pictures to validate on.
        classes: Number of names, of which the pictures show two.

    Returns:
        What Ultralytics takes as `data`: the path of `data.yaml`, or the folder for `classify`.
    """
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            image = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
            corners = [_quadrilateral(random, left, side) for left in (0.0, 0.5)]
            if task == "classify":
                cls = number % 2
                _fill(image, corners[0], COLOURS[cls])
                _write(folder / split / NAMES[cls] / f"{number}.jpg", image)
                continue
            for cls, quad in enumerate(corners):
                _fill(image, quad, COLOURS[cls])
            _write(folder / "images" / split / f"{number}.jpg", image)
            _write_target(folder, task, f"{split}/{number}", corners, side)
    if task == "classify":
        return str(folder)
    data = {
        "path": str(folder),
        "train": "images/train",
        "val": "images/val",
        "names": NAMES | {number: f"colour {number}" for number in range(2, classes)},
        **SETTINGS.get(task, {}),
    }
    YAML.save(folder / "data.yaml", data)
    return str(folder / "data.yaml")


def _quadrilateral(random: np.random.Generator, left: float, side: int) -> np.ndarray:
    """Four corners, clockwise from the top left, of a turned rectangle in one half of the picture, in shares of it."""
    centre = np.array([left + 0.25, 0.5]) + random.uniform(-0.05, 0.05, 2)
    half, angle = random.uniform([0.12, 0.2], [0.16, 0.3]), random.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.clip(centre + (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half) @ turn, 0, 1)


def _fill(image: np.ndarray, quad: np.ndarray, value: int | tuple[int, int, int]) -> None:
    """Draw a quadrilateral."""
    cv2.fillPoly(image, [np.rint(quad * image.shape[0]).astype(np.int32)], value)


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def _write_target(folder: Path, task: str, name: str, corners: list[np.ndarray], side: int) -> None:
    """Write what belongs to one picture: rows of text, a mask of class numbers, or a map of metres."""
    if task == "semantic":
        mask = np.full((side, side), 255, np.uint8)  # 255: not judged
        for cls, quad in enumerate(corners):
            _fill(mask, quad, cls)
        _write(folder / "masks" / f"{name}.png", mask)
    elif task == "depth":
        metres = np.linspace(1, 5, side * side, dtype=np.float32).reshape(side, side)
        path = folder / "depth" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_depth_png(path, metres)
    else:
        path = folder / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{cls} {_row(task, quad)}\n" for cls, quad in enumerate(corners)))


def _row(task: str, quad: np.ndarray) -> str:
    """The numbers behind the class: a box, with its corners as visible keypoints for pose, or a polygon."""
    if task in ("segment", "obb"):
        numbers = quad.ravel()
    else:
        low, high = quad.min(0), quad.max(0)
        box = np.concatenate([(low + high) / 2, high - low])
        points = np.column_stack([quad, np.full(4, 2)])  # 2: visible
        numbers = np.concatenate([box, points.ravel()]) if task == "pose" else box
    return " ".join(f"{number:.6f}" for number in numbers)
