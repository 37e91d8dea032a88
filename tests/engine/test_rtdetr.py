"""RT-DETR through Ultralytics: its attention is patched, and really runs, in training, validation and prediction."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from ultralytics import RTDETR
from ultralytics.nn.tasks import RTDETRDetectionModel
from ultralytics.utils import ASSETS, YAML

from tests.counting import AttentionCalls
from tests.engine.test_trainer import Phases
from tests.patching.test_patch import load_without_plugin
from tests.planning.test_autotune import forget_masks
from tests.versions import few_queries
from yolo_flash import FlashConfig, patch_model, unpatch_model, verify
from yolo_flash.cli import main
from yolo_flash.dispatch.decision import Trial
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.machine import detect
from yolo_flash.patching.blocks import FlashBlock
from yolo_flash.patching.multihead import FlashMultiheadAttention
from yolo_flash.patching.patch import patch_modules, targets
from yolo_flash.patching.shapes import layer_inputs
from yolo_flash.planning.inputs import RunInput
from yolo_flash.planning.plan import describe, make_plan

# config -> (layer of AIFI, of the decoder, head_dim of AIFI)
CONFIGS = {
    "rtdetr-l.yaml": (11, 28, 32),
    "rtdetr-x.yaml": (15, 32, 48),
    "rtdetr-resnet50.yaml": (6, 23, 32),
    "rtdetr-resnet101.yaml": (6, 23, 32),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_of_every_shipped_config(config: str) -> None:
    encoder, decoder, head_dim = CONFIGS[config]
    with torch.device("meta"):
        model = RTDETRDetectionModel(config, verbose=False)
    dispatcher, machine = Dispatcher(FlashConfig()), detect(torch.device("cpu"))
    run_inputs = [RunInput(mode, 4, 640, 640, torch.float32, False) for mode in ("train", "val")]
    rows = make_plan(model, dispatcher, machine, run_inputs)
    found = {
        mode: Counter(
            (
                int(row.layer.split(".")[1]),
                row.decision.spec.seq_len_q,
                row.decision.spec.head_dim,
                row.decision.spec.mask,
            )
            for row in rows
            if row.mode == mode
        )
        for mode in ("train", "val")
    }
    assert found["train"] == {(encoder, 400, head_dim, False): 1, (decoder, 500, 32, True): 6}  # 2 x 100 to denoise
    assert found["val"] == {(encoder, 400, head_dim, False): 1, (decoder, 300, 32, False): 6}
    for row in rows:
        spec = row.decision.spec
        assert (spec.batch, spec.num_heads, spec.layout, spec.seq_len_k) == (4, 8, "separate", spec.seq_len_q)
        assert (row.block, row.decision.backend) == ("MultiheadAttention", "sdpa_flash")
    assert f"train 6 in model.{decoder}   MultiheadAttention        4      8     500  sdpa_flash" in describe(
        rows, machine
    )


def test_the_plan_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["plan", "model=rtdetr-resnet50.yaml", "imgsz=640", "batch=4", "device=cpu", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert Counter(row["mode"] for row in facts["plan"]) == {"train": 7, "val": 7}
    assert facts["score_bytes"] == {"stock": 4 * 4 * 8 * (400**2 + 6 * 500**2), "planned": 0}


@few_queries
def test_small_images_have_fewer_queries_than_300() -> None:
    with torch.device("meta"):
        model = RTDETRDetectionModel("rtdetr-resnet50.yaml", verbose=False)
    sizes = layer_inputs(model, targets(model), 2, 96, 64)
    assert sizes["model.6.ma"] == (2, 6, None)
    assert sizes["model.23.decoder.layers.5.self_attn"] == (2, 96 + 24 + 6, None)


def tiny() -> str:
    """A model with one layer of attention in its encoder and two in its decoder."""
    backbone = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 16, 32)] + [[-1, 1, "AIFI", [32, 2]]]
    head = [[-1, 1, "Conv", [32, 1, 1]], [[2, 4], 1, "RTDETRDecoder", ["nc", 32, 12, 4, 2, 2]]]
    YAML.save("rtdetr-tiny.yaml", {"nc": 80, "backbone": backbone, "head": head})
    return "rtdetr-tiny.yaml"


def trained(flash: bool, tiny_args: dict[str, Any], **settings: Any) -> tuple[Any, Phases, list[float]]:
    """A model after one epoch, what ran in it, and the losses of its steps."""
    torch.manual_seed(0)
    model = RTDETR(tiny())
    if flash:
        patch_model(model, **settings)
    losses: list[float] = []
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss)))
    with Phases() as phases:
        phases.follow(model)
        model.train(**{**tiny_args, "imgsz": 64})
    return model, phases, losses


@few_queries
def test_a_run_is_fused_in_every_phase_and_has_the_losses_of_stock(tiny_args: dict[str, Any], log: list[str]) -> None:
    model, phases, losses = trained(True, tiny_args, backend="sdpa_flash")
    steps = len(losses)
    assert steps >= 2
    assert phases.calls["train batch"] == phases.calls["train batch backward"] == 3 * steps
    assert phases.calls["ema validation"] == 3
    assert phases.calls["final"] >= 3
    assert all(type(block) is FlashMultiheadAttention for block in targets(model.model).values())

    rows = [json.loads(line) for line in (Path(model.trainer.save_dir) / "flash.jsonl").read_text().splitlines()]
    kernels = next(row for row in rows if row["event"] == "kernels")["counts"]
    operator = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert kernels[operator] == kernels[f"{operator}_backward"] == 3
    assert not any("Please report" in line for line in log)

    with AttentionCalls() as calls:
        model.predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)
    assert calls.forward["sdpa_flash"] >= 3
    with AttentionCalls() as calls:
        model.val(**{k: v for k, v in {**tiny_args, "imgsz": 64}.items() if k not in ("epochs", "workers")})
    assert calls.forward["sdpa_flash"] >= 3

    load_without_plugin(Path(model.trainer.best))
    unpatch_model(model)
    assert all(type(block) is nn.MultiheadAttention for block in targets(model.model).values())
    _, phases, stock = trained(False, tiny_args)
    assert not phases.calls
    assert losses == pytest.approx(stock, rel=1e-3)


def test_queries_that_change_from_step_to_step_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of denoising queries follows the labels of a batch: no step measures, all go by the planned size."""
    with torch.device("meta"):
        model = RTDETRDetectionModel("rtdetr-resnet50.yaml", verbose=False)
    dispatcher = patch_modules(model, FlashConfig())
    machine = detect(torch.device("cpu"))
    run_input = RunInput("train", 4, 640, 640, torch.float32, False)
    trials = {"stock": Trial(ms=9.0, ms_low=8.9), "sdpa_math": Trial(ms=2.0, ms_low=1.9)}
    rows = make_plan(model, dispatcher, machine, [run_input], lambda specs: dict.fromkeys(specs, trials))
    block: Any = targets(model)["model.23.decoder.layers.0.self_attn"]
    assert isinstance(block, FlashBlock)
    for queries in (402, 488, 500):
        x = torch.empty(queries, 4, 256)
        planned: Any = cast(Any, block)._attention_call(x, torch.empty(queries, queries, dtype=torch.bool))
        spec, backend, *_ = planned
        assert spec.mask
        decision = dispatcher.decide(spec, "auto", torch.device("cpu"))
        assert backend == decision.backend == rows[-1].decision.backend == "sdpa_math"
    assert decision.why == "the fastest measured"
    assert len(dispatcher.unplanned) == 2


@few_queries
def test_verify_notices_a_mask_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_masks(monkeypatch)
    facts = verify(tiny(), imgsz=64, device="cpu", backend="sdpa_flash")
    decoder = {f"model.5.decoder.layers.{i}.self_attn" for i in range(2)}
    assert {(entry["layer"], entry["mode"]) for entry in facts["layers"] if not entry["ok"]} == {
        (name, "train") for name in decoder
    }
    assert {(entry["layer"], entry["mode"]) for entry in facts["layers"] if entry["ok"]} == {
        ("model.3.ma", "train"),
        ("model.3.ma", "predict"),
        *((name, "predict") for name in decoder),
    }
    assert all(row["ok"] for row in facts["model"])  # whose training step has no labels, and so no mask
    assert all(entry["without_attention"] > 1e-4 for entry in facts["layers"] if entry["mode"] == "predict")
