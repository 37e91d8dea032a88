"""`yolo-flash bench op`: the attention core alone, every fused backend, side by side in one process.

Packed qkv goes in, attention and a contiguous copy of v come out (`Backend.run`), so all layout work counts. The arms
take turns within every repeat, and each result is compared with float64 in the run that times it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from ultralytics.utils import LOGGER, TQDM

from .._version import __version__
from ..backends.registry import BACKENDS, BackendNotSupportedError
from ..machine import Machine, cudnn_release, detect
from ..utils.errors import did_you_mean
from ..utils.files import Row, as_csv, from_csv, write_file
from . import op_table
from .op_table import CPU_SHAPES, GPU_SHAPES, MODES, OP_ARMS, OP_COLUMNS, OP_NUMBERS, PEER, SHAPES
from .op_timing import measure_shape


@dataclass(frozen=True)
class OpJob:
    """What `bench op` measures.

    Attributes:
        shapes: Names from `SHAPES`; if empty, those of the models on a GPU and tiny ones on a CPU.
        arms: Names from `OP_ARMS`; if empty, all that run on this machine.
        repeats: Samples of each arm; a sample is 10 calls.
        dtype: `float16`, `bfloat16` or `float32`; if empty, float16 on a GPU and float32 on a CPU.
        folder: Where op.csv and op.png go; made if it is not there.
    """

    shapes: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    repeats: int = 20
    dtype: str = ""
    folder: str = "runs/op"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, as a ValueError, before anything runs."""
        for kind, names, valid in (("shape", self.shapes, SHAPES), ("arm", self.arms, OP_ARMS)):
            for name in names:
                if name not in valid:
                    raise ValueError(f"there is no {kind} {name!r}.{did_you_mean(name, valid)}")
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise ValueError(f"repeats must be a whole number of at least 1, found {self.repeats!r}.")
        if self.dtype not in ("", "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype must be float16, bfloat16 or float32, found {self.dtype!r}.")


def bench_op(job: OpJob) -> list[Row]:
    """Measure all arms on all shapes, write op.csv and op.png, log a table for each mode.

    Returns:
        The rows of the CSV: `OP_COLUMNS` -> value, or None. A row without `us` has a `note` that says why.

    Raises:
        BackendNotSupportedError: An arm asked for by name, or every arm, cannot run on any of the shapes.
        OSError: The folder cannot be written.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    machine = detect(device)
    dtype = job.dtype or ("float16" if on_gpu else "float32")
    shapes = dict.fromkeys(job.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES))
    rows = [row for name in shapes for row in _empty_rows(name, dtype, machine)]
    rows = _without_hopeless(rows, job.arms)
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    for name in TQDM(shapes, desc=f"bench op {dtype}, {job.repeats} repeats"):
        mine = [row for row in rows if row["shape"] == name]
        measure_shape(mine, job.repeats, device)
        with contextlib.suppress(RuntimeError):  # after a fault of a kernel every call of CUDA raises; the notes say it
            torch.cuda.empty_cache()
        done += mine
        write_file(folder / "op.csv", as_csv(OP_COLUMNS, done))  # after each shape: a borrowed GPU may be taken away
    for mode in MODES:
        LOGGER.info(op_table.mode_table(rows, mode))
    LOGGER.info(op_table.error_notes(rows))
    if any(row["us"] is not None for row in rows):
        drawn = from_csv(as_csv(OP_COLUMNS, rows).decode(), OP_NUMBERS)  # what `bench plot` reads: the same picture
        write_file(folder / "op.png", op_table.draw_op(drawn))
    LOGGER.info(f"Results saved to {folder.resolve()}")
    return rows


def _empty_rows(name: str, dtype: str, machine: Machine) -> Iterator[Row]:
    """A row for each mode and arm, without numbers; with the reasons as a note where the arm refuses."""
    known = {
        "device": machine.name,
        "torch": machine.torch,
        "triton": machine.packages.get("triton"),
        "cudnn": cudnn_release(machine.cudnn) if machine.cudnn else None,
        PEER: machine.packages.get(PEER),
        "yolo_flash": __version__,
    }
    sizes = {"shape": name, **SHAPES[name]._asdict(), "dtype": dtype}
    for mode in MODES:
        spec = SHAPES[name].spec(getattr(torch, dtype), mode)
        for arm in OP_ARMS:
            note = "; ".join(BACKENDS[arm].reasons_here(spec, machine))
            yield dict.fromkeys(OP_COLUMNS) | known | sizes | {"mode": mode, "arm": arm, "note": note}


def _without_hopeless(rows: list[Row], asked: tuple[str, ...]) -> list[Row]:
    """The rows of the arms asked for, or of all; refuses where one asked for, or every one, runs on no shape."""
    able = {row["arm"] for row in rows if not row["note"]}
    why_not = {row["arm"]: row["note"] for row in rows if row["arm"] not in able}
    if hopeless := [arm for arm in asked or OP_ARMS if arm in why_not and (asked or not able)]:
        reasons = "; ".join(f"{arm}: {why_not[arm]}" for arm in hopeless)
        others = ", ".join(arm for arm in OP_ARMS if arm in able) or "none"
        raise BackendNotSupportedError(f"cannot run on any shape: {reasons}. Arms that can: {others}.")
    return [row for row in rows if row["arm"] in (asked or OP_ARMS)]
