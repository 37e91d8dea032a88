"""Our Triton kernels compiled for cards that are not there: they fit every card that `auto` may start them on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.test_area import HEADS
from tests.versions import needs_triton

needs_triton()
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "study_compile.py"
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
WIDEST = "32/64"  # of every YOLO but YOLOv10m; the other head dims are in docs/results/compile-triton.md


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """In a process of its own: in this one Triton interprets. A kernel that does not fit spills KiBs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "compile", *(f"sm_{sm}" for sm in SHARED_KIB), WIDEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = ("area_forward", "area_backward_q", "area_backward_kv")
    assert {(row["sm"], row["kernel"], row["dims"]) for row in rows} == {
        (sm, kernel, WIDEST) for sm in SHARED_KIB for kernel in kernels
    }
    for row in rows:
        assert "error" not in row, row
        assert row["shared"] <= SHARED_KIB[row["sm"]] * 1024, row
        assert row["registers"] <= 255, row
        assert row["spilt"] <= 512, row


def test_the_table_is_of_all_head_dims() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import study_compile  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert set(study_compile.DIMS) == set(HEADS) - {(16, 16)}
    assert study_compile.SHARED_KIB == SHARED_KIB
