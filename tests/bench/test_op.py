"""`yolo-flash bench op`: right results or no times, arms that fail told in notes, files that can be quoted."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from yolo_flash import Machine
from yolo_flash.backends.registry import BACKENDS, BackendNotSupportedError
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.bench import op, op_timing
from yolo_flash.bench.op import OpJob
from yolo_flash.bench.op_table import (
    BOTH,
    FORWARD,
    GPU_SHAPES,
    MODES,
    OP_ARMS,
    OP_COLUMNS,
    OURS,
    SHAPES,
    draw_op,
    error_notes,
    mode_table,
)
from yolo_flash.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about what is measured on a CPU")

Run = Callable[[Tensor, AttentionSpec], tuple[Tensor, Tensor]]
Install = Callable[..., None]


def measure(**job: Any) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = op.bench_op(OpJob(**{"repeats": 1, **job}))
    return {(row["shape"], row["mode"], row["arm"]): row for row in rows}


@pytest.fixture
def another_arm(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Let `sdpa_cudnn` run on the CPU, by this function and within these limits."""

    def install(run: Run, limits: Callable[[AttentionSpec, Machine], Iterator[str]] = lambda *_: iter(())) -> None:
        backend = dataclasses.replace(BACKENDS["sdpa_cudnn"], forward=run, backward=None, limits=limits)
        monkeypatch.setitem(BACKENDS, "sdpa_cudnn", backend)

    return install


def made_up_rows() -> list[dict[str, Any]]:
    """What a GPU might give: ours takes half the time of the others, which take 10 us, 20 us, ..."""
    rows = []
    for shape in GPU_SHAPES:
        for mode in MODES:
            for i, arm in enumerate(OP_ARMS):
                us = 5.0 if arm == OURS else 10.0 * (i + 1)
                numbers = {"us": us, "us_low": us - 1, "us_high": us + 1, "repeats": 20, "method": "graph"}
                known = {"shape": shape, "mode": mode, "arm": arm, "dtype": "float16", "device": "a card", "note": ""}
                rows.append(dict.fromkeys(OP_COLUMNS) | known | {"torch": "2.11.0", "yolo_flash": "1.0"} | numbers)
    return rows


# The command ----------------------------------------------------------------------------------------------------------
def test_the_command_writes_numbers_and_a_plot_and_logs_tables(tmp_path: Path, log: list[str]) -> None:
    main.main(["bench", "op", "repeats=1"])
    folder = tmp_path / "runs" / "op"
    assert sorted(file.name for file in folder.iterdir()) == ["op.csv", "op.png"]
    with (folder / "op.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == OP_COLUMNS
    assert [(row["shape"], row["mode"], row["arm"]) for row in rows] == [
        (shape, mode, arm) for shape in ("tiny-area", "tiny-psa") for mode in MODES for arm in OP_ARMS
    ]
    measured = [row for row in rows if row["arm"] == "sdpa_flash"]
    assert len(measured) == 4
    for row in measured:
        assert row["note"] == ""
        assert (row["method"], row["dtype"], row["repeats"]) == ("clock", "float32", "1")
        assert 5 < float(row["us_low"]) <= float(row["us"]) <= float(row["us_high"]) < 1e6
        assert 5 < float(row["wall_us"]) < 1e6
        assert float(row["tflops"]) > 0
        assert float(row["error_out"]) < 1e-6
        assert (float(row["error_grad"] or "nan") < 1e-6) == (row["mode"] == BOTH)
        assert row["peak_mib"] == row["exp_percent"] == ""  # of GPUs only
        assert row["torch"] == torch.__version__
        assert row["device"]
    assert all(row["note"] and not row["us"] for row in rows if row["arm"] != "sdpa_flash")
    with Image.open(folder / "op.png") as image:
        assert image.format == "PNG"
        assert 600 < image.width < 4000
        assert 400 < image.height < 3000
    for mode in MODES:
        text = next(line for line in log if line.startswith(f"{mode}, clock microseconds"))
        assert "| tiny-psa (2, 100, 2, 32, 64) | **" in text
        assert "sdpa_cudnn" not in text
    assert any("- sdpa_cudnn: runs on NVIDIA cards, the device is" in line for line in log)


def test_settings_come_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[OpJob] = []
    monkeypatch.setattr(op, "bench_op", jobs.append)
    typed = "bench op shapes=one-group,tiny-psa arms=sdpa_flash repeats=3 dtype=bfloat16 folder=2024"
    main.main(typed.split())
    assert jobs == [OpJob(("one-group", "tiny-psa"), ("sdpa_flash",), 3, "bfloat16", "2024")]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("shapes=12n-p4-640-b46", "there is no shape '12n-p4-640-b46'. Did you mean '12n-p4-640-b64'?"),
        ("arms=sdpa_flsh", "there is no arm 'sdpa_flsh'. Did you mean 'sdpa_flash'?"),
        ("arms=stock", "there is no arm 'stock'"),
        ("repeats=0", "repeats must be a whole number of at least 1, found 0"),
        ("repeats=few", "repeats must be a whole number of at least 1, found 'few'"),
        ("dtype=fp16", "dtype must be float16, bfloat16 or float32, found 'fp16'"),
        (
            "shape=one-group",
            "bench op takes shapes=..., arms=..., repeats=..., dtype=..., folder=...; found shape",
        ),
        ("arms=triton_area", "cannot run on any shape: triton_area: runs on NVIDIA cards"),
        ("arms=sdpa_flash,flash_attn_4", "flash_attn_4: runs on NVIDIA cards"),
        ("arms=sdpa_efficient", "Arms that can: sdpa_flash."),
    ],
)
def test_mistakes_are_told_before_anything_runs(typed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main.main(["bench", "op", typed])
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=r"bench op: .*taken"):
        main.main(["bench", "op", "folder=taken"])


# Arms -----------------------------------------------------------------------------------------------------------------
def flash(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    run = BACKENDS["sdpa_flash"].run
    return run(packed, spec)


def test_an_arm_that_raises_becomes_a_note_and_the_others_stand(another_arm: Install, log: list[str]) -> None:
    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        if spec.training:
            raise RuntimeError("no kernel for the backward\nand a long stack")
        return flash(packed, spec)

    another_arm(run)
    rows = measure(shapes=("tiny-area",))
    assert rows["tiny-area", FORWARD, "sdpa_cudnn"]["us"] > 0
    failed = rows["tiny-area", BOTH, "sdpa_cudnn"]
    assert failed["us"] is None
    assert failed["note"] == "RuntimeError: no kernel for the backward"
    assert rows["tiny-area", BOTH, "sdpa_flash"]["us"] > 0
    assert any("- sdpa_cudnn (forward+backward): RuntimeError: no kernel for the backward" in line for line in log)


def test_a_wrong_result_is_not_timed(another_arm: Install) -> None:
    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, image = flash(packed, spec)
        return (out, image * 1.5) if spec.training else (out * float("nan"), image)

    another_arm(run)
    rows = measure(shapes=("tiny-area",), arms=("sdpa_cudnn",))
    forward, both = (rows["tiny-area", mode, "sdpa_cudnn"] for mode in MODES)
    assert forward["us"] is both["us"] is None
    assert forward["note"] == "ArithmeticError: error_out is nan, more than 0.05: wrong, so it is not timed"
    assert both["note"].startswith("ArithmeticError: error_grad is 0.")


def test_an_arm_that_refuses_some_shapes_is_measured_on_the_rest(another_arm: Install, log: list[str]) -> None:
    def limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
        if spec.head_dim_v == 64:
            yield "needs head_dim <= 32, the layer has 64"

    another_arm(flash, limits)
    rows = measure(arms=("sdpa_flash", "sdpa_cudnn"))
    assert rows["tiny-area", FORWARD, "sdpa_cudnn"]["us"] > 0
    assert rows["tiny-psa", FORWARD, "sdpa_cudnn"]["note"] == "needs head_dim <= 32, the layer has 64"
    assert any("- sdpa_cudnn (tiny-psa): needs head_dim <= 32" in line for line in log)
    with pytest.raises(BackendNotSupportedError, match=r"sdpa_cudnn: needs head_dim <= 32.*can: sdpa_flash\."):
        measure(shapes=("tiny-psa",), arms=("sdpa_cudnn",))


def test_arms_take_turns_within_every_repeat(another_arm: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    another_arm(flash)
    turns: list[str] = []

    def timer(row: Any, call: Any, device: Any) -> SimpleNamespace:
        def sample() -> float:
            turns.append(row["arm"])
            return float(len(turns))

        return SimpleNamespace(row=row, call=call, sample=sample, method="clock", note="")

    monkeypatch.setattr(op_timing, "_timer", timer)
    rows = measure(shapes=("tiny-area",), repeats=3)
    assert turns == ["sdpa_flash", "sdpa_cudnn"] * 8  # of each mode: once to warm up, three repeats
    numbers = rows["tiny-area", FORWARD, "sdpa_flash"]
    assert [numbers[name] for name in ("us_low", "us", "us_high", "repeats")] == [3, 5, 7, 3]
    assert numbers["tflops"] == pytest.approx(2 * 4 * 2 * 100**2 * 64 / 5e-6 / 1e12)


def test_without_a_graph_the_profiler_sums_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: object, calls: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(op_timing, "graph_ms", fail)
    monkeypatch.setattr(op_timing, "_profiled_us", lambda call: 250.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = op_timing._timer({}, tuple, torch.device("cuda"))
    assert timer.method == "profiler"
    assert timer.sample() == 250
    assert timer.note.endswith("could be made: RuntimeError: operation not permitted when stream is capturing")


def test_an_arm_whose_package_cannot_be_imported_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(
        BACKENDS["flash_attn_4"], limits=lambda spec, machine: iter(()), importable=lambda: "its import gave nothing"
    )
    monkeypatch.setitem(BACKENDS, "flash_attn_4", broken)
    card = Machine(kind="cuda", name="a card", capability=(9, 0), packages={"flash_attn_4": "4.0.0b36"})
    rows = [row for row in op._empty_rows("one-group", "float16", card) if row["arm"] == "flash_attn_4"]
    assert [(row["note"], row["flash_attn_4"]) for row in rows] == [("its import gave nothing", "4.0.0b36")] * 2


# Numbers --------------------------------------------------------------------------------------------------------------
def test_operations_are_those_of_the_matrix_products() -> None:
    shape = SHAPES["26n-640-b64"]
    assert shape.scores == 64 * 2 * 400 * 400
    assert shape.flops(FORWARD) == 2 * shape.scores * (32 + 64)
    assert shape.flops(BOTH) == shape.flops(FORWARD) + 2 * shape.scores * (3 * 32 + 2 * 64)


# Output ---------------------------------------------------------------------------------------------------------------
def test_the_table_marks_the_best_and_gives_our_speed_up() -> None:
    rows = made_up_rows()
    for row in rows:
        if row["shape"] == "one-group" and row["arm"] == OURS:
            row |= {"us": None, "note": "OutOfMemoryError: 80 GiB"}
    lines = mode_table(rows, FORWARD).splitlines()
    assert (
        lines[0] == "forward, GPU microseconds, median (low..high) of 20; float16, a card; torch 2.11.0, yolo_flash 1.0"
    )
    assert lines[2].startswith("| shape (groups, tokens, heads, head dims) | sdpa_flash | ")
    assert lines[2].endswith(" | speed-up of triton_area |")
    assert lines[4].startswith("| 12n-p4-640-b64 (256, 400, 2, 32, 32) | 10.0 (9.0..11.0) | 20.0 (19.0..21.0) |")
    assert "| **5.0** (4.0..6.0) |" in lines[4]
    assert lines[4].endswith("| 2.00x |")
    assert lines[-1].startswith("| one-group (1, 400, 2, 32, 32) | **10.0** (9.0..11.0) |")
    assert lines[-1].endswith("| - |")
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert error_notes(rows) == "- triton_area (one-group): OutOfMemoryError: 80 GiB"


@pytest.mark.parametrize("keep", [lambda row: True, lambda row: row["arm"] == OURS, lambda row: row["mode"] == BOTH])
def test_the_plot_has_room_for_all_shapes(keep: Callable[[dict[str, Any]], bool]) -> None:
    rows = [row for row in made_up_rows() if keep(row)]
    with Image.open(io.BytesIO(draw_op(rows))) as image:
        assert image.width > 100 * len(GPU_SHAPES)
        assert image.height > 300 * len({row["mode"] for row in rows})


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = op.measure_shape

    def interrupted(rows: list[dict[str, Any]], *args: Any) -> None:
        if rows[0]["shape"] == "tiny-psa":
            raise KeyboardInterrupt
        fill(rows, *args)

    monkeypatch.setattr(op, "measure_shape", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(folder=str(tmp_path))
    with (tmp_path / "op.csv").open(newline="") as file:
        assert {row["shape"] for row in csv.DictReader(file)} == {"tiny-area"}
