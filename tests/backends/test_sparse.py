"""The window of `sparse_window`: what it sees, that this is what is computed, and that it is never a surprise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO

from tests.machines import MACHINES
from tests.patching.test_blocks import LAYOUTS, channels, make
from yolo_flash import (
    BackendNotSupportedError,
    FlashConfig,
    FlashConfigError,
    FlashKernelError,
    patch_model,
    plan,
    verify,
)
from yolo_flash.backends import registry, sparse
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import AttentionSpec, Window
from yolo_flash.cli import main
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial, select
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.patching.patch import layer_choices, layer_windows, patch_modules, targets
from yolo_flash.planning import autotune
from yolo_flash.planning.inputs import RunInput
from yolo_flash.planning.plan import describe, make_plan, plan_entry

CPU = torch.device("cpu")
LABEL = "sparse_window (approximate)"
PROBLEMS = {  # images, area, height, width, window, head dims
    "one image": (1, 1, 12, 13, 5, 32, 32),
    "strips of whole rows": (2, 4, 8, 6, 3, 32, 32),
    "strips that end within a row": (3, 4, 6, 10, 3, 32, 32),
    "strips shorter than a row": (1, 4, 2, 14, 5, 32, 32),
    "several blocks": (1, 2, 30, 22, 7, 16, 16),
    "a row of several blocks": (1, 1, 2, 300, 33, 16, 16),
    "itself alone": (2, 1, 7, 5, 1, 32, 32),
    "larger than the image": (2, 4, 9, 8, 99, 32, 32),
    "unequal head dims": (1, 1, 9, 7, 3, 36, 72),
    "one token": (1, 1, 1, 1, 3, 32, 64),
}


def problem(
    images: int, area: int, height: int, width: int, size: int, dim: int, dim_v: int, **fields: Any
) -> AttentionSpec:
    tokens = height * width // area
    common: dict[str, Any] = {"dtype": torch.float32, "layout": "nhwc", "area": area, **fields}
    return AttentionSpec(images * area, 2, tokens, tokens, dim, dim_v, window=Window(height, width, size), **common)


def seen_by_hand(spec: AttentionSpec) -> Tensor:
    """Bool `[area, tokens, tokens]`, a pair of tokens at a time."""
    assert spec.window is not None
    tokens, width, reach = spec.seq_len_q, spec.window.width, spec.window.size // 2
    seen = torch.zeros(spec.area, tokens, tokens, dtype=torch.bool)
    for strip in range(spec.area):
        places = [divmod(strip * tokens + t, width) for t in range(tokens)]
        for i, (y, x) in enumerate(places):
            for j, (other_y, other_x) in enumerate(places):
                seen[strip, i, j] = abs(y - other_y) <= reach and abs(x - other_x) <= reach
    return seen


def masked_attention(packed: Tensor, spec: AttentionSpec, seen: Tensor) -> Tensor:
    """Plain attention under a mask, in the dtype of `packed`."""
    q, k, v = (t.transpose(1, 2) for t in packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1))
    mask = seen.repeat(spec.batch // spec.area, 1, 1)[:, None].to(packed.device)
    scores = (q @ k.mT * spec.head_dim**-0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def random_packed(spec: AttentionSpec) -> Tensor:
    return torch.randn(spec.batch, spec.seq_len_q, spec.num_heads, 2 * spec.head_dim + spec.head_dim_v)


# What it computes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_gradients_are_those_of_masked_attention_in_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = problem(*PROBLEMS[name])
    monkeypatch.setattr(sparse, "_CPU_SCORES", 7 * spec.batch * spec.num_heads * spec.seq_len_q)  # a few at a time
    seen = seen_by_hand(spec)
    assert torch.equal(~sparse.unseen(spec, CPU), seen)
    leaf = random_packed(spec).requires_grad_()
    double = leaf.detach().double().requires_grad_()
    out, image = sparse.attend(leaf, spec)
    wanted = masked_attention(double, spec, seen)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(image, leaf[..., 2 * spec.head_dim :])
    upstream = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    (wanted_grad,) = torch.autograd.grad(wanted, double, upstream.double())
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_blocks_that_are_computed_are_those_that_the_window_touches(name: str) -> None:
    spec = problem(*PROBLEMS[name])
    order, y, x = sparse.tiled(spec, CPU)
    touched, covered = sparse.seen_blocks(y, x, spec.window.reach)  # type: ignore[union-attr]
    blocks, side = touched.shape[-1], sparse.BLOCK
    seen = seen_by_hand(spec).gather(1, order[:, :, None].expand(-1, -1, spec.seq_len_k))
    seen = seen.gather(2, order[:, None].expand(-1, spec.seq_len_q, -1))
    padded = torch.zeros(spec.area, blocks * side, blocks * side, dtype=torch.bool)
    padded[:, : spec.seq_len_q, : spec.seq_len_k] = seen
    tiles = padded.view(spec.area, blocks, side, blocks, side)
    assert not (tiles.any(4).any(2) & ~touched).any()
    assert not (covered & ~tiles.all(4).all(2)).any()
    assert not (covered & ~touched).any()


def test_a_large_image_needs_few_of_its_blocks_and_no_matrix_of_its_tokens() -> None:
    spec = problem(1, 4, 256, 256, 33, 32, 32)  # yolo12n at 4096 pixels; a mask of its tokens would take a GiB
    _, y, x = sparse.tiled(spec, CPU)
    touched, covered = sparse.seen_blocks(y, x, 16)
    assert touched.shape == (4, 128, 128)
    # A tile of 8 x 16 sees 2 others above and below, and 1 to the left and to the right, of 8 x 16 tiles in a strip.
    assert touched.sum(-1).max() == 5 * 3
    assert touched.float().mean() < 0.12
    assert covered.sum(-1).max() == 3


def test_patterns_are_kept_and_old_ones_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_patterns", type(sparse._patterns)())
    monkeypatch.setattr(sparse, "_captured", {})
    specs = [problem(1, 1, 4, 4 + i, 3, 32, 32) for i in range(sparse._MAX_PATTERNS + 1)]
    with torch.inference_mode():  # a training may come after a prediction
        first = sparse._pattern(specs[0], CPU)
    assert not first.mask.kv_indices.is_inference()
    assert first.mask.seq_lengths == (16, 16)
    assert sparse._pattern(specs[0]._replace(dtype=torch.float16), CPU) is first
    for spec in specs[1:]:
        sparse._pattern(spec, CPU)
    assert len(sparse._patterns) == sparse._MAX_PATTERNS
    assert sparse._pattern(specs[0], CPU) is not first


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_flex_attention_gets_is_the_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself is played by plain operators under the mask that it is given, a score at a time."""
    spec = problem(*PROBLEMS[name])

    def play(flex_attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        assert q.shape[-1] == k.shape[-1] in (16, 32, 64)
        indices = torch.arange(spec.seq_len_q)
        groups = torch.arange(spec.batch)[:, None, None]
        seen = mask.mask_mod(groups, None, indices[:, None], indices)
        blocks = mask.to_dense()[:, 0].bool().repeat_interleave(128, 1).repeat_interleave(128, 2)
        seen = seen & blocks[:, : spec.seq_len_q, : spec.seq_len_k]
        scores = (q @ k.mT * scale).masked_fill(~seen[:, None], float("-inf"))
        return scores.softmax(-1) @ v

    monkeypatch.setattr(sparse, "_program", lambda spec, q: play)
    leaf = random_packed(spec).double().requires_grad_()
    out = sparse._flex(leaf, spec)
    wanted = masked_attention(leaf, spec, seen_by_hand(spec))
    torch.testing.assert_close(out, wanted)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(t, leaf, upstream)[0] for t in (out, wanted)))


def test_flex_attention_is_compiled_for_the_first_sizes_and_once_for_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compiler stands in: what it makes is told apart by code, which it counts by."""
    made: list[tuple[Any, dict[str, Any]]] = []

    def compile_(function: Any, **options: Any) -> Any:
        made.append((function.__code__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(sparse, "_programs", {})
    monkeypatch.setattr(sparse, "_sizes", {})
    q = torch.zeros(1)
    specs = [problem(1, 1, 4, 4 + i, 3, 32, 32) for i in range(sparse._MAX_SIZES + 3)]
    programs = [sparse._program(spec, q) for spec in specs]
    assert sparse._program(specs[0], q) is programs[0]
    assert sparse._program(specs[0]._replace(window=Window(4, 4, 5)), q) is programs[0]
    assert programs[-1] is programs[-2] is programs[-3]
    assert [options["dynamic"] for _, options in made] == [False] * sparse._MAX_SIZES + [True]
    assert all(options["fullgraph"] for _, options in made)
    with torch.inference_mode():
        sparse._program(specs[0], torch.zeros(1))
    assert len({code for code, _ in made}) == len(made) == sparse._MAX_SIZES + 2


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (
            RuntimeError("no C compiler found"),
            pytest.raises(RuntimeError, match=r"no C compiler.*has to work"),
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), pytest.raises(torch.OutOfMemoryError)),
    ],
    ids=["no compiler", "no memory"],
)
def test_what_keeps_the_compiler_from_working_is_told(
    error: Exception, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(sparse, "_program", lambda spec, q: fail)
    spec = problem(1, 1, 4, 4, 3, 32, 32)
    with raised:
        sparse._flex(random_packed(spec), spec)


# In blocks and models -------------------------------------------------------------------------------------------------
def block_with(kind: str, window: int | str = 3, backend: str = "sparse_window") -> Any:
    block = make(kind)
    patch_modules(block, FlashConfig(backend=backend, window=window))
    return block


def outcome(block: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(leaf)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [leaf, *block.parameters()])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["area1", "area4", "psa", "psa 36/72"])
def test_a_window_as_large_as_the_image_is_the_exact_block(kind: str, layout: str) -> None:
    for size in ((2, 8, 6), (3, 7, 8), (1, 6, 10)):
        sparse_block, exact = block_with(kind, 21), block_with(kind, backend="sdpa_math")
        exact.load_state_dict(sparse_block.state_dict())
        x = torch.randn(size[0], channels(exact), *size[1:]).double().to(memory_format=LAYOUTS[layout])
        for found, wanted in zip(outcome(sparse_block.double(), x), outcome(exact.double(), x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["area4", "psa"])
def test_a_far_token_changes_nothing_and_a_near_one_does(kind: str) -> None:
    """The positional convolution of both blocks sees 7 x 7 pixels at most, and BatchNorm is fixed."""
    block = block_with(kind, 5).eval()
    x = torch.randn(1, channels(block), 8, 20)
    with torch.no_grad():
        before = block(x)
        x[0, :, 1, 2] += 1
        change = (block(x) - before).abs().amax(1)[0]
    assert change[:, 6:].max() == 0
    assert change[1, 2] > 0
    assert change[1, 4] > 0


def test_gradients_of_gradients_are_those_within_the_window() -> None:
    block, x = block_with("area4").double(), torch.randn(2, 64, 4, 4, dtype=torch.double)
    leaf = x.requires_grad_()
    (plain,) = torch.autograd.grad(block(leaf).square().sum(), leaf)
    (first,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(first, plain)
    assert torch.autograd.grad(first.square().sum(), leaf)[0].isfinite().all()


def test_a_retained_graph_has_a_second_backward() -> None:
    block, x = block_with("area4"), torch.randn(2, 64, 4, 4, requires_grad=True)
    out = block(x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_backend_that_raises_is_an_error_and_no_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("boom")

    block = block_with("area4")
    out = block(torch.randn(2, 64, 4, 4, requires_grad=True))
    monkeypatch.setattr(sparse, "_attend", fail)
    with pytest.raises(FlashKernelError, match=r"sparse_window \(approximate\) raised in the backward of"):
        out.sum().backward()
    with pytest.raises(FlashKernelError, match=r"sparse_window \(approximate\) raised in the block"):
        block(torch.randn(2, 64, 4, 4))


def test_specs_of_exact_backends_know_no_window_and_stay_equal(tiny_model: str) -> None:
    model = YOLO(tiny_model).model
    inputs = [RunInput("train", 2, 64, 32, torch.float32, False), RunInput("train", 2, 32, 64, torch.float32, False)]
    wide, high = (make_plan(model, Dispatcher(FlashConfig()), MACHINES["CPU"], [given]) for given in inputs)
    assert [row.decision.spec for row in wide] == [row.decision.spec for row in high]
    assert {row.decision.spec.window for row in wide} == {None}
    config = FlashConfig(backend="sparse_window", window=3)
    rows = make_plan(model, Dispatcher(config), MACHINES["CPU"], inputs[:1])
    assert {row.decision.spec.window for row in rows} == {Window(8, 4, 3)}


def test_the_plan_has_the_specs_that_blocks_pose(tiny_model: str) -> None:
    model: Any = patch_model(YOLO(tiny_model), backend="sparse_window", window="24px").model
    rows = make_plan(
        model,
        Dispatcher(FlashConfig(backend="sparse_window", window="24px")),
        MACHINES["CPU"],
        [RunInput("val", 1, 64, 96, torch.float32, False)],
    )
    block: Any = next(iter(targets(model).values()))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 64, 96))
    assert {spec for spec, _, _ in block._flash_dispatcher._decisions} == {row.decision.spec for row in rows}


# What a window is -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "kept", "tokens"),
    [
        (33, 33, 33),
        ("33", 33, 33),
        (32, 32, 33),
        (1, 1, 1),
        ("256px", "256px", 17),
        ("250 px", "250px", 17),
        ("1px",) * 2 + (1,),
    ],
)
def test_a_window_is_a_number_of_tokens_or_of_pixels(given: Any, kept: Any, tokens: int) -> None:
    config = FlashConfig(window=given)
    assert config.window == kept
    assert config.window_tokens(16) == tokens


@pytest.mark.parametrize("given", [0, -3, "0px", 2.5, True, "px", "33 tokens", None, [3]])
def test_what_is_no_window_is_refused(given: Any) -> None:
    with pytest.raises(FlashConfigError, match=r"window must be a whole number of tokens \(33\) or of pixels"):
        FlashConfig(window=given)


def test_pixels_become_tokens_by_the_stride_of_each_layer() -> None:
    model, config = YOLO("yolo12n.yaml").model, FlashConfig(backend="sparse_window", window="512px")
    windows = layer_windows(model, config, layer_choices(model, config))
    assert {name.split(".")[1]: size for name, size in windows.items()} == {"6": 33, "8": 17}
    assert len(windows) == 8
    config = FlashConfig(layers={"model.8*": "sparse_window"}, window=5)
    windows = layer_windows(model, config, layer_choices(model, config))
    assert {name.split(".")[1]: size for name, size in windows.items()} == {"8": 5}


def test_the_command_line_sets_backend_window_and_layers(log: list[str]) -> None:
    words = ["plan", "model=yolo12n.yaml", "imgsz=64", "device=cpu"]
    main.main([*words, "flash.backend=sparse_window", "flash.window=64px"])
    assert "within 3 x 3, 5 x 5 tokens around it" in "\n".join(log)
    log.clear()
    main.main([*words, "flash.layers=model.8.*:sparse_window", "flash.window=3", "flash.autotune=false"])
    rows = [line for line in "\n".join(log).splitlines() if " in model." in line]
    assert [LABEL in row for row in rows] == [" in model.8" in row for row in rows]
    assert any(LABEL in row for row in rows)


def test_a_part_of_a_model_tells_no_stride() -> None:
    with pytest.raises(FlashConfigError, match=r"window='64px'.*only a whole model tells.*window=33"):
        block_with("area4", "64px")


# Never a surprise -----------------------------------------------------------------------------------------------------
def test_one_backend_is_approximate_and_says_so() -> None:
    assert [name for name, backend in BACKENDS.items() if not backend.exact] == ["sparse_window"]
    assert registry.label("sparse_window") == LABEL
    assert registry.label("sdpa_flash") == "sdpa_flash"
    assert registry.label("auto") == "auto"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_auto_never_takes_it(machine: Any) -> None:
    fast = {name: Trial(ms=1e-3 if name == "sparse_window" else 1.0, extra_bytes=0) for name in BACKENDS}
    failed = {name: "boom" for name in BACKENDS if name != "sparse_window"}
    for spec in (problem(4, 4, 20, 20, 9, 32, 32), problem(4, 1, 20, 20, 9, 32, 64, dtype=torch.float16)):
        for known in (spec, spec._replace(window=None)):
            for deterministic in ("prefer", "strict"):
                for arguments in ({}, {"trials": fast}, {"failed": failed}, {"trials": fast, "memory_limited": True}):
                    decision = select(known, machine, "auto", deterministic, **arguments)
                    assert decision.backend != "sparse_window"
                    assert "asked for by name" in decision.refused["sparse_window"][0]
            assert "sparse_window" not in autotune.candidates(known, machine)


def test_trials_of_it_are_not_read_from_a_file() -> None:
    spec = problem(1, 1, 4, 4, 3, 32, 32)
    with pytest.raises(ValueError, match="window="):
        trial_cache._spec(json.loads(json.dumps(spec.as_json())))
    exact = spec._replace(window=None)
    assert trial_cache._spec(json.loads(json.dumps(exact.as_json()))) == exact


@pytest.mark.parametrize(
    ("card", "fields", "reason"),
    [
        ("T4", {}, "needs compute capability >= 8.0, Tesla T4 has 7.5"),
        ("H100 without Triton", {}, "needs triton.*No module named 'triton'"),
        ("MPS", {}, "runs on CUDA, ROCm and the CPU, the device is Apple GPU"),
        ("H100", {"dtype": torch.float64}, "needs float32 or float16 or bfloat16, the tensors are float64"),
        ("H100", {"head_dim_v": 300}, "needs head_dim <= 256, the layer has 300"),
        ("H100", {"batch": 40000}, "needs batch x area x heads <= 65535, found 80000"),
        ("H100", {"layout": "separate"}, "needs an image, and the queries of nn.MultiheadAttention"),
        ("H100", {"window": None}, "a graph of torch.compile leaves open: compile=False"),
        ("CPU", {"layout": "separate"}, "needs an image, and the queries of nn.MultiheadAttention"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(card: str, fields: dict[str, Any], reason: str) -> None:
    spec = problem(4, 4, 20, 20, 9, 32, 32, dtype=torch.float16)._replace(**fields)
    with pytest.raises(BackendNotSupportedError, match=rf"backend=sparse_window \(approximate\) cannot run .*{reason}"):
        select(spec, MACHINES[card], "sparse_window")


def test_torch_2_5_is_refused() -> None:
    old = dataclasses.replace(MACHINES["H100"], torch="2.5.1+cu124")
    with pytest.raises(BackendNotSupportedError, match=r"needs torch >= 2.6, found 2.5.1"):
        select(problem(1, 1, 20, 20, 9, 32, 32, dtype=torch.float16), old, "sparse_window")


def test_it_runs_on_cards_from_ampere_on_and_on_the_cpu_reproducibly() -> None:
    for card in ("A100", "H100", "B200", "RTX 5090", "CPU"):
        spec = problem(1, 1, 20, 20, 9, 32, 32, deterministic=True)
        decision = select(spec, MACHINES[card], "sparse_window", "strict")
        assert (decision.backend, decision.why, decision.reproducible) == ("sparse_window", "asked for", True)


def test_plan_and_json_say_approximate(tiny_model: str) -> None:
    model: Any = patch_model(YOLO(tiny_model), layers={"model.3*": "sparse_window"}, window=5, autotune=False)
    rows = plan(model, imgsz=64, batch=2, device="cpu")
    text = describe(rows, MACHINES["CPU"])
    named = [line for line in text.splitlines() if "sparse_window" in line]
    assert named
    assert all(LABEL in line for line in named)
    assert "a query sees the keys within 5 x 5 tokens around it, and no others" in text
    for row in rows:
        entry = json.loads(json.dumps(plan_entry(row)))
        assert entry["approximate"] == (entry["backend"] == "sparse_window") == row.layer.startswith("model.3")
    exact = plan(patch_model(YOLO(tiny_model), autotune=False), imgsz=64, batch=2, device="cpu")
    assert "approximate" not in describe(exact, MACHINES["CPU"])


def test_training_and_validation_run_it_and_every_line_says_approximate(
    tiny_model: str, tiny_args: dict[str, Any], log: list[str]
) -> None:
    model: Any = patch_model(YOLO(tiny_model), backend="sparse_window", window=3)
    model.train(**tiny_args)
    lines = [line for message in log for line in message.splitlines() if "sparse_window" in line]
    assert len(lines) >= 4  # plan of two modes, the profiled step, the epoch
    assert all("approximate" in line for line in lines)
    assert any(f"one step ran 3 x {LABEL}" in line for line in lines)
    assert not any("Please report" in message for message in log)
    events = [json.loads(line) for line in (Path(model.trainer.save_dir) / "flash.jsonl").read_text().splitlines()]
    assert {event["approximate"] for event in events if event["event"] == "plan"} == {True}
    dispatcher = model.trainer.flash_run.dispatcher
    assert {spec.training for spec, choice, _ in dispatcher._decisions if choice == "sparse_window"} == {True, False}
    model.predict(torch.rand(1, 3, 32, 64), verbose=False)


def test_a_compiled_model_is_refused_before_the_first_step(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model: Any = patch_model(YOLO(tiny_model), backend="sparse_window", window=3)
    with pytest.raises(BackendNotSupportedError, match=r"sparse_window \(approximate\) cannot run with compile=True"):
        model.train(**tiny_args, compile=True)


def test_a_compiled_block_is_refused_in_words() -> None:
    torch.compiler.reset()  # else dynamo may have given up on this code, after the tests before
    with pytest.raises(Exception, match=r"sparse_window \(approximate\) cannot run .* leaves open: compile=False"):
        torch.compile(block_with("area4"), backend="eager")(torch.randn(2, 64, 4, 4))


def test_rtdetr_is_refused() -> None:
    model: Any = patch_model(RTDETR("rtdetr-l.yaml"), backend="sparse_window", window="256px")
    with pytest.raises(BackendNotSupportedError, match=r"nn.MultiheadAttention have no place in one"):
        plan(model, imgsz=64, batch=2, device="cpu")


def test_an_export_is_stock_and_says_so(tiny_model: str, tmp_path: Path, log: list[str]) -> None:
    for backend in ("sparse_window", "sdpa_flash"):
        log.clear()
        model: Any = patch_model(YOLO(tiny_model), backend=backend)
        model.export(format="torchscript", imgsz=32, device="cpu")
        told = [line for line in log if "the exported model has stock attention" in line]
        assert len(told) == (backend == "sparse_window")
        assert all(LABEL in line for line in told)


def test_checks_has_it_with_what_would_keep_it_from_running(log: list[str]) -> None:
    main.main(["checks", "device=cpu"])
    rows = [line.split(maxsplit=1)[1] for line in log[0].splitlines() if line.strip().startswith("sparse_window")]
    ready = "approximate, by name only: ready, in plain operators that are slow"
    assert rows[:2] == [ready] * 2
    assert rows[2].startswith("approximate, by name only: needs an image")


# verify ---------------------------------------------------------------------------------------------------------------
def test_verify_says_how_far_it_is_from_exact_and_passes(tiny_model: str, log: list[str]) -> None:
    facts = verify(tiny_model, imgsz=64, device="cpu", backend="sparse_window", window=3)
    assert facts["ok"]
    assert facts["approximate"]
    assert not facts["off"]
    for entry in facts["layers"]:
        assert (entry["backend"], entry["ok"], entry["exact"]) == ("sparse_window", True, False)
        assert max(row["ours"] for row in entry["compared"]) > 0.05  # from exact attention
        assert max(row["ours"] for row in entry["windowed"]) < 1e-4  # from its own window
    text = next(message for message in log if "yolo-flash verify" in message)
    rows = [line for line in text.splitlines() if "sparse_window" in line]
    assert len(rows) == len(facts["layers"])
    assert all(LABEL in row for row in rows)
    assert "OFF" not in text
    assert text.splitlines()[-1].startswith("yolo-flash verify: 3 of 3 attention layers are approximate")


def test_verify_with_a_window_over_the_image_finds_no_distance(tiny_model: str) -> None:
    facts = verify(tiny_model, imgsz=64, device="cpu", backend="sparse_window", window=99)
    assert facts["ok"]
    assert max(row["ours"] for entry in facts["layers"] for row in entry["compared"]) < 1e-4


def test_verify_judges_exact_layers_beside_it_and_all_leaves_it_out(tiny_model: str) -> None:
    settings: dict[str, Any] = {"imgsz": 64, "device": "cpu", "backend": "sdpa_flash"}
    facts = verify(tiny_model, layers={"model.4*": "sparse_window"}, window=3, **settings)
    assert facts["ok"]
    assert {(entry["backend"], entry["exact"]) for entry in facts["layers"]} == {
        ("sdpa_flash", True),
        ("sparse_window", False),
    }
    facts = verify(tiny_model, all=True, **settings)
    assert not facts["approximate"]
    assert "sparse_window" not in {entry["backend"] for entry in facts["layers"]}


def test_verify_notices_a_window_that_is_not_the_one_asked_for(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sparse._unseen

    def wrong(spec: AttentionSpec, *args: Any) -> Tensor:
        assert spec.window is not None
        if spec.dtype is torch.float64:
            return right(spec, *args)
        return right(spec._replace(window=spec.window._replace(size=1)), *args)

    monkeypatch.setattr(sparse, "_unseen", wrong)
    facts = verify(tiny_model, imgsz=64, device="cpu", backend="sparse_window", window=3)
    assert not facts["ok"]
    assert any("against its window in float64" in sentence for sentence in facts["off"])


def test_verify_notices_numbers_that_are_not_finite(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sparse._attend

    def spoilt(q: Tensor, *args: Any) -> Tensor:
        return right(q, *args) * (float("nan") if q.dtype is torch.float32 else 1)

    monkeypatch.setattr(sparse, "_attend", spoilt)
    facts = verify(tiny_model, imgsz=64, device="cpu", backend="sparse_window", window=3)
    assert not facts["ok"]
    assert any(sentence.startswith("the whole model (predict)") for sentence in facts["off"])
