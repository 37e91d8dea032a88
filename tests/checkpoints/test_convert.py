"""Whole checkpoints: outputs, everything around the weights, where stock Ultralytics loads them, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import classify_transforms
from ultralytics.nn.modules.block import AAttn
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils import YAML, IterableSimpleNamespace

from tests.checkpoints.forks import MODELS, checkpoint, fork_model, save, tiny_fork
from yolo_flash import CheckpointError, convert
from yolo_flash.checkpoints.reading import globals_in, names_authors_layout, read_checkpoint


def tensors(found: Any) -> list[Tensor]:
    """All tensors of an output, however it is nested."""
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [t for value in values for t in tensors(value)]


def assert_close(found: Any, wanted: Any, allowed: float) -> None:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    assert pairs
    for one, other in pairs:
        assert (one - other).norm() <= allowed * other.norm()


def stock_yaml(folder: Path) -> str:
    layers: list[Any] = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 32)] + [[-1, 1, "A2C2f", [128, True, 4]]]
    yaml = {"nc": 7, "scales": {"n": [1.0, 1.0, 1024]}, "backbone": layers, "head": [[[2], 1, "Detect", ["nc"]]]}
    YAML.save(folder / "tiny.yaml", yaml)
    return str(folder / "tiny.yaml")


def globals_of(file: Path) -> set[tuple[str, str]]:
    return globals_in(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl"))


def outputs(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("scale", list("nsmlx"))
def test_all_sizes_compute_the_same_and_are_rebuilt_from_their_yaml(scale: str, tmp_path: Path) -> None:
    fork = fork_model(scale).half().float()  # published weights are in half precision
    x = torch.rand(1, 3, 64, 128)  # 4x8 and 2x4 tokens
    wanted = outputs(fork, x)
    ours = convert(save(fork.half(), tmp_path / "fork.pt"))
    blocks = [module for module in fork.float().modules() if isinstance(module, AAttn)]
    assert {block.area for block in blocks} == {1, 4}
    assert len(blocks) == (8 if scale in "nsm" else 16)
    for block in blocks:  # a change of attention is seen
        block.v.bn.bias.data += 0.1
    assert max((a - b).norm() / a.norm() for a, b in zip(*map(tensors, (wanted, outputs(fork, x))), strict=True)) > 1e-3
    (tmp_path / "fork.pt").unlink()  # a hundred megabytes for x
    model = YOLO(ours).model
    assert_close(outputs(model, x), wanted, 1e-5)
    assert model.yaml == fork.yaml
    assert model.yaml["backbone"][1][3] == [128, 3, 2, 1, 2]
    ours.unlink()
    if scale in "nl":  # without gamma and with it; the others are built by the same rules, in more time
        rebuilt = type(model)(model.yaml, nc=model.yaml["nc"], verbose=False)
        rebuilt.load_state_dict(model.state_dict())
        assert repr(rebuilt.model) == repr(model.model).replace("SiLU(inplace=True)", "SiLU()")


@pytest.mark.parametrize("task", [task for task in MODELS if task])
def test_all_tasks(task: str, tmp_path: Path) -> None:
    fork = fork_model("n", task)
    x = torch.rand(2, 3, 96, 160)
    wanted = outputs(fork, x)
    model = YOLO(convert(save(fork, tmp_path / "fork.pt"))).model
    assert type(model) is MODELS[task]
    assert_close(outputs(model, x), wanted, 1e-5)


def test_odd_sizes(tmp_path: Path) -> None:
    fork = tiny_fork(dim=192).double()  # three heads
    x = torch.rand(3, 3, 20, 12, dtype=torch.float64)  # 5x3 tokens do not fall into four areas
    for module in fork.modules():
        if isinstance(module, AAttn):
            module.area = {4: 3, 1: 1}[module.area]
    wanted = outputs(fork, x)
    model = YOLO(convert(save(fork, tmp_path / "fork.pt"))).model.double()
    assert_close(outputs(model, x), wanted, 1e-12)


# What is around the weights ------------------------------------------------------------------------------------------
def test_everything_else_is_kept(tmp_path: Path, log: list[str]) -> None:
    fork = tiny_fork()
    fork.args = IterableSimpleNamespace(imgsz=64, box=7.5)
    fork.stem = Path("runs") / "x"
    fork.model[-1].detect = Detect.forward  # heads of older releases keep it
    more = {
        "epoch": 41,
        "best_fitness": np.float64(0.37),
        "ema": None,
        "updates": 1234,
        "size": torch.Size([3, 4]),
        "own": {"of a callback": {1, 2}},
    }
    file = save(fork.half(), tmp_path / "last.pt", **more)
    before = file.read_bytes()
    source = torch.load(file, weights_only=False)
    target = convert(file)
    assert target == tmp_path / "last-ultralytics.pt"
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-ultralytics.pt", "last.pt"]
    found = torch.load(target, weights_only=False)
    assert list(found) == list(source)
    for key in found.keys() - {"model"}:
        assert found[key] == source[key], key
        assert type(found[key]) is type(source[key]), key
    for name in ("names", "yaml", "stride", "save", "args", "stem", "nc"):
        assert vars(found["model"]).get(name) == vars(source["model"]).get(name) or name == "stride"
    assert torch.equal(found["model"].stride, source["model"].stride)
    assert found["model"].model[-1].detect is Detect.forward
    assert found["model"].args.box == 7.5
    assert {t.dtype for t in found["model"].state_dict().values()} == {torch.float16, torch.int64}
    unchanged = [name for name in source["model"].state_dict() if ".attn." not in name]
    assert len(unchanged) > 50
    for name in unchanged:
        assert torch.equal(found["model"].state_dict()[name], source["model"].state_dict()[name]), name
    assert log[-1] == f"yolo-flash: 4 attention layers of {file} written in the layout of ultralytics: {target}."


def test_what_trainers_leave_on_a_model_is_read(tmp_path: Path) -> None:
    fork = tiny_fork()
    fork.args = get_cfg()
    fork.criterion = fork.init_criterion()
    fork.transforms = classify_transforms(32)
    found = torch.load(convert(save(fork, tmp_path / "fork.pt")), weights_only=False)["model"]
    assert type(found.criterion) is type(fork.criterion)
    assert repr(found.criterion.assigner) == repr(fork.criterion.assigner)
    assert repr(found.transforms) == repr(fork.transforms)
    assert vars(found.args) == vars(fork.args)


def test_model_and_ema_are_both_converted_and_the_optimizer_is_left_out(tmp_path: Path, log: list[str]) -> None:
    model, ema = tiny_fork(), tiny_fork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    both = checkpoint(model, epoch=3, optimizer=optimizer, ema=checkpoint(ema)["model"])
    torch.save(both, tmp_path / "last.pt")
    found = torch.load(convert(tmp_path / "last.pt"), weights_only=False)
    assert (found["optimizer"], found["epoch"]) == (None, 3)
    target = tmp_path / "last-ultralytics.pt"
    assert log[-1].endswith(f"left out: resume={target} goes on from its epoch with a new optimizer.")
    x = torch.rand(1, 3, 16, 32)
    for fork, key in ((model, "model"), (ema, "ema")):
        assert_close(outputs(found[key], x), outputs(fork, x), 1e-5)
    torch.save(both | {"model": None}, tmp_path / "ema.pt")  # as trainers save
    found = torch.load(convert(tmp_path / "ema.pt"), weights_only=False)
    assert found["model"] is None
    assert_close(outputs(found["ema"], x), outputs(ema, x), 1e-5)


def test_a_model_that_is_its_own_ema_stays_so(tmp_path: Path) -> None:
    both = checkpoint(tiny_fork())
    torch.save(both | {"ema": both["model"]}, tmp_path / "both.pt")
    found = torch.load(convert(tmp_path / "both.pt"), weights_only=False)
    assert found["ema"] is found["model"]


@pytest.mark.parametrize("half", [False, True])
def test_there_and_back_is_the_same_to_the_bit(half: bool, tmp_path: Path) -> None:
    fork = tiny_fork()
    file = save(fork.half() if half else fork, tmp_path / "fork.pt")
    back = convert(convert(file), to="authors", out=tmp_path / "back.pt")
    assert names_authors_layout(back)
    one, other = (torch.load(path, weights_only=False)["model"].state_dict() for path in (file, back))
    assert list(one) == list(other)
    for name, t in one.items():
        assert t.dtype == other[name].dtype
        assert torch.equal(t, other[name]), name
    blocks = [m for m in torch.load(back, weights_only=False)["model"].modules() if type(m) is AAttn]
    assert {tuple(block._modules) for block in blocks} == {("qk", "v", "proj", "pe")}
    assert b"all_head_dim" not in back.read_bytes()
    assert globals_of(back) == globals_of(file)


def test_the_first_release_loses_no_bias(tmp_path: Path) -> None:
    """A model that Ultralytics builds has no bias before the BatchNorm of `pe`; ultralytics issue 21046."""
    model = YOLO(stock_yaml(tmp_path)).model.eval()
    for block in (m for m in model.modules() if type(m) is AAttn):
        block.pe.conv.bias = nn.Parameter(torch.randn(64))
        block.pe.bn.running_mean.normal_()
    file = save(model, tmp_path / "v1.pt")
    assert not names_authors_layout(file)  # Ultralytics runs it
    x = torch.rand(1, 3, 16, 32)
    found = YOLO(convert(file)).model
    assert_close(outputs(found, x), outputs(model, x), 1e-5)
    rebuilt = type(found)(found.yaml, verbose=False).eval()
    rebuilt.load_state_dict(found.state_dict())
    assert_close(outputs(rebuilt, x), outputs(model, x), 1e-5)
    with pytest.raises(CheckpointError, match="already"):
        convert(tmp_path / "v1-ultralytics.pt")


# Where it is loaded --------------------------------------------------------------------------------------------------
def test_stock_ultralytics_loads_and_trains_on_it_where_the_plugin_is_not_installed(
    tmp_path: Path, tiny_args: dict[str, Any]
) -> None:
    file = convert(save(tiny_fork(), tmp_path / "fork.pt"))
    assert {pair[0].split(".")[0] for pair in globals_of(file)} == {
        "torch",
        "ultralytics",
        "collections",
        "__builtin__",
    }
    code = (
        "import sys; sys.modules['yolo_flash'] = None\n"
        "from ultralytics import YOLO; import torch\n"
        f"model = YOLO({str(file)!r})\n"
        "model.predict(torch.zeros(1, 3, 32, 32), verbose=False)\n"
        f"model.train(**{tiny_args!r})\n"
    )
    env = {**os.environ, "ULTRALYTICS_SAFE_LOAD": "1", "PYTHONPATH": ""}  # all else here loads without
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_ultralytics_reads_is_what_was_read(tmp_path: Path) -> None:
    file = save(tiny_fork(), tmp_path / "fork.pt")
    ours, theirs = read_checkpoint(file.read_bytes(), "fork.pt"), torch_safe_load(str(file))[0]
    assert ours["train_args"] == theirs["train_args"]
    assert repr(ours["model"]) == repr(theirs["model"])
    for name, t in theirs["model"].state_dict().items():
        assert torch.equal(ours["model"].state_dict()[name], t)


# Refusals ------------------------------------------------------------------------------------------------------------
def refusal(file: Path, **more: Any) -> str:
    before = sorted(file.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        convert(file, **more)
    assert sorted(file.parent.iterdir()) == before
    return str(error.value)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = save(tiny_fork(), tmp_path / "fork.pt")
    before = file.read_bytes()
    assert refusal(file, out=file).startswith(f"{file} exists and is left alone.")
    (tmp_path / "fork-ultralytics.pt").symlink_to("nowhere")
    assert "fork-ultralytics.pt exists" in refusal(file)
    assert "must end in .pt" in refusal(file, out=tmp_path / "out.onnx")
    assert "to=torch is not one of ultralytics, authors" in refusal(file, to="torch")
    assert file.read_bytes() == before
    with pytest.raises(OSError, match="nowhere"):
        convert(file, out=tmp_path / "nowhere" / "out.pt")


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, target = save(tiny_fork(), tmp_path / "fork.pt"), tmp_path / "out.pt"
    saved = torch.save

    def late(*args: Any, **kwargs: Any) -> None:
        saved(*args, **kwargs)
        target.write_text("mine")

    monkeypatch.setattr(torch, "save", late)
    with pytest.raises(CheckpointError, match="exists and is left alone"):
        convert(file, target)
    assert target.read_text() == "mine"


def test_checkpoints_that_are_what_is_asked_for_already(tmp_path: Path) -> None:
    stock = save(YOLO(stock_yaml(tmp_path)).model, tmp_path / "stock.pt")
    assert refusal(stock).endswith(
        "has Ultralytics' layout already: Ultralytics runs it as it is. Nothing was written."
    )
    assert "outer ring is used" in refusal(stock, to="authors")
    fork = save(tiny_fork(), tmp_path / "fork.pt")
    assert refusal(fork, to="authors").endswith("has the layout of YOLOv12's authors already. Nothing was written.")


def test_what_is_no_yolov12(tmp_path: Path) -> None:
    layers = {"backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    model = MODELS[""]({"nc": 3, **layers}, verbose=False)
    assert "has no area attention in model: it is no YOLOv12" in refusal(save(model, tmp_path / "conv.pt"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert "has no model, in model or ema; it holds model.0.conv.weight" in refusal(tmp_path / "state.pt")
    torch.save(model, tmp_path / "whole.pt")
    assert "DetectionModel instead of the dict" in refusal(tmp_path / "whole.pt")
    assert "does not exist" in refusal(tmp_path / "none.pt")
    assert "is not a file" in refusal(tmp_path)


def test_a_variant_is_refused_with_its_file_layer_and_shape(tmp_path: Path) -> None:
    fork = tiny_fork()
    block = next(m for m in fork.modules() if isinstance(m, AAttn))
    block.pe.conv.weight = nn.Parameter(torch.zeros(32, 1, 9, 9))
    message = refusal(save(fork, tmp_path / "fork.pt"))
    assert message.startswith(f"{tmp_path / 'fork.pt'}: model.2.m.0.0.attn.pe has weights of 32x1x9x9")


def test_a_fused_model_is_refused(tmp_path: Path) -> None:
    fork = tiny_fork()
    assert "holds a fused model (Conv.forward_fuse)" in refusal(save(fork.fuse(verbose=False), tmp_path / "fused.pt"))
