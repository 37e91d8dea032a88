"""On a CUDA device: FlexAttention computes the window and its gradients, in steps, in graphs and in all sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from ultralytics import YOLO

from tests.backends.test_sparse import LABEL, PROBLEMS, masked_attention, problem, random_packed, seen_by_hand
from tests.counting import randomise
from yolo_flash import FlashConfig, patch_model, verify
from yolo_flash.backends import sparse
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.graphs.graphed_step import GraphedStep
from yolo_flash.patching.patch import patch_modules
from yolo_flash.utils.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def both(spec: AttentionSpec, packed: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the packed tensor."""
    leaf = packed.detach().requires_grad_()
    out, _ = sparse.attend(leaf, spec)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in PROBLEMS]
    + [(name, dtype) for name in ("several blocks", "unequal head dims") for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_output_and_gradients_are_those_of_masked_attention_in_float64(name: str, dtype: torch.dtype) -> None:
    spec = problem(*PROBLEMS[name], dtype=dtype)
    packed, upstream = random_packed(spec).cuda().to(dtype), torch.randn(spec.batch, spec.seq_len_q, 2, spec.head_dim_v)
    upstream = upstream.cuda().to(dtype)
    out, grad = both(spec, packed, upstream)
    double = packed.double().requires_grad_()
    wanted = masked_attention(double, spec, seen_by_hand(spec))
    (wanted_grad,) = torch.autograd.grad(wanted, double, upstream.double())
    assert relative_error(out, wanted) < ROUNDING[dtype]
    assert relative_error(grad, wanted_grad) < ROUNDING[dtype]


def test_the_backward_gives_the_same_bits_every_time() -> None:
    spec = problem(2, 4, 40, 40, 9, 32, 32, dtype=torch.float16)
    packed = random_packed(spec).cuda().half()
    upstream = torch.randn(spec.batch, spec.seq_len_q, 2, 32, device="cuda").half()
    first = both(spec, packed, upstream)
    for _ in range(5):
        for found, wanted in zip(both(spec, packed, upstream), first, strict=True):
            assert torch.equal(found, wanted)


def test_no_score_matrix_reaches_the_memory() -> None:
    """16,384 tokens of 2 heads have a GiB of scores in float16."""
    spec = problem(1, 1, 128, 128, 17, 32, 32, dtype=torch.float16)
    packed = random_packed(spec).cuda().half()
    upstream = torch.randn(1, spec.seq_len_q, 2, 32, device="cuda").half()
    both(spec, packed, upstream)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(spec, packed, upstream)
    assert torch.cuda.max_memory_allocated() - before < 2**27


def test_images_of_many_sizes_share_a_few_programs() -> None:
    sparse._programs.clear()
    sparse._sizes.clear()
    for training in (False, True):
        for i in range(12):
            spec = problem(1 + i % 3, 4, 4 + 4 * i, 20 + i, 7, 32, 32, dtype=torch.float16, training=training)
            packed = random_packed(spec)
            wanted = masked_attention(packed.double(), spec, ~sparse.unseen(spec, packed.device))
            with torch.set_grad_enabled(training):
                leaf = packed.cuda().half().requires_grad_(training)
                out, _ = sparse.attend(leaf, spec)
                if training:
                    assert torch.autograd.grad(out.float().sum(), leaf)[0].isfinite().all()
            assert relative_error(out.detach().cpu(), wanted) < ROUNDING[torch.float16]
    assert len(sparse._programs) == 2 * (sparse._MAX_SIZES + 1)


def test_a_training_may_come_after_a_prediction() -> None:
    spec = problem(1, 4, 20, 20, 5, 32, 32, dtype=torch.float16)
    packed, upstream = random_packed(spec).cuda().half(), torch.randn(4, 100, 2, 32, device="cuda").half()
    with torch.inference_mode():
        predicted, _ = sparse.attend(packed.clone(), spec._replace(training=False))
    out, grad = both(spec, packed, upstream)
    assert torch.equal(out, predicted)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("config", "amp"),
    [("yolo12n", True), ("yolo12n", "bf16"), ("yolo12n", False), ("yolo26n", True), ("yolov10m", True)],
)
def test_verify_finds_the_window_in_every_layer(config: str, amp: Any) -> None:
    facts = verify(f"{config}.yaml", imgsz=320, device=0, amp=amp, backend="sparse_window", window=5)
    assert facts["ok"], facts["off"]
    assert facts["approximate"]
    for entry in facts["layers"]:
        assert entry["backend"] == "sparse_window"
        assert entry["windowed"]


def network(window: int) -> Any:
    model: Any = randomise(YOLO("yolo12n.yaml").model).cuda().to(memory_format=torch.channels_last).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    patch_modules(model, FlashConfig(backend="sparse_window", window=window))
    return model


def step(run: Any, images: Tensor) -> list[Tensor]:
    with torch.autocast("cuda", dtype=torch.float16):
        outputs = [out for out in pytree.tree_leaves(run(images)) if isinstance(out, Tensor) and out.requires_grad]
    sum(out.float().square().mean() for out in outputs).backward()  # type: ignore[union-attr]
    return [out.detach().clone() for out in outputs]


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def test_replays_are_eager_steps_and_keep_their_masks() -> None:
    model = network(5)
    twin = copy.deepcopy(model)
    images = torch.rand(2, 3, 256, 256, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        graphed = GraphedStep(model, images)
    held = len(sparse._captured)
    assert held
    for i in range(sparse._MAX_PATTERNS + 1):  # those of the graph leave the cache
        sparse._pattern(problem(1, 1, 5, 5 + i, 3, 32, 32), images.device)
    torch.cuda.empty_cache()
    trash = [torch.full((2**20,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    for _ in range(2):
        other = torch.rand_like(images)
        for found, wanted in zip(step(graphed, other), step(twin, other), strict=True):
            assert relative_error(found, wanted) < 1e-2
    assert relative_error(gradients(model), gradients(twin)) < 2e-2
    del trash


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_training_validation_and_prediction_run_it(graphs: str, tiny_args: dict[str, Any], log: list[str]) -> None:
    args = {**tiny_args, "device": 0, "imgsz": 128, "epochs": 4}
    model: Any = patch_model(YOLO("yolo12n.yaml"), backend="sparse_window", window=3, graphs=graphs)
    model.train(**args)
    lines = [line for message in log for line in message.splitlines() if "sparse_window" in line]
    assert lines
    assert [line for line in lines if "approximate" not in line] == []
    assert any(f"one step ran 8 x {LABEL}" in line for line in lines)
    assert not any("Please report" in message for message in log)
    events = [json.loads(line) for line in (Path(model.trainer.save_dir) / "flash.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert len(epochs) == 4
    assert all(event["backends"] == {"sparse_window": 8} for event in epochs)
    replayed = [event["graphs"].get("replayed", 0) for event in epochs]
    assert (replayed[-1] > 0) == (graphs == "on")
    for shape in ((64, 96), (96, 64), (128, 128), (160, 96), (96, 160)):
        model.predict(torch.rand(1, 3, *shape), verbose=False, device=0)
    trained = model.val(data=args["data"], imgsz=128, device=0, workers=0, plots=False, verbose=False)
    assert trained.box.map == trained.box.map  # a number
