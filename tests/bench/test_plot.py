"""`yolo-flash bench plot`: the pictures come from CSV files alone, tell what was lost, and nothing covers anything."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bench.test_op import made_up_rows
from yolo_flash.bench import op_table, pictures
from yolo_flash.bench.pictures import (
    TECHNIQUES,
    draw_predict,
    draw_run_waterfall,
    draw_runs,
    draw_sizes,
    draw_train,
    draw_waterfall,
)
from yolo_flash.bench.plot import PlotJob, bench_plot
from yolo_flash.bench.rounds import COLUMNS, NUMBERS, VERSIONS
from yolo_flash.bench.run import RunJob
from yolo_flash.bench.train import TrainJob
from yolo_flash.cli import main
from yolo_flash.utils.files import as_csv, from_csv

LOST = "out of memory (79 GiB)"
TRAIN_COLUMNS = (*COLUMNS, *TrainJob.more_columns)
STEPS = {  # GPU ms and GiB at 640, 1280, 2048 and 4096 pixels
    "auto": ((4.9, 13.7, 32.9, 60.9), (0.7, 2.4, 6.0, 22.6)),
    "triton_area": ((4.9, 13.7, 32.9, 60.9), (0.7, 2.4, 6.0, 22.6)),
    "sdpa_flash": ((5.5, 15.0, 35.5, 70.0), (0.7, 2.4, 6.0, 23.0)),
    "unpatched": ((8.0, 34.0, 140.0), (0.8, 5.5, 24.3)),
    "nchw": ((9.0, 38.0, 170.0), (0.9, 6.0, 25.3)),
}


def made_up(command: str = "step", on_gpu: bool = True) -> list[dict[str, Any]]:
    """What an H100 might give, two rounds of it."""
    rows = []
    for i, imgsz in enumerate((640, 1280, 2048, 4096)):
        for number in (1, 2):
            for arm, (times, memory) in STEPS.items():
                row = dict.fromkeys(COLUMNS) | {"command": command, "model": "yolo12n.yaml", "imgsz": imgsz, "batch": 4}
                row |= {"arm": arm, "precision": "fp16", "round": number, "device": "a card", "torch": "2.10"}
                if i < len(times):
                    wall = round(times[i] + 10 * number, 2)
                    row |= {"kernel_ms": times[i] if on_gpu else None, "wall_ms": wall, "peak_gib": memory[i]}
                    row["images_per_second"] = round(4e3 / wall, 2)
                else:
                    row["error"] = LOST
                rows.append(row)
    return rows


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures instead of their PNG."""
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "as_png", drawn.append)
    return drawn


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def covered(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, or texts that leave the picture, with themselves."""
    figure.canvas.draw()
    found = [figure._suptitle]
    for axis in figure.axes:
        found += [axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side, (low, high) in ((axis.xaxis, sorted(axis.get_xlim())), (axis.yaxis, sorted(axis.get_ylim()))):
            found += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]
    outside = [(text, text) for text, box in boxes if not figure.bbox.contains(*box.min) or box.x1 > figure.bbox.x1]
    return outside + [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


# Pictures -------------------------------------------------------------------------------------------------------------
def test_time_and_memory_against_the_size_with_what_was_lost(figures: list[Any]) -> None:
    draw_sizes(made_up())
    (figure,) = figures
    time, memory = figure.axes
    assert (time.get_ylabel(), memory.get_ylabel()) == ("training step, GPU ms", "peak memory, GiB")
    lines = {line.get_label(): line for line in time.lines}
    assert list(lines["unpatched"].get_ydata()) == [8.0, 34.0, 140.0]
    assert list(lines["triton_area"].get_xdata()) == [640, 1280, 2048, 4096]
    for axis in figure.axes:
        assert texts(axis) == ["nchw: out of memory", "unpatched: out of memory"]
        crosses = [line for line in axis.lines if line.get_marker() == "x"]
        assert [line.get_xdata()[0] for line in crosses] == [4096, 4096]
        to_panel = axis.transData - axis.transAxes
        points = [y for line in axis.lines if line not in crosses for _, y in to_panel.transform(line.get_xydata())]
        assert max(points) < min(line.get_ydata()[0] for line in crosses) - 0.03
    assert covered(figure) == []


def test_many_sizes_and_losses_do_not_cover_each_other(figures: list[Any]) -> None:
    rows = []
    for i, imgsz in enumerate((320, 640, 960, 1280, 2048, 2560, 4096)):
        for arm, fits in (("nchw", 2), ("unpatched", 3), ("sdpa_efficient", 5), ("auto", 7)):
            row = made_up()[0] | {"imgsz": imgsz, "arm": arm, "kernel_ms": 2.0**i, "peak_gib": 0.1 * 2**i}
            rows.append(
                row if i < fits else row | {"kernel_ms": None, "wall_ms": None, "peak_gib": None, "error": LOST}
            )
    draw_sizes(rows)
    (figure,) = figures
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "x"] == [5, 4, 2]
    assert covered(figure) == []


def test_a_waterfall_has_the_techniques_in_their_order_and_what_each_saves(figures: list[Any]) -> None:
    draw_waterfall([row for row in made_up() if row["imgsz"] >= 2048])
    (figure,) = figures
    small, large = figure.axes
    measured = [name for arm, name in TECHNIQUES.items() if arm in STEPS]
    assert [label.get_text() for label in small.get_yticklabels()] == [*measured, "auto"]
    minus = "\N{MINUS SIGN}"
    assert texts(small) == [
        "170.0 ms",
        f"140.0 ms  ({minus}30.0 ms, {minus}18 %)",
        f"35.5 ms  ({minus}104.5 ms, {minus}75 %)",
        f"32.9 ms  ({minus}2.6 ms, {minus}7 %)",
        "32.9 ms  (0.0 ms, 0 %)",
    ]
    assert texts(large)[:3] == [LOST, LOST, "70.0 ms"]
    assert covered(figure) == []


def test_a_waterfall_with_graphs_is_on_the_clock_which_is_all_that_they_spare(figures: list[Any]) -> None:
    rows = [row for row in made_up() if row["imgsz"] == 2048]
    draw_waterfall([*rows, *(row | {"arm": "graphs", "wall_ms": 34.0} for row in rows if row["arm"] == "triton_area")])
    (axis,) = figures[0].axes
    assert "wall ms" in axis.get_xlabel()
    assert axis.get_yticklabels()[-2].get_text() == TECHNIQUES["graphs"]
    assert covered(figures[0]) == []


@pytest.mark.parametrize("on_gpu", [True, False])
def test_latencies_are_bars_with_their_figures(on_gpu: bool, figures: list[Any]) -> None:
    rows = [row for row in made_up("predict", on_gpu) if row["imgsz"] in (640, 4096)]
    rows[0]["error"] = f"yolo_flash.backends.BackendNotSupportedError: {'a long reason ' * 9}"
    rows[0] |= dict.fromkeys(("kernel_ms", "wall_ms", "images_per_second", "peak_gib"))
    draw_predict([row for row in rows if row["round"] == 1])
    (figure,) = figures
    small, large = figure.axes
    assert f"18.00 ms{', GPU 8.00 ms' if on_gpu else ''}, 222 images/s" in texts(small)
    assert any(text.startswith("a long reason") and text.endswith("...") for text in texts(small))
    assert texts(large).count(LOST) == 2
    assert ("GPU" in small.get_xlabel()) == on_gpu
    assert covered(figure) == []


def a_training() -> list[dict[str, Any]]:
    """What `bench train` might give on an H100, two rounds of it, and one arm that ran out of memory."""
    rows = []
    for number in (1, 2):
        measured = {"unpatched": (98.0, 96.0), "eager": (60.0, 58.5), "graphs": (26.0, 24.0)}
        for arm, (with_loader, without) in measured.items():
            row = dict.fromkeys(TRAIN_COLUMNS) | {
                "command": "train",
                "model": "yolo12s.yaml",
                "imgsz": 640,
                "batch": 16,
            }
            row |= {"arm": arm, "precision": "fp16", "round": number, "device": "a card"}
            row |= {
                "torch": "2.10",
                "epochs": 10,
                "data": "coco8.yaml",
                "iteration_ms": with_loader + number,
                "without_loader_ms": without,
            }
            rows.append(row | {"wait_ms": 1.5, "peak_gib": 9.25, "reserved_gib": 10.5, "images_per_second": 160.0})
    lost = dict.fromkeys(("iteration_ms", "without_loader_ms", "wait_ms", "peak_gib", "reserved_gib"))
    return [*rows, rows[0] | lost | {"arm": "compile", "images_per_second": None, "error": LOST}]


def test_a_training_is_bars_of_iterations_with_and_without_the_loader(figures: list[Any]) -> None:
    draw_train(a_training())
    (figure,) = figures
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["unpatched", "eager", "graphs", "compile"]
    assert texts(axis) == [
        "99.5 ms, 96.0 without the loader, 9.2 GiB",
        "61.5 ms, 58.5 without the loader, 9.2 GiB",
        "27.5 ms, 24.0 without the loader, 9.2 GiB",
        LOST,
    ]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [99.5, 96.0, 61.5, 58.5, 27.5, 24.0]
    assert axis.get_xlim()[1] > 100
    assert "iteration of a training, ms" in axis.get_xlabel()
    assert covered(figure) == []


def test_whole_runs_are_bars_with_their_first_epoch(figures: list[Any]) -> None:
    shared = {
        "command": "run",
        "model": "yolo12s.yaml",
        "imgsz": 640,
        "batch": 16,
        "precision": "fp16",
        "device": "a card",
    }
    shared |= dict.fromkeys(("error", *VERSIONS))
    seconds = {"unpatched": (53.0, 26.2, 2.25), "auto": (50.6, 26.25, 1.44)}
    rows = [
        {**shared, "arm": arm, "process_s": process, "first_epoch_s": first, "epoch_s": epoch, "map50_95": 0.49}
        for arm, (process, first, epoch) in seconds.items()
    ]
    draw_runs(rows)
    (figure,) = figures
    (axis,) = figure.axes
    assert texts(axis) == [
        "53.0 s, first 26.2, others 2.25, mAP 0.490",
        "50.6 s, first 26.2, others 1.44, mAP 0.490",
    ]
    assert [bar.get_width() for bar in axis.patches] == [53.0, 26.2, 50.6, 26.25]
    assert covered(figure) == []
    assert draw_runs([{**row, "command": "train"} for row in rows]) is None


def test_the_csv_of_whole_runs_is_drawn(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "docs" / "results" / "run-yolo12s-bccd-h100.csv"
    (picture,) = bench_plot(PlotJob(files=(str(source),), folder=str(tmp_path)))
    assert picture.name == "run.png"


def test_techniques_of_whole_runs_are_three_panels(figures: list[Any]) -> None:
    """Speed, memory and mAP; what failed says so once; arms that are no technique are left out."""
    rows = []
    for number in (1, 2):
        for i, arm in enumerate(("graphs", "unpatched", "auto", "stock", "sdpa_flash", "triton_area")):
            row = dict.fromkeys((*COLUMNS, *RunJob.more_columns)) | {"command": "run", "model": "yolo12n.yaml"}
            row |= {"imgsz": 640, "batch": 16, "arm": arm, "precision": "fp16", "round": number, "device": "a card"}
            if arm == "sdpa_flash":
                row["error"] = LOST
            else:
                row |= {"process_s": 60.0, "images_per_second": 1000.0 / (1 + i), "peak_gib": 2.0 + i}
                row["map50_95"] = 0.48 + number / 100
            rows.append(row)
    draw_run_waterfall(rows)
    (figure,) = figures
    speed, memory, quality = figure.axes
    assert [label.get_text() for label in speed.get_yticklabels()][::4] == ["stock", TECHNIQUES["graphs"]]
    assert len(speed.get_yticklabels()) == 5
    assert texts(speed) == ["500", "250 (\N{MINUS SIGN}50 %)", LOST, "167 (\N{MINUS SIGN}33 %)", "1,000 (+500 %)"]
    assert texts(memory) == ["3.00", "5.00 (+67 %)", "-", "7.00 (+40 %)", "2.00 (\N{MINUS SIGN}71 %)"]
    assert texts(quality) == ["0.495", "0.495", "-", "0.495", "0.495"]
    assert [bar.get_width() for bar in quality.patches] == [0.495] * 4
    assert covered(figure) == []
    assert draw_run_waterfall([row for row in rows if row["arm"] in ("unpatched", "auto")]) is None


def test_the_csv_of_a_training_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(as_csv(TRAIN_COLUMNS, a_training()))
    (tmp_path / "step.csv").write_bytes(as_csv(COLUMNS, made_up()))
    main.main(["bench", "plot", "train.csv", "step.csv", "folder=pictures"])
    pictures = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert pictures == ["imgsz.png", "train.png", "waterfall.png"]
    with Image.open(tmp_path / "pictures" / "train.png") as image:
        assert image.width >= 1000
        assert len(set(image.convert("RGB").resize((100, 40)).getdata())) > 20  # something is on it


def test_there_is_no_picture_of_what_was_not_measured() -> None:
    steps, predictions = made_up(), made_up("predict")
    assert draw_predict(steps) is None
    assert draw_waterfall(predictions) is None
    assert draw_waterfall([row for row in steps if row["arm"] == "auto"]) is None
    assert draw_sizes([row for row in steps if row["imgsz"] == 640]) is None
    assert draw_sizes([row for row in steps if row["error"]]) is None


# The command ----------------------------------------------------------------------------------------------------------
def test_the_command_draws_what_the_files_hold(tmp_path: Path) -> None:
    (tmp_path / "numbers").mkdir()
    for name, rows in (("step", made_up()), ("predict", made_up("predict")[:5])):
        (tmp_path / "numbers" / f"{name}.csv").write_bytes(as_csv(COLUMNS, rows))
    main.main(["bench", "plot", "numbers/step.csv"])
    assert {file.name for file in (tmp_path / "numbers").glob("*.png")} == {"imgsz.png", "waterfall.png"}
    main.main(["bench", "plot", "numbers/predict.csv", "numbers/step.csv", "folder=new/pictures"])
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [file.name for file in pictures] == ["imgsz.png", "predict.png", "waterfall.png"]
    for file in pictures:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.width >= 1000


def test_the_plot_of_bench_op_is_drawn_again_from_its_csv(tmp_path: Path) -> None:
    rows = made_up_rows()
    (tmp_path / "op.csv").write_bytes(as_csv(op_table.OP_COLUMNS, rows))
    main.main(["bench", "plot", "op.csv"])
    assert (tmp_path / "op.png").read_bytes() == op_table.draw_op(rows)


def test_rows_come_back_from_csv_as_they_were() -> None:
    rows = made_up()
    assert from_csv(as_csv(COLUMNS, rows).decode(), NUMBERS) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bench plot: .*a.csv"),
        (b"", "a.csv is no CSV file of bench step, predict, train, run or op: it lacks the columns command, model, "),
        (b"epoch,time\n1,2\n", "it lacks the columns command, model, "),
        (b"\x89PNG\xff", "a.csv: .*decode"),
        (as_csv(COLUMNS, []), "nothing was measured in a.csv"),
        (as_csv(COLUMNS, [dict.fromkeys(COLUMNS) | {"imgsz": "wide"}]), "line 2: imgsz must be a number, found 'wide'"),
        (as_csv(COLUMNS, []) + b"step,yolo12n.yaml\n", "a.csv: line 2 has another number of columns"),
    ],
)
def test_files_that_hold_something_else_are_told(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main.main(["bench", "plot", "a.csv"])
    assert not list(tmp_path.glob("*.png"))


def test_a_plot_of_nothing_is_told() -> None:
    with pytest.raises(SystemExit, match="name the CSV files to draw"):
        main.main(["bench", "plot"])
    with pytest.raises(SystemExit, match=r"bench plot takes FILE\.csv \.\.\., folder=\.\.\.; found dpi"):
        main.main(["bench", "plot", "a.csv", "dpi=300"])
