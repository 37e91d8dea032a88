"""`yolo-flash verify` passes healthy models, and notices every fault that is put into a backend on purpose."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.nn.modules.block import AAttn
from ultralytics.utils import ASSETS, YAML

from tests.counting import randomise
from yolo_flash import FlashConfig, patch_model, verify
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.cli import main
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial
from yolo_flash.machine import detect
from yolo_flash.patching.patch import patch_modules
from yolo_flash.planning import autotune
from yolo_flash.utils.numerics import allowed_error, relative_error
from yolo_flash.verification import compare, detections, executed, run
from yolo_flash.verification.case import is_fresh, load_images

Run = Callable[[Tensor, AttentionSpec], tuple[Tensor, Tensor]]
FORCED = ["imgsz=64", "device=cpu", "flash.backend=sdpa_flash"]
HEALTHY: Run = BACKENDS["sdpa_flash"].run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small convolutions: where other processes keep the cores, threads that wait for each other take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _tiny26(_empty_folder: None) -> None:
    """Write `tiny26.yaml`: attention and head of YOLO26, verified in a third of the time of yolo26n."""
    layers = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 16, 32, 64, 256)] + [[-1, 1, "C2PSA", [256]]] * 2
    model = {"nc": 80, "end2end": True, "reg_max": 1, "scales": {"n": [1.0, 1.0, 1024]}}
    YAML.save("tiny26.yaml", {**model, "backbone": layers, "head": [[[3, 6], 1, "Detect", ["nc"]]]})


def break_backend(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], forward=run, backward=None))


def off(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The facts of a verification that must end with exit status 1."""
    with pytest.raises(SystemExit) as end:
        main.main(["verify", *FORCED, "--json", *args])
    assert end.value.code == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["ok"]
    assert facts["off"]
    return facts


def wrong(facts: dict[str, Any], mode: str) -> dict[str, set[str]]:
    """Layer -> the quantities that are off in a mode."""
    found = {
        entry["layer"]: {row["what"] for row in entry["compared"] if not row["ok"]}
        for entry in facts["layers"]
        if entry["mode"] == mode
    }
    assert all(entry["ok"] == all(row["ok"] for row in entry["compared"]) for entry in facts["layers"])
    return {layer: what for layer, what in found.items() if what}


# Healthy models -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("model", "layers"), [("yolo12n.yaml", 8), ("yolo26n.yaml", 2)])
def test_a_healthy_model_passes(model: str, layers: int, log: list[str]) -> None:
    main.main(["verify", f"model={model}", *FORCED])  # exit status 0: nothing is raised
    text = "\n".join(log)
    assert text.endswith(f"yolo-flash verify: {layers} attention layers compute what stock computes")
    assert "images: synthetic images" in text
    assert "note: fresh weights" in text
    assert "OFF" not in text
    assert len(re.findall(r"\n  train +model\.\S+ +sdpa_flash +\d\.\de-0[67] +\d\.\de-0[67]  ok ", text)) == layers
    assert (
        len(re.findall(r"\n  predict +model\.\S+ +sdpa_flash +\d\.\de-0[67] +\d\.\de-0[67]  ok +output", text))
        == layers
    )
    for row in ("train +whole model, outputs", "train +whole model, gradients", "predict +whole model, outputs"):
        assert re.search(rf"\n  {row} .*  ok ", text)
    assert re.search(r"detections: stock (\d+), ours \1, the same \1; .*: ok", text)


def test_every_layer_is_seen_in_the_outputs_of_fresh_weights() -> None:
    facts = verify("tiny26.yaml", imgsz=64, device="cpu", backend="sdpa_math")
    sight = [entry["without_attention"] for entry in facts["layers"] if entry["mode"] == "predict"]
    assert len(sight) == 2
    assert min(sight) > 0.01
    assert len(facts["notes"]) == 1  # fresh weights


def test_attention_that_the_outputs_do_not_show_is_told() -> None:
    model = YOLO("tiny26.yaml")
    for name, parameter in model.named_parameters():
        if name.endswith("model.5.m.0.attn.proj.bn.weight"):
            parameter.data.zero_()
    facts = verify(model, imgsz=64, device="cpu", backend="sdpa_flash")
    assert facts["ok"]
    blind = [note for note in facts["notes"] if "without its attention" in note]
    assert len(blind) == 1
    assert blind[0].startswith("model.5.m.0.attn: ")


@pytest.mark.parametrize("model", ["yolo11n-seg.yaml", "yolo11n-cls.yaml"])
def test_other_tasks_compare_raw_outputs(model: str) -> None:
    facts = verify(model, imgsz=64, device="cpu", backend="sdpa_flash")
    assert facts["ok"], facts["off"]
    assert facts["detections"] is None
    assert facts["dtype"] == "float32"


def test_stock_against_stock_proves_nothing_and_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["verify", "model=tiny26.yaml", "imgsz=64", "device=cpu", "--json"])
    assert end.value.code == 1
    facts = json.loads(capsys.readouterr().out)
    assert {entry["backend"] for entry in facts["layers"]} == {"stock"}
    assert not facts["fused"]
    (sentence,) = facts["off"]
    assert sentence.startswith("nothing fused was compared: a run here takes none at imgsz=64 batch=2")
    for typed in ("all=true", "flash.backend=sdpa_flash", "larger imgsz="):
        assert typed in sentence


def test_all_compares_every_backend_that_can_run_each_layer(log: list[str]) -> None:
    main.main(["verify", "model=tiny26.yaml", "imgsz=64", "device=cpu", "all=true"])
    rows = re.findall(r"\n  (train|predict) +(model\.\S+) +(\w+) +\d\.\de-\d\d +\d\.\de-\d\d  ok ", log[-1])
    layers = sorted({layer for _, layer, _ in rows})
    assert len(layers) == 2
    able = ("stock", "sdpa_math", "sdpa_flash")
    assert rows == [(mode, layer, name) for mode in ("train", "predict") for layer in layers for name in able]
    assert log[-1].endswith("2 attention layers compute what stock computes")
    facts = verify("tiny26.yaml", imgsz=64, device="cpu", all=True, backend="sdpa_flash")
    assert [entry["of_plan"] for entry in facts["layers"]] == [True, False] * 4  # stock is what both are compared with


def test_with_all_a_backend_that_raises_or_is_wrong_is_off_though_no_run_would_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scaled(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        if spec.training:
            raise RuntimeError("no such kernel")
        out, v = HEALTHY(packed, spec)
        return 1.05 * out, v

    break_backend(monkeypatch, scaled)
    facts = verify("tiny26.yaml", imgsz=64, device="cpu", all=True)
    wrong_rows = [(entry["mode"], entry["planned"]) for entry in facts["layers"] if not entry["ok"]]
    assert wrong_rows == [("train", "sdpa_flash")] * 2 + [("predict", "sdpa_flash")] * 2
    assert sum("no such kernel" in sentence for sentence in facts["off"]) == 2
    assert sum("(predict) on sdpa_flash: output is off" in sentence for sentence in facts["off"]) == 2


@pytest.mark.parametrize("autotuned", [True, False])
def test_the_backend_is_the_one_that_was_measured_here(autotuned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules take stock at this size; a machine on which flash is faster runs flash."""
    asked: list[AttentionSpec] = []

    def measure(specs: list[AttentionSpec], device: torch.device) -> dict[AttentionSpec, dict[str, Trial]]:
        asked.extend(specs)
        trials = {"stock": Trial(ms=2.0, ms_low=1.9, ms_high=2.1), "sdpa_flash": Trial(ms=1.0, ms_low=0.9, ms_high=1.1)}
        return dict.fromkeys(specs, trials)

    monkeypatch.setattr(autotune, "measure", measure)
    facts = verify("tiny26.yaml", imgsz=64, device="cpu", autotune=autotuned)
    assert {entry["backend"] for entry in facts["layers"]} == {"sdpa_flash" if autotuned else "stock"}
    assert facts["ok"] is autotuned
    assert [(spec.training, spec.deterministic) for spec in asked] == (
        [(True, True)] * 2 + [(False, False)] * 2 if autotuned else []
    )


@pytest.mark.measures
def test_what_an_earlier_run_measured_near_this_size_decides_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_cache, "folder", lambda: tmp_path / "trials")
    monkeypatch.setattr(autotune, "measure", lambda specs, device: pytest.fail(f"measured {specs}"))
    earlier = [
        AttentionSpec(4, 2, 9, 9, 32, 64, torch.float32, "nchw", training=training, deterministic=training)
        for training in (True, False)
    ]
    trials = {"stock": Trial(ms=2.0, ms_low=1.9, ms_high=2.1), "sdpa_flash": Trial(ms=1.0, ms_low=0.9, ms_high=1.1)}
    trial_cache.store(dict.fromkeys(earlier, trials), detect(torch.device("cpu")))
    facts = verify("tiny26.yaml", imgsz=64, device="cpu")
    assert facts["ok"], facts["off"]
    assert {entry["backend"] for entry in facts["layers"]} == {"sdpa_flash"}


def test_what_ran_is_observed_and_not_taken_from_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    math_run = BACKENDS["sdpa_math"].forward
    assert math_run is not None
    break_backend(monkeypatch, math_run)
    facts = verify("tiny26.yaml", imgsz=64, device="cpu", backend="sdpa_flash")
    assert {entry["backend"] for entry in facts["layers"]} == {"sdpa_math"}
    assert {entry["planned"] for entry in facts["layers"]} == {"sdpa_flash"}
    assert not any(entry["ok"] for entry in facts["layers"])
    assert sum("the plan says sdpa_flash, and sdpa_math ran" in sentence for sentence in facts["off"]) == 4
    assert not facts["fused"]


def test_a_profiler_of_the_user_is_left_alone() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert executed.observe(lambda: 5) == (5, None)
        facts = verify("tiny26.yaml", imgsz=64, device="cpu", backend="sdpa_flash")
    assert (facts["ok"], facts["fused"]) == (False, False)  # stock might have run: nothing is proved
    (sentence,) = facts["off"]
    assert "what ran could not be observed" in sentence
    assert sum("could not be observed" in note for note in facts["notes"]) == 1


def test_an_empty_profile_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a torch without its profiler."""
    monkeypatch.setattr(torch.profiler.profile, "events", lambda self: [])
    assert executed.observe(lambda: 5) == (5, None)


def test_a_checkpoint_of_a_real_training_is_verified_as_it_is(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    """Its EMA has counted no batch."""
    model = YOLO(tiny_model)
    model.train(**tiny_args)
    best = YOLO(str(model.trainer.best))
    assert all(m.num_batches_tracked == 0 for m in best.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not is_fresh(best.model)
    assert is_fresh(YOLO(tiny_model).model)
    facts = verify(str(model.trainer.best), imgsz=64, device="cpu", backend="sdpa_flash")
    assert facts["ok"], facts["off"]
    assert not any("fresh" in note for note in facts["notes"])


def test_a_precision_is_what_ultralytics_takes() -> None:
    for amp in ("maybe", 1, "float16"):
        with pytest.raises(ValueError, match=f"amp must be True, False, fp16, bf16 or fp32, found {amp!r}"):
            verify("tiny26.yaml", imgsz=64, device="cpu", amp=amp)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="verify: amp must be True, False, fp16, bf16 or fp32, found 'maybe'"):
        main.main(["verify", "model=tiny26.yaml", "device=cpu", "amp=maybe"])
    assert verify("tiny26.yaml", imgsz=64, device="cpu", amp="BF16", backend="sdpa_flash")["dtype"] == "float32"


def test_a_checkpoint_and_pictures(coco8: str, log: list[str], tmp_path: Path) -> None:
    model = YOLO("tiny26.yaml")
    model.model.train()(torch.rand(2, 3, 64, 64))
    model.ckpt = {}
    model.save("best.pt")
    facts = verify("best.pt", coco8, imgsz=64, device="cpu", backend="sdpa_flash")
    assert facts["ok"], facts["off"]
    assert facts["source"] == f"2 of {coco8}"
    assert not any("fresh" in note for note in facts["notes"])
    pictures = Path(coco8).parent / "images" / "val"
    from_data, _ = load_images(coco8, 3, 64, 2)
    from_folder, _ = load_images(pictures, 3, 64, 2)
    from_file, what = load_images(min(pictures.iterdir()), 3, 64, 2)
    assert what == f"1 of {min(pictures.iterdir())}"
    assert torch.equal(from_data, from_folder)
    assert torch.equal(from_data[:1], from_file[:1])


def test_pictures_are_letterboxed_as_in_a_prediction() -> None:
    images, what = load_images(ASSETS / "zidane.jpg", 3, 64, 3)
    assert what == f"1 of {ASSETS / 'zidane.jpg'}"
    assert images.shape == (3, 3, 64, 64)
    assert torch.equal(images[0], images[2])  # repeated
    model = YOLO("tiny26.yaml")
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.predict(ASSETS / "zidane.jpg", imgsz=64, rect=False, device="cpu", verbose=False)
    assert torch.allclose(images[:1], seen[-1])


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_half_precision_as_on_a_gpu(mode: str) -> None:
    block = randomise(AAttn(64, 2, 4))
    ours = copy.deepcopy(block)
    patch_modules(ours, FlashConfig(backend="sdpa_flash"))
    how = compare.Mode(mode, torch.bfloat16, nhwc=mode == "train")
    x = torch.randn(2, 64, 8, 8).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last) if how.nhwc else x
    upstream = torch.randn(2, 64, 8, 8)
    truth = compare.run_block(block, {"input": x}, upstream, how, exact=True)
    stock = compare.run_block(block, {"input": x}, upstream, how)
    found = compare.run_block(ours, {"input": x}, upstream, how)
    assert {truth["output"].dtype, found["output"].dtype} == {torch.float64, torch.bfloat16}
    rows = compare.compare(truth, stock, found, torch.bfloat16)
    assert len(rows) == (13 if mode == "train" else 1)
    assert all(row.ok for row in rows)
    assert 1e-3 < rows[0].stock < 2e-2  # autocast was on
    broken = found | {"output": 1.05 * found["output"]}
    assert not compare.compare(truth, stock, broken, torch.bfloat16)[0].ok


# Faults ---------------------------------------------------------------------------------------------------------------
def test_values_scaled_by_a_twentieth_are_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scaled(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, v = HEALTHY(packed, spec)
        return 1.05 * out, v

    break_backend(monkeypatch, scaled)
    facts = off(capsys, "model=yolo12n.yaml")
    for mode in ("train", "predict"):
        layers = wrong(facts, mode)
        assert len(layers) == 8
        assert all("output" in what for what in layers.values())
        assert any(sentence.startswith(f"model.6.m.0.0.attn ({mode}): output is off") for sentence in facts["off"])
    assert {row["mode"] for row in facts["model"] if not row["ok"]} == {"train", "predict"}


def test_swapped_heads_are_noticed_in_the_layer_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swapped(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, v = HEALTHY(packed, spec)
        return (out.flip(2).contiguous() if spec.seq_len_q == 16 else out), v

    break_backend(monkeypatch, swapped)
    facts = off(capsys, "model=tiny26.yaml", "imgsz=128", "flash.layers=model.6.*:stock")
    assert list(wrong(facts, "train")) == list(wrong(facts, "predict")) == ["model.5.m.0.attn"]
    assert {entry["backend"] for entry in facts["layers"]} == {"sdpa_flash", "stock"}


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_wrong_backward_is_noticed_by_the_gradient_that_is_wrong(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_backward(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        parts = list(packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1))
        place = "qkv".index(part)
        parts[place] = 0.99 * parts[place] + 0.01 * parts[place].detach()
        return HEALTHY(torch.cat(parts, dim=-1), spec)

    break_backend(monkeypatch, wrong_backward)
    facts = off(capsys, "model=tiny26.yaml")
    layers = wrong(facts, "train")
    assert len(layers) == 2
    for what in layers.values():
        assert f"gradient of qkv.conv.weight ({part})" in what
        assert "output" not in what
    assert wrong(facts, "predict") == {}
    assert any("the whole model (train): gradients is off" in sentence for sentence in facts["off"])


def test_nan_is_noticed(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    def nan(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, v = HEALTHY(packed, spec)
        out = out.clone()
        out[0, 0, 0, 0] = math.nan
        return out, v

    break_backend(monkeypatch, nan)
    facts = verify("yolo26n.yaml", imgsz=64, device="cpu", backend="sdpa_flash")
    assert len(wrong(facts, "train")) == len(wrong(facts, "predict")) == 2
    assert not facts["detections"]["ok"]
    json.dumps(facts, allow_nan=False)
    assert "not finite" in log[-1]
    assert log[-1].endswith("yolo-flash verify: something is OFF, see above")


def test_a_backend_that_raises_is_off_though_auto_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such kernel")

    break_backend(monkeypatch, fail)
    monkeypatch.setattr("yolo_flash.dispatch.rules._cpu_rules", lambda spec: iter([("sdpa_flash", "a test")]))
    facts = verify("tiny26.yaml", imgsz=64, device="cpu")
    assert "sdpa_flash raised in this run: RuntimeError: no such kernel" in facts["off"]
    assert "the plan says sdpa_flash, and sdpa_math ran" in facts["off"][0]
    with pytest.raises(SystemExit, match=r"sdpa_flash raised in model\.5"):
        main.main(["verify", "model=tiny26.yaml", *FORCED])


# Rules ----------------------------------------------------------------------------------------------------------------
def test_the_rule() -> None:
    assert allowed_error(1e-3, torch.float16) == 2e-3 + 2**-10
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == 0.75
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))
    assert compare.Comparison("x", 1.0, 0.5, 1.0).ok
    for ours, allowed in ((1.1, 1.0), (math.nan, 1.0), (math.inf, math.inf), (1.0, math.nan)):
        assert not compare.Comparison("x", ours, 0.5, allowed).ok


def test_long_sums_may_round_a_little_more() -> None:
    ones = {"output": torch.ones(4)}
    ours = {"output": torch.full((4,), 1 + 1e-6)}
    allowed = [compare.compare(ones, ones, ours, torch.float32, pixels)[0] for pixels in (0, 32, 800)]
    assert [row.ok for row in allowed] == [False, False, True]


def test_a_gradient_that_is_zero_is_measured_against_the_largest() -> None:
    truth = {"gradient of a": torch.full((4,), 1e-17), "gradient of b": torch.ones(4)}
    stock = {"gradient of a": torch.full((4,), 1e-8), "gradient of b": torch.ones(4)}
    for size, ok in ((3e-8, True), (1e-3, False)):
        ours = stock | {"gradient of a": torch.full((4,), size)}
        assert [row.ok for row in compare.compare(truth, stock, ours, torch.float32)] == [ok, True]


def test_detections_on_the_threshold_may_differ_in_number_and_not_in_place() -> None:
    model: Any = YOLO("yolo12n.yaml").model
    truth = torch.zeros(1, 84, 10, dtype=torch.float64)
    truth[0, :4] = torch.tensor([20.0, 20.0, 8.0, 8.0], dtype=torch.float64)[:, None]
    truth[0, 0] += 40 * torch.arange(10)
    truth[0, 5, :3] = torch.tensor([0.9, 0.5, 0.25])
    above, below = truth.clone(), truth.clone()
    above[0, 5, 2] += 1e-4
    below[0, 5, 2] -= 1e-4

    def found(ours: Tensor) -> Any:
        return detections.compare_detections(
            model, {"outputs.0": truth}, {"outputs.0": above}, {"outputs.0": ours}, 640, torch.float32
        )

    borderline = found(below)
    assert (borderline.stock, borderline.ours, borderline.matched, borderline.ok) == (3, 2, 2, True)
    assert borderline.score == pytest.approx(2e-4)
    missing, moved = above.clone(), above.clone()
    missing[0, 5, 0] = 0.0
    moved[0, 2, 1] += 1.0
    assert (found(missing).matched, found(missing).ok) == (2, False)
    assert (found(moved).matched, found(moved).box, found(moved).ok) == (3, 1.0, False)


def _numpy_state() -> str:
    with np.printoptions(threshold=10_000):
        return str(np.random.get_state())


# Nothing is changed ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patched", [False, True])
def test_the_model_and_the_process_stay_as_they_were(patched: bool) -> None:
    model = YOLO("tiny26.yaml")
    if patched:
        patch_model(model, backend="sdpa_flash")
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), _numpy_state()
    with pytest.raises(ValueError, match="there is nothing to verify"):
        verify(model, enabled=False, device="cpu")
    facts = verify(model, imgsz=64, device="cpu")
    assert facts["ok"] is patched
    assert {entry["backend"] for entry in facts["layers"]} == {"sdpa_flash" if patched else "stock"}
    assert [type(m) for m in model.modules()] == kinds
    assert [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()] == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    verify("tiny26.yaml", imgsz=64, device="cpu")  # building a model takes random numbers
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert _numpy_state() == states[2]
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_runs_without_gradients_enabled() -> None:
    with torch.inference_mode():
        assert verify("tiny26.yaml", imgsz=64, device="cpu", backend="sdpa_flash")["ok"]


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "verify needs a model"),
        ("model=yolov8n.yaml", "yolov8n.yaml has no attention layer that the plugin knows"),
        ("model=yolo12n.yaml flash.enabled=false", "nothing to verify"),
        ("model=yolo12n.yaml batch=1", "batch must be at least 2, found 1"),
        ("model=yolo12n.yaml imgsz=[640,480]", "imgsz must be a whole number"),
        ("model=yolo12n.yaml imgz=64", r"verify takes model=\.\.\., source=.* found imgz"),
        ("model=yolo12n.yaml train", "found train"),
        ("model=yolo12n.yaml source=nothing.jpg", "nothing.jpg does not exist"),
        ("model=nothing.yaml", "nothing.yaml"),
        ("model=yolo12n.yaml flash.backend=sdpa_cudnn", "runs on NVIDIA cards"),
        ("model=yolo12n.yaml flash.backend=flash", "there is no backend"),
    ],
)
def test_what_cannot_be_verified_is_told(typed: str, told: str) -> None:
    with pytest.raises(SystemExit, match=f"^yolo-flash: .*{told}"):
        main.main(["verify", "device=cpu", *typed.split()])


def test_pictures_that_cannot_be_read_and_data_without_val(tmp_path: Path) -> None:
    Path("broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"source=broken\.jpg: none of 1 files could be read"):
        verify("tiny26.yaml", "broken.jpg", imgsz=64, device="cpu")
    YAML.save("nothing.yaml", {"path": str(tmp_path), "train": "a", "val": "b", "names": {0: "x"}})
    with pytest.raises(FileNotFoundError):
        verify("tiny26.yaml", "nothing.yaml", imgsz=64, device="cpu")


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "run_model", fail)
    with pytest.raises(ValueError, match=r"out of memory on .*smaller imgsz= or batch="):
        verify("tiny26.yaml", imgsz=64, device="cpu")
