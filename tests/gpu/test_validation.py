"""Validation from CUDA graphs: the bits of eager forwards, metrics to every digit, and memory that comes back."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from ultralytics import ASSETS, RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.metrics import box_iou
from ultralytics.utils.ops import xywh2xyxy

from tests.counting import settle
from tests.datasets import create_dataset
from tests.gpu.test_graphs import Synchronising
from tests.graphs.test_validation import Watch, in_training
from yolo_flash import FlashConfig, patch_model
from yolo_flash.graphs.inference import InferenceGraphs
from yolo_flash.graphs.validation import ValidationGraphs
from yolo_flash.patching.patch import patch_modules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIDES = (256, 128, 192)


def ema(config: str = "yolo12n.yaml") -> Any:
    """As the trainer's: float32 weights in channels_last, which need no gradient."""
    model: Any = settle(YOLO(config).model, side=256).cuda().to(memory_format=torch.channels_last).eval()
    patch_modules(model, FlashConfig())
    return model.requires_grad_(False)


def images(side: int, seed: int, batch: int = 4) -> Tensor:
    """A photograph, moved a little from image to image."""
    photo = cv2.imread(str(ASSETS / "bus.jpg"))
    assert photo is not None
    image = torch.from_numpy(cv2.resize(photo, (side, side))).cuda().permute(2, 0, 1).half() / 255
    return torch.stack([image.roll((seed + 8 * i, 5 * i), (1, 2)) for i in range(batch)])


def flat(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """The same bits; weights that no training has made may overflow half precision here and there."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert wanted[0].isfinite().float().mean() > 0.9


@pytest.fixture
def as_in_training() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        yield


# Metrics --------------------------------------------------------------------------------------------------------------
def test_boxes_are_compared_alike_on_every_device() -> None:
    """Every operation of these functions rounds once, so that the CPU finds the bits of the GPU."""
    corners = torch.rand(2000, 2, 2, device="cuda") * 640
    boxes = torch.cat((corners.amin(1), corners.amax(1)), 1)
    for dtype in (torch.float32, torch.float16):
        mine = boxes.to(dtype)
        assert torch.equal(box_iou(mine[:50], mine).cpu(), box_iou(mine[:50].cpu(), mine.cpu()))
        assert torch.equal(xywh2xyxy(mine).cpu(), xywh2xyxy(mine.cpu()))


# Forwards -------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml", "yolo11n-seg.yaml", "yolov8n.yaml"])
def test_replays_have_the_bits_of_forwards_while_weights_change(config: str) -> None:
    """Shapes take turns in one memory, and outputs stay what they were; weights change as the EMA's do."""
    network, graphs, kept = ema(config), InferenceGraphs(), []
    weights = [p for p in network.state_dict().values() if p.is_floating_point()]
    for turn in range(5):
        for side in SIDES:
            batch = images(side, seed=7 * turn + side)
            found, wanted = flat(graphs(network, batch)), flat(network(batch))
            assert (graphs.outcome == "") is (turn > 0), graphs.outcome
            assert [t.stride() for t in found] == [t.stride() for t in wanted]
            assert_same(found, wanted)
            kept.append((found, wanted))
        torch._foreach_mul_(weights, 1.001)
    assert len(graphs) == len(SIDES)
    for found, wanted in kept:
        assert_same(found, wanted)
    assert not torch.equal(kept[0][0][0], kept[3][0][0])


@pytest.mark.usefixtures("as_in_training")
def test_smaller_shapes_find_room_in_the_memory_of_larger_ones() -> None:
    network, graphs = ema(), InferenceGraphs()
    held = []
    for side in (512, 256):
        for _ in range(2):
            graphs(network, images(side, 0, batch=16))
        held.append(graphs.held)
    assert len(graphs) == 2
    assert held[0] > 2**26
    assert held[1] < 1.5 * held[0]
    graphs.release()
    assert graphs.held == 0
    gc.collect()
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert before - torch.cuda.memory_reserved() >= 0.8 * held[0]


def test_the_autocast_of_the_moment_is_captured() -> None:
    network, graphs, batch = ema(), InferenceGraphs(), images(128, 0).float()
    with torch.inference_mode():
        for enabled in (True, False):
            for _ in range(3):
                with torch.autocast("cuda", torch.float16, enabled=enabled):
                    found, wanted = flat(graphs(network, batch)), flat(network(batch))
                assert_same(found, wanted)
            assert graphs.outcome == ""


@pytest.mark.usefixtures("as_in_training")
def test_a_network_that_waits_for_the_device_goes_on_eager() -> None:
    network, graphs = Synchronising().cuda().eval().requires_grad_(False), InferenceGraphs()
    for seed in range(3):
        batch = images(64, seed)
        torch.testing.assert_close(graphs(network, batch), network(batch))
    assert len(graphs) == 0
    assert graphs.why_not
    other, again = nn.Conv2d(3, 8, 3).cuda().eval().requires_grad_(False), InferenceGraphs()
    for seed in range(3):  # the device is as good as new
        assert torch.equal(again(other, images(64, seed)), other(images(64, seed)))
    assert again.outcome == ""


@pytest.mark.usefixtures("as_in_training")
def test_too_little_memory_for_a_capture_ends_eager() -> None:
    """Eager forwards have what they need, and a graph beside them has not."""
    network, graphs = ema(), InferenceGraphs()
    batch = images(512, 0, batch=16)
    wanted = network(batch)[0].clone()
    gc.collect()
    torch.cuda.empty_cache()
    network(batch)
    limit = torch.cuda.memory_reserved() + 2**26
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(limit / total)
        for _ in range(4):
            assert_same([graphs(network, batch)[0]], [wanted])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(graphs) == 0
    assert graphs.why_not


@pytest.mark.usefixtures("as_in_training")
def test_what_has_to_stay_free_stays_free() -> None:
    network, graphs = ema(), InferenceGraphs()
    graphs.beside = torch.cuda.get_device_properties(0).total_memory
    for _ in range(3):
        graphs(network, images(128, 0))
    assert len(graphs) == 0
    assert "are free: a smaller batch would do" in graphs.why_not


# Runs -----------------------------------------------------------------------------------------------------------------
class Twice(DetectionTrainer):
    """Every validation runs eager first, and then as it would: the two have to agree."""

    results: list[tuple[Any, Any]]
    watch: Watch

    def validate(self) -> Any:
        graphs: ValidationGraphs = self.validator._flash_graphs
        graphs._given_up = "the eager one of two"
        eager = super().validate()
        seen, self.watch.seen = self.watch.seen, []
        graphs._given_up = ""
        replayed = super().validate()
        assert repr(self.watch.seen) == repr(seen)  # NaN is NaN
        assert len(seen) >= 2
        self.watch.seen = []
        assert repr(replayed) == repr(eager)
        self.results.append(eager)
        return replayed


@pytest.mark.parametrize("steps", ["eager", "graphs"])
@pytest.mark.parametrize(
    ("config", "amp"),
    [("yolo12n.yaml", True), ("yolo12n.yaml", "bf16"), ("yolo12n.yaml", False), ("yolo26n.yaml", True)],
)
def test_validation_within_a_training(
    config: str, amp: Any, steps: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, losses and every detection are those of an eager validation of the same weights."""
    if steps == "eager":
        monkeypatch.setattr("yolo_flash.graphs.policy.not_supported_reasons", lambda trainer, mode: ["not asked for"])
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = patch_model(YOLO(config), graphs="on" if steps == "graphs" else "auto")
    Twice.results, Twice.watch = [], Watch(model)
    model.add_callback("on_train_start", begin)
    more = {"epochs": 3, "batch": 1, "imgsz": 128, "device": 0, "amp": amp, "conf": 1e-5}
    model.train(trainer=Twice, **{**tiny_args, **more})
    counts = in_training(model)
    assert len(Twice.results) == len(counts) == 3
    assert counts[-1]["replayed"] == counts[-1]["batches"] == 2, counts
    assert counts[-1]["held_bytes"] > 0
    assert (model.trainer.flash_run.graphs.why_not == "") is (steps == "graphs")
    del model, Twice.watch
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**28


def begin(trainer: Any) -> None:
    """Weights that say something, in their memory; and graphs whatever the clock of this machine says."""
    trainer.flash_run.validation._graphs._pays = False
    twin = settle(copy.deepcopy(trainer.ema.ema).cpu()).state_dict()
    with torch.no_grad():
        for name, value in trainer.model.state_dict().items():
            value.copy_(twin[name])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("config", "task"),
    [
        ("yolo12n.yaml", "detect"),
        ("yolo26n.yaml", "detect"),
        ("yolo11n-seg.yaml", "segment"),
        ("yolo12n-cls.yaml", "classify"),
        ("rtdetr-l.yaml", "detect"),
    ],
)
def test_a_validation_by_itself(
    config: str, task: str, half: bool, tmp_path: Any, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = create_dataset(tmp_path / "data", task, val=10)
    model = (RTDETR if config.startswith("rtdetr") else YOLO)(config)
    settle(model.model, side=320 if config.startswith("rtdetr") else 96)
    say: dict[str, Any] = {
        "data": data,
        "imgsz": 320,
        "batch": 2,
        "workers": 0,
        "device": 0,
        "plots": False,
        "verbose": False,
        "conf": 1e-3,
        "quantize": 16 if half else None,
    }
    found: dict[str, Any] = {}
    idle = idle_bytes()
    for mode in ("off", "on"):
        patch_model(model, graphs=mode)
        seen: list[Any] = []

        def note(validator: Any, seen: list[Any] = seen) -> None:
            seen.append({k: [v.tolist() for v in values] for k, values in stats_of(validator).items()})

        model.reset_callbacks()
        model.add_callback("on_val_batch_end", note)
        metrics = model.val(**say)
        found[mode] = metrics.results_dict, seen
    assert repr(found["on"]) == repr(found["off"])  # NaN is NaN
    lines = [line for line in log if "CUDA graphs" in line]
    assert config.startswith("rtdetr") or any("validation runs from CUDA graphs" in line for line in lines), lines
    assert idle_bytes() - idle < 2**28  # what other tests left in this process is not counted


def idle_bytes() -> int:
    """What torch holds and nobody uses, such as the memory of graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def stats_of(validator: Any) -> dict[str, list[Any]]:
    """Confidences and classes of a detector; of others nothing."""
    stats = getattr(validator.metrics, "stats", {})
    return {name: stats[name] for name in ("conf", "pred_cls", "tp") if name in stats}


def test_auto_says_what_it_found(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    model.train(**{**tiny_args, "epochs": 4, "batch": 1, "imgsz": 128, "device": 0})
    last = in_training(model)[-1]
    assert last["batches"] == 2
    assert last["replayed"] + sum(last["eager"].values()) == 2
    assert last["replayed"] or any("from a graph" in reason or "gain nothing" in reason for reason in last["eager"])
