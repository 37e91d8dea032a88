"""`yolo-flash bench plot`: pictures from the CSV files of the other `bench` commands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ultralytics.utils import LOGGER, TQDM

from ..utils.files import Row, from_csv, text_and_columns, write_file
from . import op_table, rounds
from .pictures import draw_predict, draw_run_waterfall, draw_runs, draw_sizes, draw_train, draw_waterfall
from .run import RunJob
from .train import TrainJob

_KINDS: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # all columns, and those of numbers
    "train": ((*rounds.COLUMNS, *TrainJob.more_columns), (*rounds.NUMBERS, *TrainJob.more_numbers)),
    "run": ((*rounds.COLUMNS, *RunJob.more_columns), (*rounds.NUMBERS, *RunJob.more_numbers)),
    "step or predict": (rounds.COLUMNS, rounds.NUMBERS),
    "op": (op_table.OP_COLUMNS, op_table.OP_NUMBERS),
}


@dataclass(frozen=True)
class PlotJob:
    """What `bench plot` draws.

    Attributes:
        files: CSV files; those of the same command are drawn together.
        folder: Where the pictures go, made if it is not there; if empty, the folder of the first file.
    """

    files: tuple[str, ...]
    folder: str = ""

    def __post_init__(self) -> None:
        """Refuse to draw nothing, as a ValueError."""
        if not self.files:
            raise ValueError(
                "name the CSV files to draw, of bench step, predict, train, run or op: bench plot step.csv"
            )


def bench_plot(job: PlotJob) -> list[Path]:
    """Draw all that the files hold.

    `imgsz.png` has time and memory against the image size, where there are several; `waterfall.png` the techniques of a
    training step, one after the other; `predict.png` latencies; `train.png` iterations of a real training; `run.png`
    the seconds of whole trainings; `run-waterfall.png` their speed, memory and mAP, one technique after the other;
    `op.png` the speed of attention alone.

    Returns:
        The pictures.

    Raises:
        OSError: A file cannot be read, or the folder cannot be written.
        ValueError: A file is none of `bench`, or there is nothing to draw in all of them.
    """
    rows: dict[str, list[Row]] = {kind: [] for kind in _KINDS}
    for name in job.files:
        kind, found = _read(Path(name))
        rows[kind] += found
    trainings, runs, samples, op = rows.values()
    drawers: dict[str, Callable[[], bytes | None]] = {
        "imgsz.png": lambda: draw_sizes(samples),
        "waterfall.png": lambda: draw_waterfall(samples),
        "predict.png": lambda: draw_predict(samples),
        "train.png": lambda: draw_train(trainings),
        "run.png": lambda: draw_runs(runs),
        "run-waterfall.png": lambda: draw_run_waterfall(runs),
        "op.png": lambda: op_table.draw_op(op) if any(row["us"] is not None for row in op) else None,
    }
    folder = Path(job.folder or Path(job.files[0]).parent)
    written = []
    for name, draw in TQDM(drawers.items(), "bench plot"):
        if picture := draw():
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, picture)
            written.append(folder / name)
    if not written:
        raise ValueError(f"nothing was measured in {', '.join(job.files)}: there is nothing to draw.")
    LOGGER.info(f"{', '.join(file.name for file in written)} saved to {folder.resolve()}")
    return written


def _read(file: Path) -> tuple[str, list[Row]]:
    """The kind of a file and its rows."""
    try:
        text, found = text_and_columns(file)
        for kind, (columns, numbers) in _KINDS.items():
            if set(columns) <= set(found):
                return kind, from_csv(text, numbers)
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from error
    missing = ", ".join(name for name in rounds.COLUMNS if name not in found)
    raise ValueError(f"{file} is no CSV file of bench step, predict, train, run or op: it lacks the columns {missing}.")
