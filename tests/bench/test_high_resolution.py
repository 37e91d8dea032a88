"""scripts/study_high_resolution.py: boxes of a grid lie where its images do, counts are right, a line is a line."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.modules.block import AAttn
from ultralytics.utils import YAML

from tests.counting import AttentionCalls
from tests.datasets import COLOURS, create_dataset
from yolo_flash import patch_model
from yolo_flash.bench.rounds import COLUMNS
from yolo_flash.cli import main
from yolo_flash.utils.files import as_csv

SCRIPT = Path(__file__).parents[2] / "scripts" / "study_high_resolution.py"
NAMES = {0: "red", 1: "blue", 2: "none"}


def load() -> Any:
    spec = importlib.util.spec_from_file_location("study_high_resolution", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


study = load()


def picture(file: Path) -> np.ndarray:
    pixels = cv2.imread(str(file))
    assert pixels is not None
    return pixels


def boxes(*rows: tuple[float, float, float, float, int]) -> Any:
    values = np.array(rows, float).reshape(-1, 5)
    return study.Boxes(values[:, :4], values[:, 4].astype(int), np.linspace(0.9, 0.5, len(values)))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Six pictures of 64 x 48 pixels with a red quadrilateral on the left and a blue one on the right."""
    file = create_dataset(tmp_path / "set", "detect", train=5, val=6)
    for image in (tmp_path / "set" / "images").glob("*/*.jpg"):
        pixels = cv2.resize(picture(image), (64, 48), interpolation=cv2.INTER_NEAREST)  # labels are shares
        cv2.imwrite(str(image.with_suffix(".png")), pixels)  # keeps every pixel
        image.unlink()
    return file


# Grids ----------------------------------------------------------------------------------------------------------------
def test_boxes_of_a_grid_surround_what_is_drawn(data: str) -> None:
    files = study.images_of(check_det_dataset(data), ["val"])
    pixels, truth = study.grid(files, 3)
    assert pixels.shape == (96, 192, 3)
    assert truth.count(NAMES) == [6, 6, 0]
    for number, file in enumerate(files):  # rows first
        y, x = number // 3 * 48, number % 3 * 64
        np.testing.assert_array_equal(pixels[y : y + 48, x : x + 64], picture(file))
    for (x1, y1, x2, y2), name in zip(truth.corners, truth.classes, strict=True):
        middle = pixels[int((y1 + y2) / 2), int((x1 + x2) / 2)].astype(int)
        assert abs(middle - COLOURS[name]).max() < 90, "colours run a little in JPEG"
        assert x1 // 64 == x2 // 64, "a box lies within its own picture"
        assert y1 // 48 == y2 // 48


def test_labels_become_pixels(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.25 0.5 0.5\n\n0 0.1 0.9 0.2 0.2\n")
    found = study.labels_of(tmp_path / "images" / "a.png", 48, 64)
    np.testing.assert_allclose(found.corners, [[16.0, 0.0, 48.0, 24.0], [0.0, 38.4, 12.8, 48.0]])
    assert found.classes.tolist() == [1, 0]
    assert study.labels_of(tmp_path / "images" / "none.png", 48, 64).corners.shape == (0, 4)


def test_boxes_are_shifted_row_by_row() -> None:
    tiles = [boxes((1, 2, 3, 4, n)) for n in (0, 1, 2)] + [boxes()]
    found = study.joined(tiles, 2, height=10, width=100)
    np.testing.assert_allclose(found.corners, [[1, 2, 3, 4], [101, 2, 103, 4], [1, 12, 3, 14]])
    assert found.classes.tolist() == [0, 1, 2]


def test_pictures_that_make_no_grid_are_refused(data: str, tmp_path: Path) -> None:
    files = study.images_of(check_det_dataset(data), ["val"])
    with pytest.raises(ValueError, match=r"6 images of the shapes .* make no grid of 4 columns"):
        study.grid(files, 4)
    cv2.imwrite(str(files[0]), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="make no grid of 3 columns"):
        study.grid(files, 3)


def test_a_data_set_of_grids_has_the_labels_of_its_pictures(data: str, tmp_path: Path) -> None:
    made = study.write_grids(data, tmp_path / "grids", columns=2, rows=2, images=3)
    known = check_det_dataset(str(made))
    files = study.images_of(known, ["train"])
    assert len(files) == 3
    assert len(study.images_of(known, ["val"])) == 1, "a second one would lack pictures"
    wanted = study.grid(study.images_of(check_det_dataset(data), ["val"])[:4], 2)[1]
    [val] = study.images_of(known, ["val"])
    found = study.labels_of(val, *picture(val).shape[:2])
    np.testing.assert_allclose(found.corners, wanted.corners, atol=1e-3)
    assert found.classes.tolist() == wanted.classes.tolist()
    assert len({file.read_bytes() for file in files}) == 3


# Counting -------------------------------------------------------------------------------------------------------------
def test_precision_and_recall_count_each_box_once() -> None:
    truth = boxes((0, 0, 10, 10, 0), (20, 0, 30, 10, 1), (40, 0, 50, 10, 2), (60, 0, 70, 10, 0))
    found = boxes((0, 0, 10, 9, 0), (0, 0, 10, 10, 0), (20, 0, 30, 10, 0), (44, 0, 60, 10, 2), (60, 1, 70, 10, 0))
    # the first, and the last; the second is there twice, the third of another class, the fourth too far off
    assert study.matched(found, truth, NAMES) == (2 / 5, 2 / 4)
    assert study.matched(truth, truth, NAMES) == (1, 1)
    assert study.matched(boxes(), truth, NAMES) == (0, 0)
    assert study.matched(found, boxes(), NAMES) == (0, 0)


def test_counts_are_right_within_the_tolerance_of_every_class() -> None:
    def some(red: int, blue: int) -> Any:
        return boxes(*[(0, 0, 1, 1, 0)] * red, *[(0, 0, 1, 1, 1)] * blue)

    told = study.verdict(some(40, 20), some(40, 21), NAMES)
    assert told.endswith("red 40 and 40 (+0.0%), blue 20 and 21 (+5.0%), none 0 and 0: right within 5% of each class")
    assert "blue 20 and 18 (-10.0%), none 0 and 0: NOT RIGHT" in study.verdict(some(40, 20), some(40, 18), NAMES)
    assert "blue 0 and 1, none 0 and 0: NOT RIGHT" in study.verdict(some(40, 0), some(40, 1), NAMES)
    assert "NOT RIGHT" in study.verdict(boxes(), boxes(), NAMES), "nothing was found"


@pytest.fixture
def trained(tiny_model: str, tmp_path: Path) -> str:
    """A checkpoint whose weights are fresh, but which finds a lot."""
    YAML.save(tmp_path / "two.yaml", YAML.load(tiny_model) | {"nc": 2})
    model: Any = YOLO(str(tmp_path / "two.yaml"))
    head = model.model.model[-1]
    with torch.no_grad():
        for branch in head.cv3:
            branch[-1].weight.normal_()
            branch[-1].bias.zero_()
    model.save(str(tmp_path / "trained.pt"))
    return str(tmp_path / "trained.pt")


def test_a_study_prints_every_arm_and_draws(
    data: str, trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.count(data, tmp_path, [trained], ["val:3x2"])
    told = capsys.readouterr().out
    assert "val: 6 images in 3 x 2 (0 left out), 192 x 96 pixels, 12 labelled objects" in told
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| ")]
    assert rows[2][:3] == ["labels", "6", "6"]
    assert [row[0].rsplit(", ", 2)[1:] for row in rows[3:]] == [
        *(["stock", "float32"], ["stock", "float32"], ["yolo-flash", "float32"]),
        *(["stock", "float16"], ["yolo-flash", "float16"]),
    ]
    one_by_one, stock, ours = rows[3:6]
    assert int(one_by_one[1]) + int(one_by_one[2]) > 6
    assert one_by_one[5] == "1.000", "what is found again of itself"
    assert stock[1:6] == ours[1:6]
    assert re.search(r"one by one, and the grid in one go: red \d+ and \d+", told)
    assert picture(tmp_path / study.PICTURE).shape == (96, 192, 3)


def test_one_that_runs_out_of_memory_is_a_row(
    data: str, trained: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    predicted = study.predicted

    def short(model: Any, images: Any, *rest: Any) -> Any:
        stock = not any(
            type(module).__name__ != "AAttn" for module in model.model.modules() if isinstance(module, AAttn)
        )
        if stock and len(images) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predicted(model, images, *rest)

    monkeypatch.setattr(study, "predicted", short)
    study.count(data, tmp_path, [trained], ["val:3x2"])
    told = capsys.readouterr().out
    assert told.count("| out of memory |") == 2
    assert "within 5%" in told


def test_the_picture_is_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2000, 3000, 3), np.uint8)
    study.draw(cv2.blur(noise, (9, 9)), boxes((0, 0, 1500, 1000, 0)), tmp_path / "picture.jpg")
    assert (tmp_path / "picture.jpg").stat().st_size <= study.BYTES
    drawn = picture(tmp_path / "picture.jpg").astype(int)
    assert drawn.shape == (1200, 1800, 3)
    assert drawn[600, 100:800, 2].mean() > drawn[300, 100:800, 2].mean() + 15, "the lower edge of the box is red"


# Memory ---------------------------------------------------------------------------------------------------------------
def row(imgsz: int, arm: str, gib: float | None, error: str | None = None) -> dict[str, Any]:
    figures = {"wall_ms": 2.0, "kernel_ms": 1.0, "peak_gib": gib} if error is None else {}
    job = {"command": "step", "model": "yolo12n.yaml", "batch": 1, "round": 1, "precision": "fp16", "device": "a card"}
    return dict.fromkeys(COLUMNS) | job | figures | {"imgsz": imgsz, "arm": arm, "error": error}


def test_memory_that_grows_with_tokens_is_told_from_memory_that_grows_with_their_square() -> None:
    sizes = (1024, 2048, 4096, 8192)
    linear = study.growth({size: 1 + study.tokens(size) * 2**-17 for size in sizes})  # 8 KiB a token
    assert "8.00 KiB a token and 1.00 GiB beside them, R² 1.00000, off by 0.0%" in linear[0]
    assert re.search(r"power 0\.\d\d there", linear[1])
    square = study.growth({size: study.tokens(size) ** 2 * 2**-27 for size in sizes})
    assert "power 2.00 there" in square[1]
    assert study.growth({640: 1.0, 1280: 2.0}) == ["2 sizes fit: no line through fewer than three"]


def test_the_table_is_made_of_what_the_benchmark_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (640, 1280, 2048)
    rows = [row(size, "triton_area", study.tokens(size) * 2**-12) for size in sizes]
    rows += [
        row(640, "unpatched", 4.0),
        *(row(size, "unpatched", None, "out of memory (79 GiB)") for size in sizes[1:]),
    ]
    (tmp_path / "step.csv").write_bytes(as_csv(COLUMNS, rows))
    monkeypatch.setattr(sys, "argv", ["study", "memory", "step.csv"])
    study.main()
    told = capsys.readouterr().out
    assert "step: yolo12n.yaml, batch 1, fp16; a card" in told
    assert "| 640 | 1,600 | 1.0 GPU ms, 0.39 GiB | 1.0 GPU ms, 4.00 GiB |" in told
    assert "| 2048 | 16,384 | 1.0 GPU ms, 4.00 GiB | out of memory (79 GiB) |" in told
    assert "- triton_area: 256.00 KiB a token" in told
    assert "- unpatched: 1 sizes fit" in told


# The setting ----------------------------------------------------------------------------------------------------------
def test_predicts_larger_than_it_was_trained_from_the_command_line(trained: str, data: str, tmp_path: Path) -> None:
    image = tmp_path / "large.png"
    cv2.imwrite(str(image), study.grid(study.images_of(check_det_dataset(data), ["val"]), 3)[0])
    typed = [
        "imgsz=768",
        "conf=0.01",
        "iou=1",
        "max_det=5000",
        "save_txt=True",
        "device=cpu",
        f"project={tmp_path / 'runs'}",
    ]
    found, fused = [], []
    for name, setting in (("ours", "flash.config=high_resolution"), ("stock", "flash.enabled=false")):
        with AttentionCalls() as calls:
            main.main(["predict", f"model={trained}", f"source={image}", f"name={name}", *typed, setting])
        fused.append(sum(calls.forward.values()))
        found.append((tmp_path / "runs" / name / "labels" / "large.txt").read_text().splitlines())
    assert len(found[0]) == len(found[1]) > 300, "more than Ultralytics keeps by default"
    assert fused[0] > 0
    assert fused[1] == 0


def test_trains_from_python(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO(tiny_model), config="high_resolution")
    with AttentionCalls() as calls:
        model.train(**tiny_args | {"imgsz": 384, "batch": 1, "mosaic": 0.0, "fraction": 0.5})
    assert calls.backward["sdpa_flash"] > 0
    trainer: Any = model.trainer
    assert trainer.flash_run.graphs.why_not == "flash.graphs=off"


def test_trains_at_a_size_of_its_own_from_the_command_line(
    tiny_model: str, tiny_args: dict[str, Any], data: str, tmp_path: Path, log: list[str]
) -> None:
    made = study.write_grids(data, tmp_path / "grids", columns=3, rows=1, images=2)
    arguments = tiny_args | {"data": made, "imgsz": 192, "batch": 1, "mosaic": 0.0, "rect": False}
    typed = [f"{key}={value}" for key, value in arguments.items()]
    main.main(["train", f"model={tiny_model}", *typed, "flash.config=high_resolution"])
    assert (tmp_path / "runs" / "train" / "weights" / "best.pt").is_file()
    told = "\n".join(log)
    assert re.search(r"train .* 576 ", told), "one of 4 groups of 48 x 48 tokens each"
