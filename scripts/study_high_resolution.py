"""Large images: memory against tokens, data sets of large images, and cells counted on one: docs/high-resolution.md.

    python scripts/study_high_resolution.py memory step.csv [more.csv ...]
    python scripts/study_high_resolution.py grids data.yaml folder columns rows images
    python scripts/study_high_resolution.py count data.yaml folder weights.pt [more.pt ...] grid=test:9x8 [grid=...]

`memory` reads what `yolo-flash bench step` and `bench predict` wrote: a table of every size and arm, and how the peaks
grow with the tokens of the finer stage of attention, of which there is one for 16 x 16 pixels.

`grids` writes a data set of large images: those of another one side by side at native resolution, columns x rows of
them. For training there are `images` of them, each of other images in another order; for validation, as many as one
pass over its images fills.

`count` lays the images of splits (`test`, `val+test`) side by side, each of them once. Stock Ultralytics predicts each
by itself; then stock and the plugin predict the grid in one go at native resolution, in float32 and in float16. A row
has the boxes of each class, precision and recall against the labels, the share of the first row's boxes that are found
again, seconds of a second call, and the peak of memory. Boxes match above an IoU of 0.5, by Ultralytics'
ConfusionMatrix. The folder gets `high-resolution-bccd.jpg`: the last grid with the boxes of the plugin in float32.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset, img2label_paths
from ultralytics.utils import YAML
from ultralytics.utils.metrics import ConfusionMatrix

from yolo_flash import patch_model
from yolo_flash.bench.rounds import NUMBERS
from yolo_flash.utils.files import Row, from_csv

STRIDE = 16  # of the finer stage of attention in YOLO12
IOU, CONF = 0.5, 0.25  # boxes match from IOU on; CONF is Ultralytics' own threshold of a prediction
MAX_DET = 20_000  # Ultralytics keeps 300 boxes of an image unless it is told otherwise
TOLERANCE = 0.05  # of the boxes of a class, between a grid in one go and its images one by one
PICTURE = "high-resolution-bccd.jpg"
WIDTH, BYTES = 1800, 400_000  # of that picture: pixels, and what its file may take
COLOURS = ((60, 60, 230), (230, 120, 20), (40, 170, 40))  # BGR, a class each


# Memory against tokens ------------------------------------------------------------------------------------------------
def memory(rows: list[Row]) -> str:
    """Markdown: time and memory of every size and arm, and the line through the peaks of each arm."""
    text = []
    for command in dict.fromkeys(row["command"] for row in rows):
        mine = [row for row in rows if row["command"] == command]
        arms = list(dict.fromkeys(row["arm"] for row in mine))
        text += [
            f"{command}: {mine[0]['model']}, batch {mine[0]['batch']}, {mine[0]['precision']}; {mine[0]['device']}",
            "",
            f"| image size | tokens | {' | '.join(arms)} |",
            f"| --- | --- |{' --- |' * len(arms)}",
        ]
        for size in sorted({row["imgsz"] for row in mine}):
            at_size = {arm: [row for row in mine if row["imgsz"] == size and row["arm"] == arm] for arm in arms}
            text.append(f"| {size} | {tokens(size):,} | {' | '.join(_cell(found) for found in at_size.values())} |")
        text.append("")
        for arm in arms:
            peaks = {
                size: statistics.median(found)
                for size in sorted({row["imgsz"] for row in mine})
                if (
                    found := [
                        row["peak_gib"] for row in mine if (row["imgsz"], row["arm"]) == (size, arm) and fits(row)
                    ]
                )
            }
            text += [f"- {arm}: {line}" for line in growth(peaks)]
        text.append("")
    return "\n".join(text).rstrip()


def tokens(size: int) -> int:
    """Tokens of the finer stage of attention in a square image."""
    return math.ceil(size / STRIDE) ** 2


def fits(row: Row) -> bool:
    """Whether a sample was measured, and its memory with it: a CPU's is not."""
    return not row["error"] and row["peak_gib"] is not None


def growth(peaks: dict[int, float]) -> list[str]:
    """How memory grows with the tokens: a line of least squares, and the exponent between the two largest sizes.

    Args:
        peaks: Size of the image -> GiB.
    """
    if len(peaks) < 3:
        return [f"{len(peaks)} sizes fit: no line through fewer than three"]
    x, y = np.array([tokens(size) for size in peaks], float), np.array([*peaks.values()]) * 2**20  # KiB
    slope, start = np.polyfit(x, y, 1)
    left = y - (start + slope * x)
    explained = 1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()
    (a, b), sizes = y[-2:] / x[-2:], list(peaks)[-2:]
    exponent = math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])
    return [
        f"{slope:.2f} KiB a token and {start / 2**20:.2f} GiB beside them, R² {explained:.5f}, off by "
        f"{abs(left / y)[-3:].max():.1%} at most at the three largest sizes",
        f"{a:.2f} KiB a token at {sizes[0]}, {b:.2f} at {sizes[1]}: grows as tokens to the power {exponent:.2f} there",
    ]


def _cell(rows: list[Row]) -> str:
    if error := next((row["error"] for row in rows if row["error"]), "" if rows else "not measured"):
        return str(error)
    name, unit = ("kernel_ms", "GPU ms") if rows[0]["kernel_ms"] is not None else ("wall_ms", "ms")
    text = f"{statistics.median(row[name] for row in rows):,.1f} {unit}"
    return f"{text}, {statistics.median(row['peak_gib'] for row in rows):.2f} GiB" if all(map(fits, rows)) else text


# Grids ----------------------------------------------------------------------------------------------------------------
class Boxes(NamedTuple):
    """Boxes of one image: corners x1 y1 x2 y2 in pixels (n, 4), classes (n,), confidences (n,)."""

    corners: np.ndarray
    classes: np.ndarray
    conf: np.ndarray

    def count(self, names: Iterable[int]) -> list[int]:
        """How many there are of each class."""
        return [int((self.classes == name).sum()) for name in names]


def images_of(data: dict[str, Any], splits: Iterable[str]) -> list[Path]:
    """The images of splits of a data set, which lie in one folder each, in the order of their names."""
    return [file for split in splits for file in sorted(Path(data[split]).iterdir()) if file.suffix in (".jpg", ".png")]


def labels_of(image: Path, height: int, width: int) -> Boxes:
    """The boxes in the label file of an image, in its pixels."""
    file = Path(img2label_paths([str(image)])[0])
    rows = [line.split() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []
    values = np.array(rows, float).reshape(-1, 5)
    centre, half = values[:, 1:3], values[:, 3:] / 2
    corners = np.hstack([centre - half, centre + half]) * [width, height, width, height]
    return Boxes(corners, values[:, 0].astype(int), np.ones(len(values)))


def joined(tiles: Sequence[Boxes], columns: int, height: int, width: int) -> Boxes:
    """The boxes of tiles of one size in the pixels of their grid, which is filled row by row."""
    shifts = [np.tile([i % columns * width, i // columns * height], 2) for i in range(len(tiles))]
    corners = [tile.corners + shift for tile, shift in zip(tiles, shifts, strict=True)]
    return Boxes(np.vstack(corners), *(np.hstack([tile[k] for tile in tiles]) for k in (1, 2)))


def grid(files: Sequence[Path], columns: int) -> tuple[np.ndarray, Boxes]:
    """Images of one size side by side, not resized, row by row: pixels (height, width, 3) in BGR, and the labels.

    Raises:
        ValueError: The images have several sizes, or leave a row unfinished.
    """
    tiles = [cv2.imread(str(file)) for file in files]
    if len(shapes := {tile.shape for tile in tiles}) != 1 or len(tiles) % columns:
        raise ValueError(f"{len(tiles)} images of the shapes {shapes} make no grid of {columns} columns.")
    height, width, _ = tiles[0].shape
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return np.vstack(rows), joined([labels_of(file, height, width) for file in files], columns, height, width)


def write_grids(data: str, folder: Path, columns: int, rows: int, images: int) -> Path:
    """Write a data set of grids; its data.yaml."""
    known, cells = check_det_dataset(data), columns * rows
    train, val = images_of(known, ["train"]), images_of(known, ["val"])
    order = random.Random(0)
    found = {
        "train": [order.sample(train, cells) for _ in range(images)],
        "val": [val[i : i + cells] for i in range(0, len(val) - cells + 1, cells)],
    }
    for split, grids in found.items():
        for number, files in enumerate(grids):
            pixels, boxes = grid(files, columns)
            size = np.array([pixels.shape[1], pixels.shape[0]])
            centre, sides = (
                (boxes.corners[:, :2] + boxes.corners[:, 2:]) / 2,
                boxes.corners[:, 2:] - boxes.corners[:, :2],
            )
            table = np.hstack([boxes.classes[:, None], centre / size, sides / size])
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / "images" / split / f"{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
            np.savetxt(folder / "labels" / split / f"{number}.txt", table, fmt=["%d", *["%.8f"] * 4])
        print(f"{split}: {len(grids)} images of {columns * rows} cells", flush=True)
    names = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": known["names"]}
    YAML.save(folder / "data.yaml", names)
    return folder / "data.yaml"


# Counting -------------------------------------------------------------------------------------------------------------
def matched(found: Boxes, truth: Boxes, names: dict[int, str]) -> tuple[float, float]:
    """Precision and recall of boxes over all classes: every box is matched once, and right if its class is."""
    matrix = ConfusionMatrix(names=names)
    corners, classes, conf = (torch.as_tensor(part) for part in found)
    detections = {"bboxes": corners.float(), "cls": classes, "conf": conf.float()}
    labels = {"bboxes": torch.as_tensor(truth.corners).float(), "cls": torch.as_tensor(truth.classes)}
    matrix.process_batch(detections, labels, conf=0.0, iou_thres=IOU)
    right = float(np.trace(matrix.matrix[: matrix.nc, : matrix.nc]))
    return right / max(1, len(classes)), right / max(1, len(truth.classes))


class Answer(NamedTuple):
    """What a model finds, seconds of the call that was timed, and the peak of memory; None on a CPU."""

    boxes: Boxes
    seconds: float
    gib: float | None


def predicted(model: Any, images: list[np.ndarray], columns: int, fp16: bool) -> Answer:
    """The boxes of images, each predicted by itself at its own size, in the pixels of their grid."""
    on_gpu = torch.cuda.is_available()
    height, width, _ = images[0].shape
    settings: dict[str, Any] = {"imgsz": max(height, width), "rect": True, "conf": CONF, "max_det": MAX_DET}
    settings |= {"quantize": 16 if fp16 else 32, "device": 0 if on_gpu else "cpu", "verbose": False}
    model.predict(images[0], **settings)  # loads, and compiles
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    results = [model.predict(image, **settings)[0].boxes.cpu().numpy() for image in images]
    seconds = time.perf_counter() - begin
    tiles = [Boxes(result.xyxy.astype(float), result.cls.astype(int), result.conf) for result in results]
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Answer(joined(tiles, columns, height, width), seconds, gib)


def count(data: str, folder: Path, weights: Sequence[str], grids: Sequence[str]) -> None:
    """Print a table for each grid and checkpoint, and draw the last grid."""
    known = check_det_dataset(data)
    names: dict[int, str] = known["names"]
    for wanted in grids:
        splits, _, sides = wanted.partition(":")
        columns, rows = map(int, sides.split("x"))
        files = images_of(known, splits.split("+"))
        left_out = len(files) - columns * rows
        files = files[: columns * rows]
        pixels, truth = grid(files, columns)
        tiles = [cv2.imread(str(file)) for file in files]
        print(
            f"{splits}: {len(files)} images in {columns} x {rows} ({left_out} left out), {pixels.shape[1]} x "
            f"{pixels.shape[0]} pixels, {len(truth.classes)} labelled objects\n",
            flush=True,
        )
        for checkpoint in weights:
            answer = count_grid(checkpoint, tiles, pixels, truth, columns, names)
            if answer is not None:
                draw(pixels, answer.boxes, folder / PICTURE)


def count_grid(
    checkpoint: str, tiles: list[np.ndarray], pixels: np.ndarray, truth: Boxes, columns: int, names: dict[int, str]
) -> Answer | None:
    """Print the table of one checkpoint on one grid, a row as soon as it is there; the plugin's answer in float32."""
    whole = "the grid in one go"
    head = f"| {checkpoint} | {' | '.join(names.values())} | precision | recall | found again | s | peak GiB |"
    print(f"{head}\n| --- |{' --- |' * (len(names) + 5)}", flush=True)
    print(f"| labels | {' | '.join(map(str, truth.count(names)))} | | | | | |", flush=True)
    first, ours = None, None
    arms = [
        ("one by one, stock, float32", tiles, False, False),
        (f"{whole}, stock, float32", [pixels], False, False),
        (f"{whole}, yolo-flash, float32", [pixels], True, False),
        (f"{whole}, stock, float16", [pixels], False, True),
        (f"{whole}, yolo-flash, float16", [pixels], True, True),
    ]
    for name, images, plugin, fp16 in arms:
        model: Any = YOLO(checkpoint)
        if plugin:
            patch_model(model, config="high_resolution", log=False)
        try:
            answer = predicted(model, images, columns if len(images) > 1 else 1, fp16)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory |{' |' * (len(names) + 4)}", flush=True)
            continue
        finally:
            del model
            torch.cuda.empty_cache()
        first = first or answer
        ours = answer if plugin and not fp16 else ours
        shares = [*matched(answer.boxes, truth, names), matched(answer.boxes, first.boxes, names)[1]]
        cells = [*answer.boxes.count(names), *(f"{share:.3f}" for share in shares), f"{answer.seconds:.2f}"]
        cells.append("-" if answer.gib is None else f"{answer.gib:.2f}")
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    if first is not None and ours is not None:
        print("\n" + verdict(first.boxes, ours.boxes, names) + "\n", flush=True)
    return ours


def verdict(tiles: Boxes, whole: Boxes, names: dict[int, str]) -> str:
    """Whether a grid in one go has as many boxes of each class as its images one by one; not if those have none."""
    pairs = list(zip(names.values(), tiles.count(names), whole.count(names), strict=True))
    right = any(a for _, a, _ in pairs) and all(abs(b - a) <= TOLERANCE * a for _, a, b in pairs)
    told = ", ".join(f"{name} {a} and {b}" + (f" ({b / a - 1:+.1%})" if a else "") for name, a, b in pairs)
    state = "right" if right else "NOT RIGHT"
    return f"one by one, and the grid in one go: {told}: {state} within {TOLERANCE:.0%} of each class"


def draw(pixels: np.ndarray, boxes: Boxes, file: Path) -> None:
    """Write the image with its boxes as a small JPEG."""
    share = min(1.0, WIDTH / pixels.shape[1])
    small = cv2.resize(pixels, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
    for (x1, y1, x2, y2), name in zip((boxes.corners * share).round().astype(int).tolist(), boxes.classes, strict=True):
        cv2.rectangle(small, (x1, y1), (x2, y2), COLOURS[int(name) % len(COLOURS)], 1)
    for quality in range(90, 20, -10):
        done, content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if done and len(content) <= BYTES:
            break
    file.write_bytes(content.tobytes())
    print(
        f"{file.name}: {small.shape[1]} x {small.shape[0]}, quality {quality}, {len(content) / 1e3:.0f} kB\n",
        flush=True,
    )


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "memory":
        rows = [row for file in words for row in from_csv(Path(file).read_text(), NUMBERS)]
        print(memory(rows))
    elif command == "grids":
        data, folder, *numbers = words
        print(write_grids(data, Path(folder), *map(int, numbers)))
    else:
        data, folder, *rest = words
        grids = [word.removeprefix("grid=") for word in rest if word.startswith("grid=")]
        count(data, Path(folder), [word for word in rest if not word.startswith("grid=")], grids)


if __name__ == "__main__":
    main()
