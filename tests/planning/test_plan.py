"""Every attention layer of every shipped model is found, and its spec is known before a step runs."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.tasks import guess_model_task, parse_model, yaml_model_load
from ultralytics.utils import ROOT

from tests.machines import MACHINES
from yolo_flash import BackendNotSupportedError, FlashConfig, patch_model, plan
from yolo_flash.assets.models import open_model
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.engine.run import commonest_shape
from yolo_flash.patching.patch import BLOCKS, patch_modules, targets
from yolo_flash.patching.shapes import layer_inputs
from yolo_flash.planning.inputs import RunInput, assumed_inputs, rounded_size
from yolo_flash.planning.plan import describe, make_plan

# scale -> (layers, heads) of the table in the README; YOLO12: (layers of each stage, heads of stage 6, of stage 8)
YOLO12 = {"n": (4, 2, 4), "s": (4, 4, 8), "m": (4, 8, 8), "l": (8, 8, 8), "x": (8, 12, 12)}
PSA = {"n": (1, 2), "s": (1, 4), "m": (1, 4), "l": (2, 4), "x": (2, 6)}
YOLOV10 = {"n": (2, 32, 64), "s": (4, 32, 64), "m": (4, 36, 72), "b": (4, 32, 64), "l": (4, 32, 64), "x": (5, 32, 64)}
SECOND_PSA = {"yolo26": 22, "yolo26-p2": 28, "yolo26-p6": 30}  # yolo26 has one more PSA in the neck, of one layer


def shipped() -> list[str]:
    folder = ROOT / "cfg" / "models"
    names = [file.name for version in ("11", "12", "26") for file in sorted((folder / version).glob("*.yaml"))]
    assert len(names) >= 24
    return [name for name in names if "resnet" not in name]  # its backbone comes from torchvision, downloaded


def layer_table(model: nn.Module) -> Counter[tuple[int, str, int, int, int]]:
    """(stage, block, heads, head_dim, head_dim_v) -> how many."""
    table: Counter[tuple[int, str, int, int, int]] = Counter()
    for name, block in targets(model).items():
        cls = BLOCKS[type(block)]
        problem = cls.problem(block, 1, 400)
        assert problem is not None
        stage = int(name.removeprefix("model.").split(".")[0])
        _, _, head_dim, head_dim_v, _ = problem
        heads: Any = block.num_heads
        table[stage, cls._stock.__name__, heads, head_dim, head_dim_v] += 1
    return table


def expected(name: str, scale: str) -> dict[tuple[int, str, int, int, int], int]:
    if name.startswith("yolo12"):
        count, heads6, heads8 = YOLO12[scale]
        return {(6, "AAttn", heads6, 32, 32): count, (8, "AAttn", heads8, 32, 32): count}
    count, heads = PSA[scale]
    stage = 9 if "-cls" in name else 12 if "-p6" in name else 10
    table = {(stage, "Attention", heads, 32, 64): count}
    if "26" in name and "-cls" not in name and "-sem" not in name:
        kind = "yolo26" + ("-p2" if "-p2" in name else "-p6" if "-p6" in name else "")
        table[SECOND_PSA[kind], "Attention", heads, 32, 64] = 1
    return table


def build(name: str) -> nn.Module:
    """The layers of a config, without memory for the weights."""
    config = yaml_model_load(name)
    with torch.device("meta"):
        model, _ = parse_model(config, ch=3, verbose=False)
    return nn.ModuleDict({"model": model})


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("name", shipped())
def test_layers_of_every_shipped_config(name: str, scale: str) -> None:
    scaled = re.sub(r"(yolo(?:e-)?\d+)", rf"\g<1>{scale}", name, count=1)
    assert layer_table(build(scaled)) == expected(name, scale)


@pytest.mark.parametrize("scale", YOLOV10)
def test_layers_of_yolov10(scale: str) -> None:
    heads, head_dim, head_dim_v = YOLOV10[scale]
    assert layer_table(build(f"yolov10{scale}.yaml")) == {(10, "Attention", heads, head_dim, head_dim_v): 1}


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov5n.yaml", "yolov9t.yaml"])
def test_models_without_attention_have_no_targets(name: str) -> None:
    assert not targets(build(name))


@pytest.mark.parametrize(
    ("name", "tokens"),  # tokens of an image at 512 x 512 -> layers
    [
        ("yolo12n.yaml", {1024: 4, 256: 4}),
        ("yolo12n-cls.yaml", {1024: 4, 256: 4}),
        ("yolo12n-seg.yaml", {1024: 4, 256: 4}),
        ("yolo11n-pose.yaml", {256: 1}),
        ("yolo26n.yaml", {256: 2}),
        ("yolo26n-obb.yaml", {256: 2}),
        ("yolo26n-p6.yaml", {64: 2}),
        ("yolo26n-sem.yaml", {256: 1}),
        ("yolo26n-depth.yaml", {256: 2}),
        ("yoloe-26n-seg.yaml", {256: 2}),
        ("yolov10n.yaml", {256: 1}),
    ],
)
def test_a_ghost_forward_tells_the_tokens(name: str, tokens: dict[int, int]) -> None:
    model = YOLO(name).model
    found = layer_inputs(model, targets(model), 3, 512, 512)
    assert list(found) == list(targets(model))
    assert {images for images, *_ in found.values()} == {3}
    assert Counter(count for _, count, _ in found.values()) == tokens


def test_a_ghost_forward_leaves_the_model_as_it_was() -> None:
    model = YOLO("yolo12n.yaml").model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng, mode = torch.get_rng_state(), model.training
    layer_inputs(model, targets(model), 2, 64, 96)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training is mode
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_plan_has_a_row_for_each_layer_and_mode() -> None:
    model = patch_model(YOLO("yolo12n.yaml"), layers={"model.8.*": "stock"})
    rows = plan(model, imgsz=640, batch=4, device="cpu")
    assert [row.mode for row in rows] == ["train"] * 8 + ["val"] * 8
    assert [row.layer for row in rows[:8]] == list(targets(model.model))
    first, last = rows[0].decision, rows[-1].decision
    assert (rows[0].block, first.backend, first.spec.batch, first.spec.seq_len_q) == ("AAttn", "sdpa_flash", 16, 400)
    assert first.spec.training
    assert (last.backend, last.why, last.spec.batch, last.spec.training) == ("stock", "asked for", 8, False)
    assert "sdpa_cudnn" in first.refused


def test_a_plan_for_another_machine() -> None:
    model = YOLO("yolo26n.yaml").model
    run_input = RunInput("train", 16, 640, 640, torch.float16, nhwc=True)
    for card, backend in (
        ("H100", "triton_area"),
        ("H100 without Triton", "sdpa_cudnn"),
        ("A100", "sdpa_flash"),
        ("MPS", "stock"),
    ):
        rows = make_plan(model, Dispatcher(FlashConfig()), MACHINES[card], [run_input])
        assert {row.decision.backend for row in rows} == {backend}


def test_a_plan_with_an_impossible_explicit_choice_raises() -> None:
    model = YOLO("yolo12n.yaml").model
    run_input = RunInput("train", 16, 640, 640, torch.float32, nhwc=True)
    with pytest.raises(BackendNotSupportedError, match="float16 or bfloat16, the tensors are float32"):
        make_plan(model, Dispatcher(FlashConfig(backend="sdpa_flash")), MACHINES["H100"], [run_input])


@pytest.mark.parametrize("name", ["sdpa_cudnn", "flash_attn_4"])
def test_a_backend_that_cannot_run_is_told_before_anything_is_measured(name: str) -> None:
    model = YOLO("yolo12n.yaml").model
    run_input = RunInput("train", 16, 640, 640, torch.float16, nhwc=True)
    dispatcher = Dispatcher(FlashConfig(layers={"model.8.*": name}))
    with pytest.raises(BackendNotSupportedError, match=f"backend={name} cannot run"):
        make_plan(model, dispatcher, MACHINES["CPU"], [run_input], lambda specs: pytest.fail("measured"))


def test_a_plan_of_a_stock_model_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="call patch_model first"):
        plan(YOLO("yolo12n.yaml"))


def test_the_description_folds_equal_rows_and_marks_what_is_not_reproducible() -> None:
    model = YOLO("yolo12x.yaml").model
    patch_modules(model, FlashConfig())
    run_input = RunInput("train", 16, 640, 640, torch.float16, nhwc=True, deterministic=True)
    card = MACHINES["H100 without Triton"]
    text = describe(make_plan(model, Dispatcher(FlashConfig()), card, [run_input]), card)
    lines = text.splitlines()
    assert lines[0] == "yolo-flash: 16 attention layers on NVIDIA H100 80GB HBM3 (Hopper, compute capability 9.0)"
    assert [line.split(maxsplit=9) for line in lines[2:4]] == [
        ["train", "8", "in", stage, "AAttn", groups, "12", "400", "sdpa_flash", "fused, for half precision"]
        for stage, groups in (("model.6", "64"), ("model.8", "16"))
    ]
    assert "flash.deterministic=strict" in lines[4]


def test_tasks_of_the_shipped_configs_are_all_covered() -> None:
    tasks = {guess_model_task(yaml_model_load(name)) for name in shipped()}
    assert tasks >= {"detect", "segment", "pose", "obb", "classify", "semantic", "depth"}


# The shapes of a validation -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "images", "side"),  # of a plan at 96 pixels, batch 4
    [
        ("yolo12n.yaml", 8, 128),
        ("yolo12n-seg.yaml", 8, 128),
        ("yolo26n-obb.yaml", 4, 128),
        ("yolo12n-cls.yaml", 8, 96),
        ("yolo26n-sem.yaml", 4, 96),
        ("yolo26n-depth.yaml", 4, 96),
        ("yolo26n-p6.yaml", 8, 128),
        ("rtdetr-l.yaml", 8, 96),
    ],
)
def test_a_plan_without_data_validates_square_pictures_as_the_task_does(name: str, images: int, side: int) -> None:
    model: Any = open_model(name).model
    train, val = assumed_inputs(model, rounded_size(model, 96), 4, True, on_gpu=False)
    assert (train.batch, train.height, train.width, train.deterministic) == (
        4,
        train.width,
        96 + 32 * ("p6" in name),
        True,
    )
    assert (val.batch, val.height, val.width) == (images, side + 64 * ("p6" in name), val.height)
    assert bool(val.note) is (side > 96)


def test_what_a_run_validates_is_what_its_plan_said(
    tiny_model: str, tiny_args: dict[str, Any], coco8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rectangular batches are padded by half a stride, and a batch holds no more pictures than there are."""
    model = patch_model(YOLO(tiny_model))
    seen: list[tuple[int, ...]] = []
    preprocess = DetectionValidator.preprocess

    def watch(validator: Any, batch: Any) -> Any:
        seen.append(tuple(batch["img"].shape))
        return preprocess(validator, batch)

    monkeypatch.setattr(DetectionValidator, "preprocess", watch)
    model.train(**{**tiny_args, "data": coco8, "imgsz": 96, "batch": 4})
    rows = [row.decision.spec for row in model.trainer.flash_plan if row.mode == "val"]
    (batch, _, height, width), *_ = seen
    assert {(batch, height // 8 * (width // 8))} == {
        (spec.batch // spec.area, spec.seq_len_q * spec.area) for spec in rows
    }
    from_command = plan(patch_model(YOLO(tiny_model)), imgsz=96, batch=2, device="cpu")
    assert [row.decision.spec for row in from_command if row.mode == "val"] == rows


@pytest.mark.parametrize(
    ("of_images", "shapes", "found"),
    [
        ([0, 0, 1, 1, 2], [(96, 128), (128, 128), (128, 128)], (2, 128, 128, False)),
        ([0, 0, 0, 1], [(96, 128), (128, 96)], (3, 96, 128, True)),
        ([0, 0, 0], [(96, 128)], (3, 96, 128, False)),
        ([0, 0, 1], [(96, 128), (96, 128)], (2, 96, 128, False)),
    ],
)
def test_where_no_shape_comes_again_the_plan_says_so(
    of_images: list[int], shapes: list[tuple[int, int]], found: tuple[int, int, int, bool]
) -> None:
    dataset = SimpleNamespace(rect=True, batch=np.array(of_images), batch_shapes=np.array(shapes))
    images, height, width, note = commonest_shape(dataset, 8, 96)
    assert (images, height, width, bool(note)) == found
    run_input = RunInput("val", images, 640, 640, torch.float32, nhwc=False, note=note)
    rows = make_plan(YOLO("yolo26n.yaml").model, Dispatcher(FlashConfig()), MACHINES["MPS"], [run_input])
    text = describe(rows, MACHINES["MPS"])
    assert ("2 batches, no two of one shape: planned is that of 96 x 128" in text) is bool(note)
