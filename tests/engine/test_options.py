"""Every option of `yolo train` with the plugin: attention stays fused, and the option does what it does in stock.

Elsewhere: resume in Python, several data sets, distillation and tune() in test_trainer; graphs under each option in
test_graphs; float16, bfloat16 and channels_last, which need a card, in gpu/test_gpu and gpu/test_options.
"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from tests.counting import LAYERS, AttentionCalls, train_compiled
from tests.engine.test_telemetry import FORWARD, events, interrupted, of
from tests.patching.test_patch import patched_layers
from yolo_flash import AttentionSpec, FlashConfig, patch_model
from yolo_flash.cli import main
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.engine.telemetry import Telemetry
from yolo_flash.machine import detect
from yolo_flash.planning.plan import PlanRow


def train(config: str, args: dict[str, Any], **settings: Any) -> tuple[Any, AttentionCalls]:
    model = patch_model(YOLO(config), **{"backend": "sdpa_flash", **settings})
    with AttentionCalls() as calls:
        model.train(**args)
    return model, calls


def losses(model: YOLO, args: dict[str, Any]) -> list[float]:
    """The loss at the end of each step of a run."""
    found: list[float] = []
    model.add_callback("on_train_batch_end", lambda trainer: found.append(trainer.loss.item()))
    torch.manual_seed(0)
    model.train(**args)
    return found


def losses_of_both(config: str, args: dict[str, Any]) -> tuple[Any, AttentionCalls]:
    """Train stock and patched; the losses have to agree."""
    torch.manual_seed(0)
    wanted = losses(YOLO(config), args)
    torch.manual_seed(0)
    model = patch_model(YOLO(config), backend="sdpa_flash")
    with AttentionCalls() as calls:
        found = losses(model, args)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert patched_layers(model.model) == LAYERS
    return model, calls


@pytest.mark.parametrize(
    ("option", "steps"),
    [
        ({"rect": True}, 2),
        ({"cache": "ram"}, 2),
        ({"cache": "disk"}, 2),
        ({"fraction": 0.5}, 1),
        ({"channels_last": True}, 2),  # which Ultralytics ignores on a CPU
        ({"freeze": [3], "cos_lr": True}, 2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_run_is_fused_and_has_the_losses_of_stock(
    option: dict[str, Any], steps: int, tiny_model: str, tiny_args: dict[str, Any], coco8: str, tmp_path: Path
) -> None:
    shutil.copytree(Path(coco8).parent, tmp_path / "set")  # cache=disk writes beside the pictures
    YAML.save(tmp_path / "set" / "data.yaml", {**YAML.load(coco8), "path": str(tmp_path / "set")})
    _, calls = losses_of_both(tiny_model, {**tiny_args, **option, "data": str(tmp_path / "set" / "data.yaml")})
    assert calls.backward == {"sdpa_flash": LAYERS * steps}
    assert bool(list((tmp_path / "set").rglob("*.npy"))) is (option.get("cache") == "disk")


def test_sizes_that_were_not_planned_run_fused(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    args = {**tiny_args, "multi_scale": 0.5, "imgsz": 64, "epochs": 2}
    model, calls = losses_of_both(tiny_model, args)
    met = {spec.seq_len_q * spec.area for spec, _, _ in model.trainer.flash_run.dispatcher._decisions if spec.training}
    assert len(met) > 1
    assert calls.backward == {"sdpa_flash": LAYERS * 4}


def test_a_run_that_is_out_of_time_ends_after_a_step_that_was_fused(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model, calls = train(tiny_model, {**tiny_args, "time": 1e-6, "epochs": 9})  # hours
    assert calls.backward == {"sdpa_flash": LAYERS}
    assert len(of(events(model), "epoch")) == 1
    assert patched_layers(model.model) == LAYERS


@pytest.mark.parametrize("amp", [True, "fp16", False])
def test_on_a_cpu_every_precision_is_float32_in_plan_and_kernels(
    amp: Any, tiny_model: str, tiny_args: dict[str, Any]
) -> None:
    model, calls = train(tiny_model, {**tiny_args, "amp": amp})
    trainer = model.trainer
    met = {spec for spec, _, _ in trainer.flash_run.dispatcher._decisions if spec.training}
    assert {spec.dtype for spec in met} == {torch.float32}
    assert met == {row.decision.spec for row in trainer.flash_plan if row.mode == "train"}
    assert calls.backward == {"sdpa_flash": LAYERS * 2}


def test_bf16_on_a_cpu_is_refused_by_ultralytics_itself(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    said = []
    for model in (YOLO(tiny_model), patch_model(YOLO(tiny_model))):
        with pytest.raises(RuntimeError, match="bfloat16") as refused:
            model.train(**{**tiny_args, "amp": "bf16"})
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert patched_layers(model.model) == LAYERS


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_reaches_the_plan_and_is_gone_after_the_run(
    deterministic: bool, tiny_model: str, tiny_args: dict[str, Any]
) -> None:
    model, _ = train(tiny_model, {**tiny_args, "deterministic": deterministic})
    trained = [row.decision.spec for row in model.trainer.flash_plan if row.mode == "train"]
    assert {spec.deterministic for spec in trained} == {deterministic}
    assert {spec.deterministic for spec, _, _ in model.trainer.flash_run.dispatcher._decisions if spec.training} == {
        deterministic
    }
    assert not torch.are_deterministic_algorithms_enabled()


def test_frozen_layers_keep_their_weights_and_need_no_backward(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")
    begun: dict[str, torch.Tensor] = {}

    def keep(trainer: Any) -> None:
        begun.update({name: value.detach().clone() for name, value in trainer.model.named_parameters()})

    model.add_callback("on_train_start", keep)
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "freeze": 5, "nbs": 2, "lr0": 0.1, "optimizer": "SGD"})
    assert not calls.backward  # all attention is frozen, with everything before it
    assert calls.forward["sdpa_flash"] >= LAYERS * 2
    trained = {name for name, value in model.trainer.model.named_parameters() if not torch.equal(value, begun[name])}
    assert {name.split(".")[1] for name in trained} == {"5"}


# Compile --------------------------------------------------------------------------------------------------------------
def test_compile_breaks_the_graph_where_stock_does(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Ultralytics' own trainer, with the compiler that only traces: a real one takes a minute."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **ignored: compiler(model, backend="eager"))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "")
    model, graphs, breaks = train_compiled(tiny_model, tiny_args)
    assert graphs[0] == graphs[1] > 0
    assert breaks[0] == breaks[1]
    (counts,) = of(events(model), "kernels")  # of the second step: the first one compiles
    assert counts["counts"][FORWARD] == LAYERS


# AutoBatch ------------------------------------------------------------------------------------------------------------
def autobatch_lines(backend: str, device: str, memory_limited: bool, folder: Path, log: list[str]) -> list[str]:
    """What a plan for 64 images says of AutoBatch."""
    dispatcher = Dispatcher(FlashConfig())
    dispatcher.memory_limited = memory_limited
    machine = detect(torch.device("cpu"))
    spec = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float32, "nhwc", training=True)
    rows = [PlanRow(f"model.{i}", "AAttn", "train", dispatcher.select(spec, backend, machine)) for i in range(4)]
    trainer = SimpleNamespace(save_dir=folder, resume=False, device=torch.device(device), batch_size=64)
    telemetry = Telemetry(FlashConfig(), dispatcher)
    for _ in range(2):  # again after a halving
        telemetry.plan(trainer, rows, machine)
    return [line for line in log if "AutoBatch took" in line]


def test_one_line_says_why_autobatch_took_so_many(tmp_path: Path, log: list[str]) -> None:
    (line,) = autobatch_lines("sdpa_flash", "cuda", True, tmp_path, log)
    saved = 4 * 64 * 2 * 400 * 400 * 4
    assert "took 64 images a step. They need" in line
    assert f"need {saved / 2**20:.0f} MiB less than with stock attention, {saved / 64 / 2**20:.0f} MiB of score" in line


@pytest.mark.parametrize(
    ("backend", "device", "memory_limited"),
    [("stock", "cuda", True), ("sdpa_flash", "cpu", True), ("sdpa_flash", "cuda", False)],
)
def test_no_such_line_where_attention_is_not_the_reason(
    backend: str, device: str, memory_limited: bool, tmp_path: Path, log: list[str]
) -> None:
    assert not autobatch_lines(backend, device, memory_limited, tmp_path, log)


def test_autobatch_measures_the_patched_model_and_takes_nothing_that_needs_more_memory(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def estimate(model: Any, **ignored: Any) -> int:
        seen.append(patched_layers(model))
        return 2

    monkeypatch.setattr("ultralytics.engine.trainer.check_train_batch_size", estimate)
    model, calls = train(tiny_model, {**tiny_args, "batch": 0.7})
    assert seen == [LAYERS]
    assert model.trainer.flash_run.dispatcher.memory_limited
    assert model.trainer.flash_plan[0].decision.spec.batch == 2 * 4
    assert calls.backward == {"sdpa_flash": LAYERS * 2}


# quantize=8 -----------------------------------------------------------------------------------------------------------
def test_quantize_8_trains_stock_blocks_and_says_so_once(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """ModelOpt, which Ultralytics would install, meets no class of ours; the next run is fused again."""
    calibrated: list[int] = []

    def prepare(model: Any, loader: Any, preprocess: Any) -> Any:
        calibrated.append(patched_layers(model))
        model(preprocess(next(iter(loader))))
        return model

    monkeypatch.setattr("ultralytics.engine.trainer.prepare_qat", prepare)
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "quantize": 8})
    assert calibrated == [0]
    assert not calls.forward
    assert model.trainer.flash_plan == []
    (line,) = [line for line in log if "yolo-flash:" in line]
    assert "quantize=8 calibrates and trains the stock blocks" in line
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "quantize": None})
    assert calls.backward == {"sdpa_flash": LAYERS * 2}


# Runs after runs ------------------------------------------------------------------------------------------------------
def test_folds_trained_one_after_another_share_nothing_and_leave_nothing(
    tiny_model: str, tiny_args: dict[str, Any]
) -> None:
    """As in Ultralytics' guide to k-fold cross-validation: a new model, and a new run, for each fold."""
    left: list[weakref.ref[Any]] = []
    weights = []
    for fold in range(2):
        torch.manual_seed(0)
        model, calls = train(tiny_model, {**tiny_args, "name": f"fold{fold}"})
        assert calls.backward == {"sdpa_flash": LAYERS * 2}
        assert len(of(events(model), "run")) == 1
        left += [weakref.ref(model.trainer), weakref.ref(model.trainer.flash_run.dispatcher)]
        weights.append(model.model.state_dict())
        del model
    gc.collect()
    assert [ref() for ref in left] == [None] * 4
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resume_on_the_command_line_goes_on_fused(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    last = interrupted(tiny_args, patch_model(YOLO(tiny_model), backend="sdpa_flash"))
    with AttentionCalls() as calls:
        main.main(["train", "resume", f"model={last}", "flash.backend=sdpa_flash"])
    assert calls.backward == {"sdpa_flash": LAYERS * 2 * 2}  # layers x batches x epochs that were left
    written = [json.loads(line) for line in (last.parents[1] / "flash.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in of(written, "epoch")] == [1, 2, 3]
