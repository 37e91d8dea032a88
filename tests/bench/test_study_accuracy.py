"""scripts/study_accuracy.py: tables against numbers by hand, a queue that goes on where it was cut, pictures."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from yolo_flash.utils.files import as_csv

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as python does for a script
    return importlib.import_module("study_accuracy")


@pytest.fixture
def report(study: Any) -> Any:
    return importlib.import_module("study_accuracy_report")


def rows_of(arm: str, seed: int, maps: list[float], imgsz: int = 640, **more: Any) -> list[dict[str, Any]]:
    facts = {
        "model": "yolo12n",
        "imgsz": imgsz,
        "arm": arm,
        "seed": seed,
        "peak_gib": 2.5,
        "reserved_gib": 3.5,
        "epoch_s": 1.5,
        "batch": 16,
    }
    facts |= {"device": "a card", "torch": "2.11", "ultralytics": "8", "yolo_flash": "0", "replayed": None} | more
    return [facts | {"epoch": epoch, "map50_95": value} for epoch, value in enumerate(maps, 1)]


# Statistics -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (2.5, 3.5747), (4, 2.7764), (30, 2.0423)])
def test_quantiles_of_student(report: Any, freedom: float, quantile: float) -> None:
    assert report.student_t(freedom) == pytest.approx(quantile, rel=1e-4)


def test_a_difference_and_its_interval(report: Any) -> None:
    """Two spreads of 0.01 and three seeds: 4 degrees of freedom, t = 2.776, error = sqrt(2 * 0.0001 / 3)."""
    found = report.welch([0.50, 0.52, 0.51], [0.48, 0.50, 0.49])
    assert found == pytest.approx((0.02, 0.02 - 2.77645 * 0.0081650, 0.02 + 2.77645 * 0.0081650), abs=1e-5)
    assert report.verdict([0.50, 0.52, 0.51], [0.48, 0.50, 0.49]).endswith("within the spread; ranges overlap")
    outside = report.verdict([0.60, 0.62, 0.61], [0.48, 0.50, 0.49])
    assert outside == "+0.1200 (+0.0973..+0.1427), **outside** the spread; ranges do not overlap"
    assert report.verdict([0.5], [0.4, 0.6]) == "+0.0000; one seed has no spread"
    assert report.welch([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0, 0.0)


def test_the_table_has_last_and_best_epochs_and_all_rows_together(report: Any) -> None:
    rows = []
    for seed, (stock, ours) in enumerate(((0.48, 0.50), (0.50, 0.49), (0.49, 0.51))):
        rows += rows_of("stock", seed, [0.1, 0.7, stock]) + rows_of("auto", seed, [0.1, ours, ours], replayed=0.75)
    text = report.table(rows)
    assert "| yolo12n, 640 | stock | 3 | 0.4900 ± 0.0100 | 0.7000 ± 0.0000 |  | 1.50 | 2.50, 3.50 | - |" in text
    assert "| yolo12n, 640 | ours as it ships | 3 | 0.5000 ± 0.0100 | 0.5000 ± 0.0100 | +0.0100 (" in text
    assert text.count("75%") == 1
    # 0.02, -0.01 and 0.02: mean 0.01, standard deviation 0.01732, error 0.01, t = 4.3027 for 2 degrees of freedom
    assert "3 differences to stock of equal seeds +0.0100, 95 % interval -0.0330..+0.0530, which contains 0" in text
    assert "no graphs" not in text


def resumed(report: Any, jump: float) -> list[dict[str, Any]]:
    rows = []
    for run, arms in report.RESUMED.items():
        for epoch in range(1, 9):
            arm, loss = arms[0 if epoch <= 4 else -1], 10.0 - epoch + (jump if epoch > 4 and len(arms) > 1 else 0)
            facts = {"model": "yolo12n", "run": run, "arm": arm, "epoch": epoch, "loss": loss, "val_loss": loss}
            rows.append(
                facts | {"map50_95": epoch / 10, "device": "a", "torch": "2", "ultralytics": "8", "yolo_flash": "0"}
            )
    return rows


def test_a_jump_at_the_seam_is_told(report: Any) -> None:
    text = report.resume_table(resumed(report, 0.0))
    assert text.endswith("across a seam is 1.00 times the largest of the ten around it in its run.")
    assert (
        "| stock, then ours | training loss | 8.0000 | 7.0000 | 6.0000 | 5.0000 | 4.0000 | 3.0000 | 2.0000 | -1.0000 |"
        in text
    )
    assert "is 4.00 times" in report.resume_table(resumed(report, 5.0))


# The queue ------------------------------------------------------------------------------------------------------------
def test_runs_that_are_in_the_file_are_not_repeated(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run fails, one hangs until the seconds are over; the next call makes these two alone."""
    started: list[tuple[str, int]] = []
    trouble = {("stock", 1): "raise SystemExit('a reason')", ("auto", 1): "import time; time.sleep(60)"}

    def start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
        started.append((job["arm"], job["seed"]))
        rows = rows_of(job["arm"], job["seed"], [0.1, 0.2])
        code = trouble.get(started[-1], f"open({job['file']!r}, 'w').write({json.dumps(json.dumps(rows))})")
        with Path(job["file"]).with_suffix(".txt").open("wb") as said:
            return subprocess.Popen([sys.executable, "-c", code], stderr=said, start_new_session=True)

    monkeypatch.setattr(study, "start", start)
    given = {"epochs": "2", "seeds": "0,1", "arms": "stock,auto", "parallel": "4"}
    study.run("data.yaml", tmp_path, ["yolo12n-640"], given | {"seconds": "3"})
    said = capsys.readouterr().out
    assert started == [("stock", 0), ("auto", 0), ("stock", 1), ("auto", 1)]
    assert re.search("yolo12n-640-stock-1, . s: failed: a reason", said)
    assert re.search("yolo12n-640-auto-1, . s: killed", said)
    assert "2 of 4 runs are in" in said
    trouble.clear()
    study.run("data.yaml", tmp_path, ["yolo12n-640"], given)
    assert started[4:] == [("stock", 1), ("auto", 1)]
    rows = study.read(tmp_path / "accuracy.csv")
    assert sorted((row["arm"], row["seed"], row["epoch"]) for row in rows) == sorted(
        (arm, seed, epoch) for arm in ("stock", "auto") for seed in (0, 1) for epoch in (1, 2)
    )
    study.run("data.yaml", tmp_path, ["yolo12n-640"], given | {"epochs": "3"})  # other epochs are another run
    assert len(started) == 10


def test_runs_stay_within_the_memory(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """14 GiB of the larger row leave room for one run of 7 of 24 GiB, though it comes later, and not for two."""
    at_once: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
        rows = json.dumps(rows_of(job["arm"], job["seed"], [0.1], job["imgsz"]))
        process = subprocess.Popen(
            [sys.executable, "-c", f"import time; time.sleep(0.5); open({job['file']!r}, 'w').write({rows!r})"]
        )
        running.append(process)
        at_once.append(sum(one.poll() is None for one in running))
        return process

    monkeypatch.setattr(study, "start", start)
    given = {"epochs": "1", "seeds": "0", "arms": "stock,auto", "memory": "24"}
    study.run("data.yaml", tmp_path, ["yolo12n-640", "yolo12n-1280"], given)
    assert len(study.read(tmp_path / "accuracy.csv")) == 4
    assert max(at_once) == 2


def test_a_run_gets_what_its_row_says(study: Any, tmp_path: Path) -> None:
    job = study.job_of("data.yaml", tmp_path, "yolo12n-1280", "auto", 2, {"workers": "0", "device": "cpu"})
    assert [job[name] for name in ("model", "imgsz", "seed", "epochs", "workers", "batch")] == [
        "yolo12n",
        1280,
        2,
        30,
        0,
        8,
    ]


# Pictures -------------------------------------------------------------------------------------------------------------
def test_pictures_and_tables_come_from_the_files(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for seed in (0, 1) for arm in report.NAMES for row in rows_of(arm, seed, [0.1, 0.3 + seed / 50])]
    rows += rows_of("stock", 0, [0.2, 0.4], imgsz=1280)
    (tmp_path / "accuracy.csv").write_bytes(as_csv(report.COLUMNS, rows))
    (tmp_path / "resume.csv").write_bytes(as_csv(report.RESUME_COLUMNS, resumed(report, 0.0)))
    for name, said in (("accuracy", "ours as it ships | 2 |"), ("resume", "stock, then ours")):
        picture = tmp_path / f"{name}.png"
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / f"{name}.csv"), str(picture)])
        report.main()
        assert said in capsys.readouterr().out
        with Image.open(picture) as image:
            assert image.width > 1000
            assert len(set(image.convert("RGB").resize((100, 60)).getdata())) > 20
