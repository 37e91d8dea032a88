"""On two CUDA devices: Ultralytics' DDP with NCCL, eager and from CUDA graphs, against stock."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK

from tests.engine.test_telemetry import events, of, read_events
from tests.patching.test_patch import load_without_plugin, patched_layers
from yolo_flash import patch_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
STEPS = 20  # of two ranks, each with a quarter of coco8's pictures: one step an epoch


class GradientTrainer(DetectionTrainer):
    """Keeps the gradients that each optimizer step gets, in the folder that REPORT_FOLDER names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[Tensor] = []
        self.replaying = False

    def optimizer_step(self) -> None:
        self.replaying = self.flash_run.graphs.step is not None
        scale = self.scaler.get_scale()
        gradients = [p.grad.flatten() / scale for p in self.model.parameters() if p.grad is not None]
        self.kept.append(torch.cat(gradients).double().cpu())
        super().optimizer_step()

    def final_eval(self) -> None:
        facts = {"gradients": torch.stack(self.kept), "replaying": self.replaying}
        torch.save(facts, Path(os.environ["REPORT_FOLDER"], f"rank{RANK}.pt"))
        super().final_eval()


def losses(folder: Path) -> list[list[float]]:
    """Of every epoch, as results.csv has them."""
    with (folder / "results.csv").open(newline="") as file:
        rows = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]
    return [[float(row[f"train/{name}_loss"]) for name in ("box", "cls", "dfl")] for row in rows]


@pytest.mark.parametrize("start", ["yaml", "pt"])
def test_a_run_on_two_devices_has_the_losses_of_stock(start: str, tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model = tiny_model
    if start == "pt":
        torch.manual_seed(0)
        model = str(Path(tiny_model).with_suffix(".pt"))
        YOLO(tiny_model).save(model)
    args = {**tiny_args, "batch": 4, "imgsz": 128, "epochs": 4, "device": [0, 1], "amp": "bf16"}
    stock = YOLO(model)
    stock.train(**args, name="stock")
    ours = patch_model(YOLO(model), backend="sdpa_flash")
    ours.train(**args, name="ours")
    wanted, found = (losses(Path(run.trainer.save_dir)) for run in (stock, ours))
    assert len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=0.02)
    rows = events(ours)  # of rank 0 alone
    assert len(of(rows, "run")) == 1
    assert len(of(rows, "epoch")) == 4
    (kernels,) = of(rows, "kernels")
    assert sum(count for name, count in kernels["counts"].items() if "flash_bwd" in name) >= 3
    assert patched_layers(ours.model) == 3
    load_without_plugin(ours.trainer.last)


def test_the_command_trains_on_two_devices(coco8: str, tiny_model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "yolo_flash", "train", f"model={tiny_model}", f"data={coco8}", "device=0,1"]
    options = ["imgsz=128", "epochs=2", "batch=4", "workers=0", "plots=False", f"project={tmp_path}", "name=two"]
    result = subprocess.run([*command, *options], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = tmp_path.rglob("flash.jsonl")
    assert len(of(read_events(file), "epoch")) == 2
    assert result.stdout.count("yolo-flash: one step ran") + result.stderr.count("yolo-flash: one step ran") == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("amp", [True, False], ids=["fp16", "fp32"])
def test_gradients_from_graphs_are_those_of_eager_ranks(
    amp: bool,
    accumulate: int,
    tiny_model: str,
    tiny_args: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = {**tiny_args, "batch": 4, "nbs": 4 * accumulate, "imgsz": 128, "epochs": STEPS, "device": [0, 1]}
    args |= {"amp": amp, "warmup_epochs": 0.0, "optimizer": "SGD", "lr0": 1e-4, "val": False}
    found = {}
    for mode in ("off", "again", "on"):
        folder = tmp_path / mode
        folder.mkdir()
        monkeypatch.setenv("REPORT_FOLDER", str(folder))
        torch.manual_seed(0)
        model = patch_model(YOLO(tiny_model), graphs="on" if mode == "on" else "off")
        model.train(trainer=GradientTrainer, **args)
        first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
        assert first["replaying"] == second["replaying"] == (mode == "on")
        torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0, equal_nan=True)
        assert len(first["gradients"]) == STEPS // accumulate
        found[mode] = first["gradients"]

    # The scale of the first steps may be too high, and later ones are chaotic: what is rounded otherwise grows.
    first = found["off"].isfinite().all(dim=1).nonzero().flatten()[:4]
    assert len(first) == 4
    eager, again, replayed = (found[mode][first] for mode in ("off", "again", "on"))
    noise = (again - eager).norm(dim=1) / eager.norm(dim=1)
    distance = (replayed - eager).norm(dim=1) / eager.norm(dim=1)
    assert (distance <= torch.clamp(2 * noise, min=1e-3)).all(), (distance, noise)


def test_rtdetr_from_graphs_has_the_losses_of_eager_ranks(tiny_args: dict[str, Any]) -> None:
    """Matching and loss of each rank are in its graphs; validation, of rank 0 alone, runs from graphs of its own."""
    args = {**tiny_args, "batch": 4, "imgsz": 320, "epochs": 6, "device": [0, 1], "mosaic": 0.0, "warmup_epochs": 0.0}
    args |= {"optimizer": "SGD", "lr0": 1e-4, "amp": "bf16"}
    found = {}
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = patch_model(RTDETR("rtdetr-resnet50.yaml"), graphs=mode)
        model.train(**args, name=mode)
        folder = Path(model.trainer.save_dir)
        with (folder / "results.csv").open(newline="") as file:
            rows = [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]
        found[mode] = [[float(row[f"train/{name}_loss"]) for name in ("giou", "cls", "l1")] for row in rows]
    (facts,) = of(events(model), "graphs")
    assert facts["why_not"] == ""
    assert facts["boxes"] > 0
    replayed = [event["graphs"]["replayed"] for event in of(events(model), "epoch")]
    assert replayed[0] == 0
    assert replayed[-1] == 1
    assert len(found["on"]) == len(found["off"]) == 6
    for wanted, losses_of_epoch in zip(found["off"], found["on"], strict=True):
        assert losses_of_epoch == pytest.approx(wanted, rel=0.05)
