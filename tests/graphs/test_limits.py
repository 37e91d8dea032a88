"""What forbids CUDA graphs in a run, and that nothing of torch's, Ultralytics' or ours does."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics import RTDETR, YOLO, YOLOWorld
from ultralytics.nn.modules.head import RTDETRDecoder

from yolo_flash import patch_model
from yolo_flash.graphs.limits import not_supported_reasons
from yolo_flash.utils.stock_code import foreign


class PlainTrainer(SimpleNamespace):
    """Without a run."""


def a_trainer(model: nn.Module, device: str = "cpu", **args: Any) -> Any:
    known = {"compile": False, "multi_scale": 0.0, "rect": False, "imgsz": 32, **args}
    return PlainTrainer(
        model=model,
        args=SimpleNamespace(**known),
        device=torch.device(device),
        train_loader=SimpleNamespace(batch_size=2),
        world_size=1,
        epoch=0,
        _clear_memory=lambda: None,
    )


def among_ranks(trainer: Any) -> Any:
    """The trainer of one of two ranks, whose model DDP has, without a process group."""
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(model)
    model.module, model._comm_hooks, model.parameters_to_ignore = trainer.model, [], set()
    model.require_backward_grad_sync = True
    trainer.model, trainer.world_size = model, 2
    return trainer


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml", "rtdetr-l.yaml"])
def test_auto_takes_stock_and_patched_models(config: str) -> None:
    """No class of ours counts as a user's, wherever it lies within the package."""
    yolo = (RTDETR if config.startswith("rtdetr") else YOLO)(config)
    for patched in (False, True):
        model: Any = patch_model(yolo).model if patched else yolo.model
        ours = {type(module).__module__ for module in model.modules() if "yolo_flash" in type(module).__module__}
        assert bool(ours) is patched
        assert foreign(model.modules()) == ""
        assert not_supported_reasons(a_trainer(model, "cuda"), "auto") == []


class OfTheUser(nn.Module):
    """Whose forward may be another in every step."""


@pytest.mark.parametrize("patched", [False, True])
def test_auto_leaves_modules_alone_that_nobody_has_looked_through(patched: bool, detector: Any) -> None:
    model = copy.deepcopy(detector)
    if patched:
        patch_model(model)
    model.model[1].add_module("mine", OfTheUser())
    (found,) = not_supported_reasons(a_trainer(model, "cuda"), "auto")
    assert "OfTheUser is neither torch's nor Ultralytics' and may do something else in every step" in found
    assert "flash.graphs=on captures it" in found
    assert not_supported_reasons(a_trainer(model, "cuda"), "on") == []


def test_a_plain_run_on_a_card_may_have_graphs(detector: Any) -> None:
    assert not_supported_reasons(a_trainer(detector, "cuda"), "auto") == []


@pytest.mark.parametrize(
    ("args", "mode", "reason"),
    [
        ({"compile": True}, "on", "compile=True"),
        ({"multi_scale": 0.5}, "auto", "multi_scale=0.5"),
        ({"rect": True}, "auto", "rect=True"),
        ({"quantize": 8}, "on", "quantisation"),
    ],
)
def test_arguments_that_forbid_graphs(args: dict[str, Any], mode: str, reason: str, detector: Any) -> None:
    (found,) = not_supported_reasons(a_trainer(detector, "cuda", **args), mode)
    assert reason in found


@pytest.mark.parametrize("args", [{"multi_scale": 0.5}, {"rect": True}])
def test_on_takes_the_batches_that_have_the_shape(args: dict[str, Any], detector: Any) -> None:
    assert not_supported_reasons(a_trainer(detector, "cuda", **args), "on") == []


@pytest.mark.parametrize("args", [{"multi_scale": 0.5}, {"rect": True}])
def test_ranks_whose_shapes_differ_have_none(args: dict[str, Any], detector: Any) -> None:
    trainer = among_ranks(a_trainer(detector, "cuda", **args))
    assert len(not_supported_reasons(trainer, "on")) == 1


def test_ranks_that_average_in_another_way_have_none(detector: Any) -> None:
    trainer = among_ranks(a_trainer(detector, "cuda"))
    assert not_supported_reasons(trainer, "on") == []
    trainer.model._comm_hooks.append((print, None))
    assert not_supported_reasons(trainer, "on") == ["a communication hook of DDP would not be called"]
    trainer.model._comm_hooks.clear()
    own = "a training loop or optimizer step of a user's own may not average the gradients of ranks"
    trainer.optimizer_step = print
    assert not_supported_reasons(trainer, "on") == [own]
    del trainer.optimizer_step
    step = type("OwnStep", (PlainTrainer,), {"optimizer_step": lambda self: None})
    assert not_supported_reasons(step(**vars(trainer)), "on") == []  # behind ours
    loop = type("OwnLoop", (PlainTrainer,), {"_do_train": lambda self: None})
    assert not_supported_reasons(loop(**vars(trainer)), "on") == [own]
    trainer.model = detector
    assert not_supported_reasons(trainer, "on") == ["ranks need DistributedDataParallel, found DetectionModel"]


def test_a_device_without_graphs(detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not_supported_reasons(a_trainer(detector), "auto") == ["needs an NVIDIA GPU, the device is cpu"]
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not_supported_reasons(a_trainer(detector, "cuda"), "auto") == ["needs an NVIDIA GPU, the device is ROCm"]


def test_models_whose_network_takes_more_than_images() -> None:
    model = YOLOWorld("yolov8s-world.yaml").model
    (reason,) = not_supported_reasons(a_trainer(model, "cuda"), "on")
    assert reason == "WorldModel gives its network more than images, or takes more from it"


def test_what_takes_the_place_of_the_forward_of_rtdetrs_head_is_run() -> None:
    """The graphs have a forward of their own for it; `on` captures layers of a user's, but this one it cannot."""
    model: Any = RTDETR("rtdetr-resnet50.yaml").model
    trainer, head = a_trainer(model, "cuda"), model.model[-1]
    assert not_supported_reasons(trainer, "on") == []
    head.forward = lambda *args: RTDETRDecoder.forward(head, *args)
    assert not_supported_reasons(trainer, "on") == ["RTDETRDecoder.forward is not Ultralytics' own"]
    del head.forward
    head.__class__ = type("Mine", (RTDETRDecoder,), {"forward": lambda self, *args: None})
    assert not_supported_reasons(trainer, "on") == ["Mine.forward is not Ultralytics' own"]
    model.model[-1] = nn.Identity()
    assert not_supported_reasons(trainer, "on") == ["Identity is not Ultralytics' own"]


def test_what_a_user_does_to_the_model(detector: Any) -> None:
    model = copy.deepcopy(detector)
    handle = model.model[3].register_forward_hook(lambda *args: None)
    assert not_supported_reasons(a_trainer(model, "cuda"), "on") == ["a hook on model.3 would not be called"]
    handle.remove()
    model.loss = lambda batch, preds=None: None
    (reason,) = not_supported_reasons(a_trainer(model, "cuda"), "on")
    assert reason == "DetectionModel.loss is not Ultralytics' own"
    del model.loss
    model.extra = nn.SyncBatchNorm(4)
    assert not_supported_reasons(a_trainer(model, "cuda"), "on") == ["SyncBatchNorm talks to other ranks"]
    with torch.autograd.set_detect_anomaly(True):
        assert any("anomaly" in reason for reason in not_supported_reasons(a_trainer(detector, "cuda"), "on"))


def test_distillation(detector: Any) -> None:
    pair = nn.Module()
    pair.teacher_model = detector
    (reason,) = not_supported_reasons(a_trainer(pair, "cuda"), "on")
    assert "distillation" in reason


def test_a_forward_of_a_users_own_is_not_run_twice(detector: Any) -> None:
    class Mine(type(detector)):  # type: ignore[misc]
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x * 2, *args, **kwargs)

    model = copy.deepcopy(detector)
    model.__class__ = Mine
    (reason,) = not_supported_reasons(a_trainer(model, "cuda"), "on")
    assert "gives its network more than images" in reason
