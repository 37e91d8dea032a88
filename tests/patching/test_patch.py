"""patch_model and unpatch_model: idempotent, undone to the bit, invisible in pickles, and blind to what is not ours."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.modules.block import AAttn
from ultralytics.utils import ASSETS

from tests.counting import AttentionCalls, in_threads, randomise
from yolo_flash import BackendNotSupportedError, FlashConfigError, patch_model, plan, unpatch_model
from yolo_flash.patching.blocks import FlashBlock
from yolo_flash.patching.patch import targets


def yolo(name: str = "yolo12n.yaml") -> YOLO:
    torch.manual_seed(0)
    model = YOLO(name)
    randomise(model.model)
    return model


def patched_layers(module: nn.Module) -> int:
    return sum(isinstance(block, FlashBlock) for block in module.modules())


def output(model: nn.Module, size: int = 64) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.rand(1, 3, size, size))[0]


def saved(module: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def data_pkl(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as z:
        return z.read(next(name for name in z.namelist() if name.endswith("data.pkl")))


def test_a_yolo_object_is_patched_in_place_and_runs_the_backend() -> None:
    model = yolo()
    assert patch_model(model, backend="sdpa_flash") is model
    assert patched_layers(model.model) == 8
    with AttentionCalls() as calls:
        output(model.model)
    assert calls.forward == {"sdpa_flash": 8}


def test_output_is_that_of_the_stock_model_and_attention_matters_to_it() -> None:
    stock = output(yolo().model)
    ours = output(patch_model(yolo(), backend="sdpa_flash").model)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    blind = yolo()
    for block in targets(blind.model).values():
        nn.init.zeros_(block.proj.conv.weight)  # type: ignore[union-attr, arg-type]
    assert (output(blind.model) - stock).abs().max() > 1


def test_a_plain_module_is_patched_too() -> None:
    module = nn.Sequential(AAttn(64, 2, 1), nn.ModuleDict({"deep": AAttn(64, 2, 4)}))
    assert patch_model(module) is module
    assert patched_layers(module) == 2


def test_patching_twice_is_patching_once_with_the_last_settings() -> None:
    model = patch_model(patch_model(yolo(), backend="sdpa_math"), backend="sdpa_flash")
    assert patched_layers(model.model) == 8
    with AttentionCalls() as calls:
        output(model.model)
    assert calls.forward == {"sdpa_flash": 8}
    unpatch_model(model)
    assert type(model) is YOLO


def test_undo_is_bit_identical() -> None:
    model = yolo()
    before, bits, attributes = output(model.model), data_pkl(saved(model.model)), set(vars(model))
    patch_model(model, backend="sdpa_flash")
    model.predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)
    assert unpatch_model(model) is model
    assert type(model) is YOLO
    assert all(type(block) is AAttn for block in targets(model.model).values())
    assert set(vars(model)) == attributes
    assert torch.equal(output(model.model), before)
    assert data_pkl(saved(model.model)) == bits
    unpatch_model(model)  # of a stock model: nothing happens
    assert type(model) is YOLO


def test_disabled_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert patched_layers(patch_model(yolo(), enabled=False).model) == 0
    monkeypatch.setenv("YOLO_FLASH", "0")
    assert patched_layers(patch_model(yolo(), backend="sdpa_flash").model) == 0
    assert patched_layers(patch_model(nn.Sequential(AAttn(64, 2)))) == 0


def test_a_patched_model_that_is_disabled_becomes_stock() -> None:
    model = patch_model(yolo())
    assert patched_layers(patch_model(model, enabled=False).model) == 0


def test_mistakes_leave_the_model_as_it_was() -> None:
    model = yolo()
    with pytest.raises(FlashConfigError, match="Did you mean 'backend'"):
        patch_model(model, backnd="sdpa_flash")
    with pytest.raises(BackendNotSupportedError, match="Did you mean 'sdpa_flash'"):
        patch_model(model, backend="sdpa_flas")
    with pytest.raises(
        FlashConfigError, match=r"'model\.5\.\*' matches no attention layer\. This model has model\.6\."
    ):
        patch_model(model, layers={"model.5.*": "stock"})
    assert type(model) is YOLO
    assert patched_layers(model.model) == 0
    module = patch_model(nn.Sequential(AAttn(64, 2)))
    with pytest.raises(FlashConfigError, match="matches no attention layer"):
        patch_model(module, layers={"nope": "stock"})
    assert patched_layers(module) == 1
    with pytest.raises(FlashConfigError, match="no setting 'cli'"):
        patch_model(module, cli={"backend": "stock"})


def test_layers_by_pattern_and_the_last_match_wins() -> None:
    model = patch_model(yolo(), backend="sdpa_flash", layers={"model.6.*": "sdpa_math", "model.6.m.0.0.attn": "stock"})
    with AttentionCalls() as calls:
        output(model.model)
    assert calls.forward == {"sdpa_flash": 4}
    choices = [block._flash_choice for block in targets(model.model).values()]
    assert choices == ["stock", *["sdpa_math"] * 3, *["sdpa_flash"] * 4]


def test_no_targets_is_one_warning(log: list[str]) -> None:
    for model in (YOLO("yolov8n.yaml"), YOLO("yolov8n.yaml").model):
        log.clear()
        patch_model(model)
        assert [line for line in log if "has no attention layer" in line and "yolov8n" in line] == log
        assert len(log) == 1


def test_a_subclass_of_the_user_is_left_alone() -> None:
    class MyAttn(AAttn):
        pass

    module = nn.Sequential(MyAttn(64, 2), AAttn(64, 2))
    patch_model(module)
    assert type(module[0]) is MyAttn
    assert patched_layers(module) == 1


def test_a_subclass_of_yolo_keeps_its_methods() -> None:
    class MyYOLO(YOLO):
        def hello(self) -> str:
            return "hello"

    model = patch_model(MyYOLO("yolo12n.yaml"))
    assert isinstance(model, MyYOLO)
    assert model.hello() == "hello"
    assert model.__class__ is MyYOLO


def test_a_subclass_with_its_own_state_pickles_and_copies_as_it_would() -> None:
    class Locked(YOLO):
        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in vars(self).items() if name != "lock"}

    model = Locked("yolo12n.yaml")
    model.__dict__["lock"] = threading.Lock()
    patch_model(model)
    twin = copy.deepcopy(model)
    assert "lock" not in vars(twin)
    assert patched_layers(twin.model) == 8
    reduced: Any = model.__reduce_ex__(2)
    state = reduced[2]
    assert reduced[1] == (Locked,)
    assert "lock" not in state
    assert not any("flash" in name for name in state)


def test_rtdetr_objects_are_accepted(log: list[str]) -> None:
    model = RTDETR("rtdetr-l.yaml")
    patch_model(model)
    assert isinstance(model, RTDETR)
    assert len(targets(model.model)) == 7
    assert not any("has no attention layer" in line for line in log)


def test_the_world_sees_stock_classes() -> None:
    block = next(iter(targets(patch_model(yolo()).model).values()))
    assert type(block) is not AAttn
    assert block.__class__ is AAttn
    assert isinstance(block, AAttn)
    assert block._get_name() == "AAttn"
    assert not {name for name in block.state_dict() if "flash" in name}


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_stay_patched(copier: Any) -> None:
    model = patch_model(yolo(), backend="sdpa_flash")
    twin = copier(model)
    assert type(twin) is type(model)
    assert patched_layers(twin.model) == 8
    block = next(iter(targets(model.model).values()))
    assert type(copier(block)) is type(block)
    with AttentionCalls() as calls:
        output(copy.deepcopy(model.model))
    assert calls.forward == {"sdpa_flash": 8}


def test_pickles_are_byte_identical_to_stock() -> None:
    stock, ours = yolo(), patch_model(yolo(), backend="sdpa_flash")
    assert data_pkl(saved(ours.model)) == data_pkl(saved(stock.model))
    assert b"yolo_flash" not in pickle.dumps(ours)
    back = pickle.loads(pickle.dumps(ours))
    assert type(back) is YOLO
    assert type(next(iter(targets(back.model).values()))) is AAttn


def test_saved_models_load_where_the_plugin_cannot_be_imported(tmp_path: Path) -> None:
    model = patch_model(yolo())
    model.save(str(tmp_path / "saved.pt"))
    assert patched_layers(model.model) == 8  # saving does not unpatch
    load_without_plugin(tmp_path / "saved.pt")


def load_without_plugin(weights: Path) -> None:
    """Load and predict in a process where importing yolo_flash raises, also with Ultralytics' safe unpickler."""
    code = f"""
import sys
sys.modules["yolo_flash"] = None  # any import of it raises
from ultralytics import YOLO, ASSETS
from torch.nn import MultiheadAttention
from ultralytics.nn.modules.block import AAttn, Attention
model = YOLO({str(weights)!r})
assert any(type(m) in (AAttn, Attention, MultiheadAttention) for m in model.model.modules())
model.predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)
"""
    for safe in ("0", "1"):
        env = {**__import__("os").environ, "ULTRALYTICS_SAFE_LOAD": safe}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


def test_two_models_with_two_settings_in_two_threads() -> None:
    models = {name: patch_model(yolo(), backend=name).model.eval() for name in ("sdpa_flash", "sdpa_math")}
    x = torch.rand(1, 3, 64, 64)
    counts = in_threads({name: functools.partial(model, x) for name, model in models.items()}, repeats=5)
    assert counts["sdpa_flash"].forward == {"sdpa_flash": 40}
    assert not counts["sdpa_math"].forward


def test_predict_before_and_after_patching(tmp_path: Path) -> None:
    """The predictor caches a copy of the model: patching has to drop it, and so has undoing."""
    model = yolo()

    def predict() -> AttentionCalls:
        with AttentionCalls() as calls:
            model.predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)
        return calls

    assert not predict().forward
    patch_model(model, backend="sdpa_flash")
    assert predict().forward["sdpa_flash"] >= 8
    unpatch_model(model)
    assert not predict().forward


def test_predict_on_mixed_shapes_is_a_bounded_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_flash.dispatch.dispatcher._MAX_DECISIONS", 4)
    model = patch_model(yolo(), backend="sdpa_flash")
    block: Any = next(iter(targets(model.model).values()))
    dispatcher = block._flash_dispatcher
    for height in (64, 96, 128, 160, 192):
        with torch.no_grad():
            model.model.eval()(torch.rand(1, 3, height, 64))
        assert len(dispatcher._decisions) <= 4


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml", "rtdetr-resnet50.yaml"])
def test_the_gflops_are_those_of_stock(config: str) -> None:
    model = (RTDETR if config.startswith("rtdetr") else YOLO)(config)
    stock: Any = model.info()
    patch_model(model, backend="sdpa_flash")
    assert model.info() == stock
    assert stock[3] > 0
    with AttentionCalls() as calls:
        output(model.model)
    assert calls.forward["sdpa_flash"] == patched_layers(model.model)  # fused again


def test_a_fused_model_stays_patched() -> None:
    ours = patch_model(yolo(), backend="sdpa_flash")
    before = output(ours.model)
    ours.fuse(verbose=False)
    assert patched_layers(ours.model) == 8
    torch.testing.assert_close(output(ours.model), before, rtol=1e-3, atol=1e-2)


def test_an_exported_model_is_told_and_left_alone(log: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.mnn").touch()  # nothing is read before predict
    model = patch_model(YOLO(str(tmp_path / "model.mnn"), task="detect"))
    assert any("exported model" in line for line in log)
    with pytest.raises(TypeError, match="should be a"):  # as the stock object says it
        model.export()
    with pytest.raises(ValueError, match="call patch_model first"):
        plan(model)
    assert type(unpatch_model(model)) is YOLO
