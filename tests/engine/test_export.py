"""Exported files are those of the stock model, operator by operator; the model is patched again afterwards."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO
from ultralytics.engine.model import Model
from ultralytics.nn.autobackend import AutoBackend

from tests.counting import AttentionCalls, settle
from tests.datasets import create_dataset
from tests.patching.test_patch import patched_layers
from yolo_flash import patch_model


def pair(config: str, folder: Path) -> tuple[Model, Model]:
    """A stock model to whose output attention matters, and its patched twin; exports go to folders of their own."""
    torch.manual_seed(0)
    stock = RTDETR(config) if config.startswith("rtdetr") else YOLO(config)
    settle(stock.model)
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    for name, model in (("stock", stock), ("ours", ours)):
        (folder / name).mkdir()
        model.model.pt_path = str(folder / name / "model.pt")
    return stock, ours


def torchscript_operators(file: str) -> Counter[str]:
    return Counter(node.kind() for node in torch.jit.load(file).inlined_graph.nodes())


def onnx_operators(file: str) -> Counter[str]:
    return Counter(node.op_type for node in importlib.import_module("onnx").load(file).graph.node)


def openvino_operators(file: str) -> Counter[str]:
    model = importlib.import_module("openvino").Core().read_model(next(Path(file).glob("*.xml")))
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


OPERATORS: dict[str, Callable[[str], Counter[str]]] = {
    "torchscript": torchscript_operators,
    "onnx": onnx_operators,
    "openvino": openvino_operators,
}
SOFTMAX = {"torchscript": "aten::softmax", "onnx": "Softmax", "openvino": "Softmax"}


def computed(file: str, x: Tensor, task: str = "detect") -> Tensor:
    """What an exported file answers."""
    with torch.inference_mode():
        answer = AutoBackend(file, device=torch.device("cpu"), verbose=False)(x)
    return answer[0] if isinstance(answer, (list, tuple)) else answer


@pytest.mark.parametrize(
    ("config", "format", "extra"),
    [
        ("yolo12n.yaml", "torchscript", {}),
        ("yolo26n.yaml", "torchscript", {}),
        ("yolo12n.yaml", "onnx", {}),
        ("yolo12n.yaml", "onnx", {"dynamic": True}),
        ("yolo12n.yaml", "onnx", {"quantize": 16}),
        ("yolo26n.yaml", "onnx", {"dynamic": True, "simplify": False}),
        ("yolo11n-seg.yaml", "onnx", {"nms": True}),
        ("rtdetr-resnet50.yaml", "onnx", {"simplify": False}),
        ("yolo12n.yaml", "openvino", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "static",
)
def test_an_exported_file_has_the_operators_and_answers_of_stock(
    config: str, format: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    if format != "torchscript":
        pytest.importorskip(format)
    stock, ours = pair(config, tmp_path)
    layers = patched_layers(ours.model)
    x = torch.rand(1, 3, 64, 64)
    files = [str(model.export(format=format, imgsz=64, verbose=False, **extra)) for model in (stock, ours)]
    operators = [OPERATORS[format](file) for file in files]
    assert operators[0] == operators[1]
    assert operators[1][SOFTMAX[format]] >= layers
    assert not any("ScaledDotProduct" in name or "scaled_dot_product" in name for name in operators[1])
    answers = [computed(file, x) for file in files]
    assert torch.equal(answers[0], answers[1])
    if extra.get("dynamic"):
        larger = torch.rand(2, 3, 96, 64)
        assert torch.equal(computed(files[0], larger), computed(files[1], larger))

    assert patched_layers(ours.model) == layers
    with AttentionCalls() as calls, torch.no_grad():
        own = ours.model.eval()(x)[0]
    assert calls.forward["sdpa_flash"] == layers
    if config == "yolo12n.yaml" and format != "openvino" and not extra:  # single precision, and boxes in order
        assert (answers[1] - own).norm() < 1e-3 * own.norm()


def test_export_sees_a_stock_model_and_patches_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash")
    types: list[int] = []
    exporter = "ultralytics.engine.exporter.Exporter"
    monkeypatch.setattr(f"{exporter}.__call__", lambda self, model: types.append(patched_layers(model)))
    model.export(format="torchscript")
    assert types == [0]
    assert patched_layers(model.model) == 8
    with AttentionCalls() as calls, torch.no_grad():
        model.model.eval()(torch.rand(1, 3, 64, 64))
    assert calls.forward["sdpa_flash"] == 8

    def fail(self: Any, model: nn.Module) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(f"{exporter}.__call__", fail)
    with pytest.raises(RuntimeError, match="no"):
        model.export(format="torchscript")
    assert patched_layers(model.model) == 8


def test_an_export_that_fails_by_itself_leaves_the_model_patched(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, ours = pair("yolo12n.yaml", tmp_path)
    with pytest.raises(AssertionError, match="requires opset"):
        ours.export(format="onnx", imgsz=64, opset=3, verbose=False)
    assert patched_layers(ours.model) == 8
    with pytest.raises(ValueError, match="Invalid export format"):
        ours.export(format="no such format")
    assert patched_layers(ours.model) == 8


@pytest.mark.parametrize("format", ["-", "torchscript"])
def test_a_benchmark_runs_and_its_native_row_is_fused(format: str, tmp_path: Path) -> None:
    _, ours = pair("yolo12n.yaml", tmp_path)
    data = create_dataset(tmp_path / "data", "detect")
    ours.save(ours.model.pt_path)  # whose size the native row tells
    with AttentionCalls() as calls:
        table = ours.benchmark(data=data, imgsz=64, format=format, device="cpu", verbose=True)
    assert table["Status❔"].to_list() == ["✅"]
    assert (calls.forward["sdpa_flash"] >= 8) is (format == "-")
    assert patched_layers(ours.model) == 8
