"""The stand-in for coco8 is a data set as Ultralytics wants it, the same on every machine, and needs no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.data import YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import ASSETS, YAML

from yolo_flash.assets import coco8_standin
from yolo_flash.assets.coco8_standin import PHOTO_BOXES, VIEWS, create_standin, view_boxes


def files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder by their relative path."""
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, but those of the YAML, which names the folder."""
    return {name: file.read_bytes() for name, file in files(folder).items() if name != "data.yaml"}


def decode(picture: bytes) -> np.ndarray:
    """Return a picture of shape (height, width, 3)."""
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a fresh stand-in, with a space in its name."""
    return create_standin(tmp_path / "stand in").parent


def test_photographs_have_the_size_in_which_the_boxes_were_measured() -> None:
    assert decode((ASSETS / "bus.jpg").read_bytes()).shape == (1080, 810, 3)
    assert decode((ASSETS / "zidane.jpg").read_bytes()).shape == (720, 1280, 3)


def test_four_pictures_in_each_split_with_boxes_inside(folder: Path) -> None:
    assert len(files(folder)) == 17
    assert list(folder.parent.iterdir()) == [folder]  # no scratch is left beside it
    for split in ("train", "val"):
        views = [view for view in VIEWS if view.split == split]
        assert len(views) == 4
        assert {view.photo for view in views} == set(PHOTO_BOXES)
        assert len(files(folder / "images" / split)) == 4
        for view in views:
            image = decode((folder / "images" / split / f"{view.name}.jpg").read_bytes())
            left, top, right, bottom = view.crop
            assert image.shape[1] == view.width <= right - left
            assert image.shape[0] == round(view.width * (bottom - top) / (right - left))
            boxes = np.loadtxt(folder / "labels" / split / f"{view.name}.txt", ndmin=2)[:, 1:]
            assert len(boxes)
            assert boxes[:, 2:].min() > 0
            assert (boxes[:, :2] - boxes[:, 2:] / 2).min() >= -1e-6
            assert (boxes[:, :2] + boxes[:, 2:] / 2).max() <= 1 + 1e-6


def test_only_objects_outside_a_view_are_left_out() -> None:
    for view in VIEWS:
        left, top, right, bottom = view.crop
        seen = [b for b in PHOTO_BOXES[view.photo] if b[1] < right and b[3] > left and b[2] < bottom and b[4] > top]
        assert [box[0] for box in view_boxes(view)] == [box[0] for box in seen]


def test_box_is_clipped_and_dropped_below_the_visible_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PHOTO_BOXES, "bus.jpg", [("bus", 60, 0, 160, 50), ("person", 61, 0, 161, 50)])
    assert view_boxes(replace(VIEWS[0], photo="bus.jpg", crop=(0, 0, 100, 100), flip=False)) == [
        ("bus", 0.8, 0.25, 0.4, 0.5)
    ]


def test_flipped_view_mirrors_the_boxes_and_the_picture() -> None:
    for view in VIEWS:
        plain, flipped = (replace(view, flip=flip) for flip in (False, True))
        assert view_boxes(flipped) == [(name, 1 - x, y, w, h) for name, x, y, w, h in view_boxes(plain)]
    a, b = (decode(coco8_standin._encode(v)) for v in (plain, flipped))
    assert np.abs(a.astype(int) - b[:, ::-1]).mean() < 5  # equal but for the losses of JPEG


def test_same_bytes_every_time_and_no_picture_twice(folder: Path, tmp_path: Path) -> None:
    other = create_standin(tmp_path / "other").parent
    assert contents(folder) == contents(other)
    assert len({content for name, content in contents(folder).items() if name.endswith(".jpg")}) == 8


def test_complete_set_is_left_alone(folder: Path) -> None:
    before = {name: file.stat().st_mtime_ns for name, file in files(folder).items()}
    assert create_standin(folder) == folder / "data.yaml"
    assert {name: file.stat().st_mtime_ns for name, file in files(folder).items()} == before


@pytest.mark.parametrize("damage", ["picture missing", "yaml missing", "older version", "moved"])
def test_unusable_set_is_replaced(folder: Path, damage: str) -> None:
    whole = contents(folder)
    data = folder / "data.yaml"
    if damage == "picture missing":
        (folder / "images" / "val" / f"{VIEWS[-1].name}.jpg").unlink()
    elif damage == "yaml missing":
        data.unlink()
    elif damage == "older version":
        data.write_text(data.read_text().replace(coco8_standin.HEADER, f"{coco8_standin.TITLE}\n# version 0\n"))
        (folder / "images" / "val" / "standin-99.jpg").touch()
    else:
        folder = folder.rename(folder.with_name("moved"))
    (folder / "labels" / "train.cache").touch()  # left by an earlier training run
    create_standin(folder)
    assert contents(folder) == whole
    assert YAML.load(folder / "data.yaml")["path"] == str(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_files_of_others_are_never_replaced(folder: Path) -> None:
    (folder / "data.yaml").write_text("path: mine\n")
    with pytest.raises(FileExistsError, match=r"data\.yaml"):
        create_standin(folder)
    assert (folder / "data.yaml").read_text() == "path: mine\n"


def test_finished_set_of_a_faster_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, folder = coco8_standin._write, tmp_path / "set"

    def write_twice(made: Path, path: Path) -> None:
        write(made, path)
        write(path, path)  # what another process has finished in the meantime
        (path / "labels" / "train.cache").touch()

    monkeypatch.setattr(coco8_standin, "_write", write_twice)
    create_standin(folder)
    assert (folder / "labels" / "train.cache").exists()


def test_missing_photograph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco8_standin, "ASSETS", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"bus\.jpg"):
        create_standin(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_unreadable_photograph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco8_standin, "ASSETS", tmp_path)
    (tmp_path / "bus.jpg").write_text("not a picture")
    with pytest.raises(OSError, match=r"bus\.jpg"):
        create_standin(tmp_path / "set")


def test_ultralytics_loads_it(folder: Path) -> None:
    data = check_det_dataset(folder / "data.yaml", autodownload=False)
    assert len(data["names"]) == data["nc"] == 80
    for split in ("train", "val"):
        dataset = YOLODataset(img_path=data[split], data=data, augment=False)
        cache = dataset.cache_labels(folder / "labels" / f"{split}.cache")
        assert cache["results"] == (4, 0, 0, 0, 4)  # found, missing, empty, corrupt, total
        numbers = {int(number) for label in dataset.labels for number in label["cls"].ravel()}
        assert {data["names"][number] for number in numbers} == {"person", "bus", "tie"}
