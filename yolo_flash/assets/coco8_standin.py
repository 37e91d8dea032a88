"""A stand-in for the COCO8 data set that needs no download.

The `ultralytics` package ships two photographs, `bus.jpg` and `zidane.jpg`. `create_standin` cuts, scales and mirrors
them into four training and four validation pictures, and labels them with boxes that were measured by eye in the
photographs. The result shows that a training run works; eight pictures of two scenes say nothing about accuracy.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils import ASSETS, ROOT, YAML

TITLE = "# Stand-in for coco8: eight pictures made from two photographs, not the real coco8."
# The version marks a set on disk as up to date: raise it with every change to the boxes, the views or the encoding.
HEADER = f"{TITLE}\n# Written by yolo_flash.standin, version 1.\n"

# Class name and x1, y1, x2, y2 in pixels of the whole photograph, tight around what can be seen of the object.
PHOTO_BOXES: dict[str, list[tuple[str, int, int, int, int]]] = {
    # 810 x 1080. The bicycle and the flower pots on the balconies lie above every view; the driver behind the
    # windscreen, the phone in a hand and the reflections in the windows are too faint to be labelled.
    "bus.jpg": [
        ("bus", 2, 231, 804, 735),
        ("person", 52, 399, 245, 901),
        ("person", 225, 406, 344, 859),
        ("person", 670, 394, 810, 880),
        ("person", 0, 554, 78, 872),
    ],
    # 1280 x 720. The crowd in the background is blurred beyond recognition.
    "zidane.jpg": [
        ("person", 120, 202, 1153, 720),
        ("person", 750, 42, 1136, 720),
        ("tie", 435, 437, 526, 720),
        ("tie", 991, 314, 1045, 413),
    ],
}
MIN_VISIBLE = 0.4  # an object is labelled in a view that holds at least this share of its box's area


@dataclass(frozen=True)
class View:
    """One picture of the stand-in, cut out of a photograph."""

    name: str  # of the file, without its suffix
    split: str
    photo: str  # a key of `PHOTO_BOXES`
    crop: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the photograph
    width: int  # in pixels, at most that of the crop; the height keeps the crop's proportions
    flip: bool  # left to right


# A crop cuts an object only where the rest still reaches every side of its clipped box, so that the box stays tight.
VIEWS = (
    View("standin-1", "train", "bus.jpg", (0, 110, 810, 1080), 640, False),
    View("standin-2", "train", "bus.jpg", (0, 215, 600, 935), 480, True),
    View("standin-3", "train", "zidane.jpg", (0, 0, 1280, 720), 640, False),
    View("standin-4", "train", "zidane.jpg", (100, 180, 740, 720), 640, True),
    View("standin-5", "val", "bus.jpg", (246, 160, 810, 912), 480, False),
    View("standin-6", "val", "bus.jpg", (79, 200, 665, 920), 586, False),
    View("standin-7", "val", "zidane.jpg", (400, 0, 1280, 720), 640, False),
    View("standin-8", "val", "zidane.jpg", (60, 20, 1200, 720), 640, True),
)


def view_boxes(view: View) -> list[tuple[str, float, float, float, float]]:
    """The boxes of a photograph in one view of it.

    Returns:
        Class name, centre x, centre y, width and height of each box, in shares of the picture's width and height. Boxes
        are clipped to the view; a box with less than `MIN_VISIBLE` of its area inside is left out.
    """
    left, top, right, bottom = view.crop
    boxes = []
    for name, x1, y1, x2, y2 in PHOTO_BOXES[view.photo]:
        xa, xb = max(x1, left), min(x2, right)
        ya, yb = max(y1, top), min(y2, bottom)
        if max(xb - xa, 0) * max(yb - ya, 0) < MIN_VISIBLE * (x2 - x1) * (y2 - y1):
            continue
        x = ((xa + xb) / 2 - left) / (right - left)
        y = ((ya + yb) / 2 - top) / (bottom - top)
        boxes.append((name, 1 - x if view.flip else x, y, (xb - xa) / (right - left), (yb - ya) / (bottom - top)))
    return boxes


def create_standin(folder: Path) -> Path:
    """Write the stand-in data set, unless it is already there.

    The set is built beside `folder` and renamed into place: `folder` never holds half a set, even if two processes
    write one or a process is killed. An outdated or damaged stand-in is replaced.

    Args:
        folder: Root of the data set; it gets `images`, `labels` and `data.yaml`.

    Returns:
        Absolute path of `data.yaml`, ready to be passed to Ultralytics as `data`.

    Raises:
        FileNotFoundError: If a photograph is missing from the installed `ultralytics` package.
        FileExistsError: If `folder` holds files that are not part of a stand-in.
        OSError: If a photograph cannot be decoded or the set cannot be written.
    """
    folder = folder.resolve()
    if not _is_complete(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch, "new")
            _write(made, folder)
            _move_into_place(made, folder)
    return folder / "data.yaml"


def _files(folder: Path, view: View) -> tuple[Path, Path]:
    return folder / "images" / view.split / f"{view.name}.jpg", folder / "labels" / view.split / f"{view.name}.txt"


def _is_complete(folder: Path) -> bool:
    """Whether `folder` holds this version of the stand-in: all files, and its own path in the YAML."""
    data = folder / "data.yaml"
    return (
        all(file.is_file() for file in (data, *(file for view in VIEWS for file in _files(folder, view))))
        and data.read_text(encoding="utf-8").startswith(HEADER)
        and YAML.load(data).get("path") == str(folder)
    )


def _write(made: Path, folder: Path) -> None:
    """Write the data set into the new folder `made`, with `folder` as its path in the YAML."""
    names = YAML.load(ROOT / "cfg" / "datasets" / "coco8.yaml")["names"]
    classes = {name: number for number, name in names.items()}
    for view in VIEWS:
        image, labels = _files(made, view)
        for file in (image, labels):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(_encode(view))
        rows = (f"{classes[name]} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for name, x, y, w, h in view_boxes(view))
        labels.write_text("".join(rows), encoding="utf-8")
    data = {"path": str(folder), "train": "images/train", "val": "images/val", "names": names}
    YAML.save(made / "data.yaml", data, header=HEADER)


def _encode(view: View) -> bytes:
    photo = ASSETS / view.photo
    if not photo.is_file():
        raise FileNotFoundError(f"The stand-in data set needs {photo}, a photograph of the ultralytics package.")
    # Decoded and encoded in memory, since OpenCV cannot open every path on Windows.
    image = cv2.imdecode(np.frombuffer(photo.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError(f"{photo} is not a picture that OpenCV can read.")
    left, top, right, bottom = view.crop
    size = view.width, round(view.width * (bottom - top) / (right - left))
    image = cv2.resize(image[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.flip(image, 1) if view.flip else image)[1].tobytes()


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; an unusable stand-in in its place is moved beside `made` first."""
    if folder.exists() and not _is_complete(folder):
        foreign = [file for file in (folder, *folder.rglob("*")) if file.is_file() and not _is_ours(file)]
        if foreign:
            raise FileExistsError(f"The stand-in data set cannot replace {folder}, which holds {foreign[0]}.")
        with suppress(FileNotFoundError):  # another process has moved it
            folder.replace(made.with_name("old"))
    try:
        made.replace(folder)
    except OSError:
        if not _is_complete(folder):  # otherwise another process was faster
            raise


def _is_ours(file: Path) -> bool:
    """Whether a file belongs to a stand-in of any version, Ultralytics' label caches included."""
    if file.name == "data.yaml":
        return file.read_text(encoding="utf-8", errors="replace").startswith(TITLE)
    return file.name.startswith("standin-") or file.suffix == ".cache"
