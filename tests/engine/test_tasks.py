"""Every task and model of Ultralytics that has attention trains as stock does, step by step, on the fused backend."""

from __future__ import annotations

import functools
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO, YOLOE, YOLOWorld
from ultralytics.engine.model import Model
from ultralytics.models.yolo.yoloe import YOLOESegTrainerFromScratch, YOLOETrainerFromScratch

from tests.counting import randomise
from tests.datasets import create_dataset
from tests.engine.test_trainer import Phases
from tests.patching.test_patch import patched_layers
from yolo_flash import patch_model
from yolo_flash.patching.patch import targets

# config -> (task, attention layers)
CASES = {
    "yolo12n.yaml": ("detect", 8),
    "yolo12n-seg.yaml": ("segment", 8),
    "yolo12n-pose.yaml": ("pose", 8),
    "yolo12n-obb.yaml": ("obb", 8),
    "yolo12n-cls.yaml": ("classify", 8),
    "yolo11n.yaml": ("detect", 1),
    "yolo11n-seg.yaml": ("segment", 1),
    "yolo11n-pose.yaml": ("pose", 1),
    "yolo11n-obb.yaml": ("obb", 1),
    "yolo11n-cls.yaml": ("classify", 1),
    "yolo26n.yaml": ("detect", 2),
    "yolo26n-seg.yaml": ("segment", 2),
    "yolo26n-pose.yaml": ("pose", 2),
    "yolo26n-obb.yaml": ("obb", 2),
    "yolo26n-cls.yaml": ("classify", 1),
    "yolo26n-sem.yaml": ("semantic", 1),
    "yolo26n-depth.yaml": ("depth", 2),
    "yolov10n.yaml": ("detect", 1),
    "yoloe-11n.yaml": ("detect", 1),
    "yoloe-11n-seg.yaml": ("segment", 1),
    "yoloe-26n.yaml": ("detect", 2),
    "yoloe-26n-seg.yaml": ("segment", 2),
}
NOT_TRAINED = ("yoloe-11n-seg.yaml", "yoloe-26n.yaml")  # whose heads and attention train in the other two of YOLOE
LOGGED = ("semantic", "depth")  # telemetry, which takes half of such a run, is tested with detection elsewhere


class EnoughError(Exception):
    """Ends a run whose steps are known."""


@dataclass
class Run:
    """What a training run did.

    Attributes:
        model: The object that was trained.
        phases: The fused operators that ran, by phase.
        losses: The loss items of every step.
        gradients: Of the packed projection of every attention layer, step by step.
    """

    model: Any
    phases: Phases = field(default_factory=Phases)
    losses: list[dict[str, float]] = field(default_factory=list)
    gradients: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def train(self, whole: bool, **args: Any) -> None:
        """Train an epoch of plain SGD, a step a batch, from weights to which attention matters.

        Args:
            whole: Go on to validate, save, and validate what was saved.
            **args: Of `YOLO.train`.
        """

        def start(trainer: Any) -> None:
            randomise(trainer.model)
            randomise(trainer.ema.ema)
            for name, block in targets(trainer.model).items():
                block.get_parameter("qkv.conv.weight").register_hook(self.gradients[name].append)

        def after_step(trainer: Any) -> None:
            self.losses.append({name: float(value) for name, value in trainer.loss_items.items()})

        def after_epoch(trainer: Any) -> None:
            if not whole:
                raise EnoughError

        self.phases.follow(self.model)
        self.model.add_callback("on_train_start", start)
        self.model.add_callback("on_train_batch_end", after_step)
        self.model.add_callback("on_train_epoch_end", after_epoch)
        with self.phases, nullcontext() if whole else pytest.raises(EnoughError):
            self.model.train(**args, optimizer="SGD", lr0=0.001, warmup_epochs=0, nbs=args["batch"])


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The data set of a task, and of so many classes, written when it is first asked for."""

    @functools.lru_cache
    def data(task: str, classes: int = 2) -> str:
        return create_dataset(tmp_path_factory.mktemp("data") / task, task, classes=classes)

    return data


@pytest.fixture
def no_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of class names without the text model, whose weights would be downloaded."""

    def embed(self: Any, text: list[str], *args: Any, **kwargs: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in text]
        return torch.stack([torch.nn.functional.normalize(torch.randn(512, generator=s), dim=0) for s in seeds])[None]

    for name in ("WorldModel", "YOLOEModel"):
        monkeypatch.setattr(f"ultralytics.nn.tasks.{name}.get_text_pe", embed)


def create(config: str) -> Model:
    """A `YOLO`, `YOLOE` or `YOLOWorld` object of a config."""
    torch.manual_seed(0)
    if config.startswith("yoloe"):
        return YOLOE(config)
    return YOLOWorld(config) if "world" in config else YOLO(config)


def arguments(config: str, task: str, data: Callable[..., str]) -> dict[str, Any]:
    """What `train` needs for a config. YOLOE's default trainer leaves out the texts, its others want 80 of them."""
    if not config.startswith("yoloe"):
        return {"data": data(task)}
    trainer = YOLOESegTrainerFromScratch if task == "segment" else YOLOETrainerFromScratch
    return {"trainer": trainer, "data": {split: {"yolo_data": [data(task, classes=80)]} for split in ("train", "val")}}


@pytest.mark.parametrize("config", [config for config in CASES if config not in NOT_TRAINED])
def test_a_model_trains_as_stock_does(
    config: str, tiny_args: dict[str, Any], tiny_data: Callable[..., str], no_text_model: None
) -> None:
    task, layers = CASES[config]
    stock, ours = Run(create(config)), Run(patch_model(create(config), backend="sdpa_flash", log=task in LOGGED))
    assert ours.model.task == task
    for run in (stock, ours):
        run.train(whole=run is ours, **{**tiny_args, "imgsz": 64, **arguments(config, task, tiny_data)})
    assert not stock.phases.calls
    assert ours.phases.calls["train batch"] == ours.phases.calls["train batch backward"] == layers * 2
    assert ours.phases.calls["ema validation"] >= layers
    assert ours.phases.calls["final"] >= layers
    assert patched_layers(ours.model.model) == layers
    trainer = ours.model.trainer
    assert Counter(row.mode for row in trainer.flash_plan) == {"train": layers, "val": layers}
    assert ("flash/images_per_second" in trainer.csv.read_text()) is (task in LOGGED)

    assert len(stock.losses) == len(ours.losses) == 2
    for step, expected in zip(ours.losses, stock.losses, strict=True):
        assert step == pytest.approx(expected, rel=1e-3)
    assert len(stock.gradients) == layers
    for name, gradients in stock.gradients.items():
        for got, wanted in zip(ours.gradients[name], gradients, strict=True):
            assert (got - wanted).norm() < 1e-3 * wanted.norm(), name  # and so the wanted one is not 0


def test_a_model_without_attention_of_ours_warns_once_and_trains_to_the_bits_of_stock(
    tiny_args: dict[str, Any], tiny_data: Callable[..., str], no_text_model: None, log: list[str]
) -> None:
    stock = Run(create("yolov8n-worldv2.yaml"))
    ours = Run(patch_model(create("yolov8n-worldv2.yaml"), backend="sdpa_flash"))
    for run in (stock, ours):
        run.train(whole=run is ours, **{**tiny_args, "imgsz": 64, "data": tiny_data("detect")})
    warnings = [line for line in log if "has no attention layer" in line]
    assert len(warnings) == 1
    assert "yolov8n-worldv2 has no attention layer that the plugin knows" in warnings[0]
    assert [
        line for line in log if re.fullmatch(r"yolo-flash: .* images/s, peak .* GiB reserved; epoch of .* rest", line)
    ]
    assert not ours.phases.calls
    assert ours.losses == stock.losses
