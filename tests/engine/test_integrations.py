"""What a run tells TensorBoard, MLflow and results.csv through Ultralytics' own callbacks, with the real packages.

In a process of its own, without pytest, under which Ultralytics keeps its callbacks off. W&B, Comet, ClearML and DVC
get the same dictionaries from the same trainer, and need an account.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yolo_flash.engine.telemetry import RESULT_COLUMNS

RUN = """
import json
from ultralytics import YOLO, settings
settings.update({settings!r})
from yolo_flash import patch_model
model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash")
def types(trainer):
    print("types", json.dumps({{name: type(value).__name__ for name, value in trainer.lr.items() if "flash" in name}}))
model.add_callback("on_train_epoch_end", types)
model.train(**{args!r})
print("save_dir", model.trainer.save_dir)
"""


class Run:
    """The folder of a run of two epochs, and what it logged."""

    def __init__(self, root: Path, data: str) -> None:
        args: dict[str, Any] = {"data": data, "imgsz": 32, "epochs": 2, "batch": 2, "workers": 0, "device": "cpu"}
        args |= {"plots": False, "verbose": False, "project": str(root / "runs")}
        loggers = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "mlflow")}
        self.store = (root / "mlruns").as_uri()
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        env |= {"YOLO_CONFIG_DIR": str(root), "MLFLOW_TRACKING_URI": self.store, "MLFLOW_ALLOW_FILE_STORE": "true"}
        script = root / "run.py"
        script.write_text(RUN.format(settings=loggers, args=args), encoding="utf-8")
        done = subprocess.run([sys.executable, str(script)], capture_output=True, encoding="utf-8", env=env, cwd=root)
        assert done.returncode == 0, done.stderr
        self.log = done.stdout + done.stderr
        self.types = json.loads(done.stdout.rsplit("types ", 1)[1].splitlines()[0])
        self.folder = Path(done.stdout.rsplit("save_dir ", 1)[1].strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, coco8: str) -> Run:
    return Run(tmp_path_factory.mktemp("integrations"), coco8)


def test_results_csv_has_our_columns(run: Run) -> None:
    with (run.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert all(float(row[column]) > 0 for row in rows for column in RESULT_COLUMNS)
    assert list(rows[0])[-2:] == list(RESULT_COLUMNS)


def test_tensorboard_has_our_scalars_and_the_graph(run: Run) -> None:
    """The graph is traced from the patched model: it has the stock operators, and none of ours."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    accumulator = event_accumulator.EventAccumulator(str(run.folder))
    accumulator.Reload()
    for column in RESULT_COLUMNS:
        points = accumulator.Scalars(column)
        assert [point.step for point in points] == [1, 2]
        assert all(type(point.value) is float and point.value > 0 for point in points)
    assert "model graph visualization added" in run.log
    operators = {node.op for node in accumulator.Graph().node}
    assert "aten::softmax" in operators
    assert not {name for name in operators if "scaled_dot_product" in name or "yolo_flash" in name}


def test_mlflow_has_our_metrics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local store of files; names with a slash are folders there."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow would rather have a database
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: 117 MB with what it needs")
    client = mlflow.MlflowClient(tracking_uri=run.store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (logged,) = client.search_runs(experiments)
    assert logged.info.status == "FINISHED"
    for column in RESULT_COLUMNS:
        history = client.get_metric_history(logged.info.run_id, column)
        assert [metric.step for metric in history] == [0, 1]
        assert all(type(metric.value) is float and metric.value > 0 for metric in history)


def test_what_all_loggers_get_is_plain_numbers(run: Run) -> None:
    """They log `trainer.lr` as it is: numbers of Python, not of numpy or torch."""
    assert run.types == dict.fromkeys(RESULT_COLUMNS, "float")
