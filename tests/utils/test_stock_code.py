"""Code that is not torch's, Ultralytics' or ours is found, wherever it was put; theirs never is."""

import functools
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import ultralytics.utils.loss as loss_module
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.loss import v8DetectionLoss, v8PoseLoss

from yolo_flash import patch_model
from yolo_flash.utils.stock_code import foreign, helpers

MODELS = ("yolo12n", "yolo26n", "yolov10n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls", "yolov8n")


def parts_of(criterion):
    held = (criterion, criterion.assigner, *criterion.bbox_loss.modules(), criterion.bce)
    return [part for part in held if hasattr(part, "__dict__")]


@pytest.fixture(scope="module")
def model():
    model = YOLO("yolo12n.yaml").model
    model.args = DEFAULT_CFG
    return model


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_stock_patched_and_fused(name):
    model = YOLO(f"{name}.yaml").model
    assert foreign(model.modules()) == ""
    assert foreign(patch_model(model).modules()) == ""
    assert foreign(model.eval().fuse(verbose=False).modules()) == ""


def test_what_torch_s_compiler_does_to_torch_is_torch_s(model):
    from torch._dynamo.mutation_guard import install_generation_tagging_init

    install_generation_tagging_init()  # as every compilation does, for good
    assert foreign(model.modules()) == ""


def test_the_criterion_and_the_trainer_are_stock(model):
    assert foreign(parts_of(model.init_criterion())) == ""
    trainer = object.__new__(DetectionTrainer)
    assert foreign([trainer], ("preprocess_batch", "optimizer_step", "_do_train")) == ""


def mine(self, *args, **kwargs):
    return None


class Standing:
    """An object in the place of a function, as wrapt and mocks put one."""

    def __init__(self, original=None):
        self.original = original

    def __get__(self, obj, cls=None):
        return self if obj is None else MethodType(self, obj)

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs)


def wrapped(original):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("cls", "name", "replacement"),
    [
        (BaseModel, "loss", mine),
        (BaseModel, "loss", wrapped(BaseModel.loss)),  # bears the names of the original
        (BaseModel, "predict", torch.no_grad()(BaseModel.predict)),  # torch's decorator, which does not stand there
        (DetectionModel, "loss", mine),  # where there was none
        (v8DetectionLoss, "bbox_decode", v8PoseLoss.kpts_decode),  # Ultralytics', of another class
        (nn.Conv2d, "forward", mine),
        (v8DetectionLoss, "loss", functools.partial(mine, None)),
        (v8DetectionLoss, "loss", functools.partialmethod(mine)),
        (v8DetectionLoss, "loss", functools.lru_cache(v8DetectionLoss.loss)),
        (BaseModel, "loss", Standing(BaseModel.loss)),
        (BaseModel, "loss", torch.enable_grad()(functools.update_wrapper(Standing(BaseModel.loss), BaseModel.loss))),
        (nn.Conv2d, "forward", torch.no_grad()(mine)),
    ],
)
def test_a_function_replaced_on_a_class_is_foreign(model, monkeypatch, cls, name, replacement):
    monkeypatch.setattr(cls, name, replacement, raising=False)
    found = foreign([*model.modules(), *parts_of(model.init_criterion())])
    assert found == f"{cls.__name__}.{name}"


def test_a_function_replaced_on_an_instance_is_foreign(model, monkeypatch):
    layer = model.model[1]
    for value in (MethodType(mine, layer), mine, functools.partial(mine, layer), lambda x: x, layer.conv):
        monkeypatch.setitem(vars(layer), "forward", value)
        assert foreign(model.modules()) == "Conv.forward", value


def test_a_helper_that_was_replaced_is_foreign(model, monkeypatch):
    parts = parts_of(model.init_criterion())
    monkeypatch.setattr(loss_module, "bbox_iou", wrapped(loss_module.bbox_iou))
    assert foreign(parts) == "ultralytics.utils.loss.bbox_iou"
    monkeypatch.setattr(loss_module, "bbox_iou", torch.no_grad()(mine))
    assert foreign(parts) == "ultralytics.utils.loss.bbox_iou"
    monkeypatch.setattr(loss_module, "bbox_iou", Standing())
    assert foreign(parts) == "ultralytics.utils.loss.bbox_iou"
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.functional, "log_softmax", mine)
    assert foreign(parts) == "torch.nn.functional.log_softmax"


def test_what_no_step_calls_may_be_anybody_s(model, monkeypatch):
    """Experiment trackers wrap `torch.save`."""
    monkeypatch.setattr(torch, "save", wrapped(torch.save))
    assert foreign(model.modules()) == ""


def test_a_class_that_pretends_to_be_of_ultralytics_is_foreign():
    class Aux(nn.Module):
        def forward(self, x):
            return x

    assert foreign([Aux()]) == "Aux"
    Aux.__module__ = "ultralytics.nn.modules.block"
    assert foreign([Aux()]) == "Aux.forward"
    assert foreign([type("Mine", (nn.Module,), {"__module__": "mine"})()]) == "Mine"


def test_of_a_user_s_class_named_functions_alone_can_be_stock():
    own: Any = type("Mine", (DetectionTrainer,), {"validate": mine, "__module__": "mine"})
    trainer = object.__new__(own)
    assert foreign([trainer], ("preprocess_batch", "_do_train")) == ""
    assert foreign([trainer], ("validate",)) == "Mine.validate"
    assert foreign([trainer]) == "Mine"


def test_values_that_are_no_functions_do_not_matter():
    assert foreign([SimpleNamespace()]) == "SimpleNamespace"
    linear: Any = nn.Linear(2, 2)
    linear.note = {"any": "thing"}
    assert foreign([linear]) == ""


def test_helpers_are_where_functions_look_them_up(model):
    names = {name for _, name in helpers(parts_of(model.init_criterion()))}
    assert {"bbox_iou", "make_anchors", "xywh2xyxy", "dist2bbox"} <= names
