"""RT-DETR's step in fixed shapes: what an eager step computes, for any labels, and refused where it is not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics import RTDETR
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.models.utils.ops import HungarianMatcher
from ultralytics.nn.tasks import RTDETRDetectionModel
from ultralytics.utils import YAML
from ultralytics.utils.torch_utils import init_seeds

from tests.engine.test_telemetry import events, of
from tests.graphs.test_assignment import by_the_host
from tests.graphs.test_limits import a_trainer
from tests.graphs.test_policy import Replay, replays  # noqa: F401  a fixture
from tests.versions import few_queries, needs_triton
from yolo_flash import patch_model
from yolo_flash.graphs import rtdetr, rtdetr_loss
from yolo_flash.graphs.fixed_loss import Capacity
from yolo_flash.graphs.kinds import RTDETR as KIND
from yolo_flash.graphs.kinds import kind_of
from yolo_flash.graphs.limits import not_supported_reasons
from yolo_flash.graphs.policy import GraphPolicy
from yolo_flash.graphs.rtdetr_loss import MatchedLoss, not_supported_reason, pad_targets
from yolo_flash.graphs.signature import Signature

needs_triton()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities in Triton's interpreter
SIDE, QUERIES, CLASSES = 64, 12, 3
BACKBONE = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 16, 32)] + [[-1, 1, "AIFI", [32, 2]]]
HEAD = [[-1, 1, "Conv", [32, 1, 1]], [[2, 4], 1, "RTDETRDecoder", ["nc", 32, QUERIES, 4, 2, 2]]]
TINY = {"nc": CLASSES, "backbone": BACKBONE, "head": HEAD}
Batch = dict[str, Any]


def a_model(classes: int = CLASSES, denoising: int = 10) -> Any:
    """Without a weight that is zero, which would hide what lies behind it."""
    model: Any = RTDETRDetectionModel({**TINY, "nc": classes}, verbose=False).train()
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=source, dtype=torch.float32)
    model.nc, model.model[-1].num_denoising = classes, denoising
    model.criterion = model.init_criterion()
    return model


def a_batch(of_image: list[int], seed: int = 0, images: int = 3, classes: int = CLASSES) -> Batch:
    source = torch.Generator().manual_seed(seed)
    count = len(of_image)
    return {
        "img": torch.rand(images, 3, SIDE, SIDE, generator=source, dtype=torch.float32),
        "batch_idx": torch.tensor(of_image, dtype=torch.float32),
        "cls": torch.randint(0, classes, (count, 1), generator=source).float(),
        "bboxes": torch.rand(count, 4, generator=source, dtype=torch.float32) * 0.4 + 0.3,
    }


BATCHES = {
    "some": a_batch([0] * 3 + [1] * 2 + [2] * 4),
    "an image without": a_batch([0] * 4 + [2] * 3, 1),
    "one": a_batch([1], 2),
    "one image": a_batch([0] * 3, 3, images=1),
    "more than are denoised": a_batch([0] * 11 + [1] * 4 + [2] * 12, 4),
    "one a query": a_batch([0] * 12, 5, images=2),
}


@pytest.fixture(autouse=True)
def _matched_by_the_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes seconds for a step; that both assign alike is tested beside the kernel."""
    if request.node.originalname != "test_the_kernel_assigns_in_a_step":
        monkeypatch.setattr(rtdetr_loss.assignment, "assign", by_the_host)


class Eager(Replay):
    """In the place of the graphs, whose loss may have gone through them."""

    def stale(self) -> bool:
        return False


def captured(model: Any, batch: Batch, boxes: int = 16, inside: bool = True) -> tuple[Any, str]:
    targets = pad_targets(batch, len(batch["img"]), boxes) if inside else None
    return rtdetr.capture_step(model, batch, targets, Capacity(boxes if inside else 0), Eager)  # type: ignore[arg-type]


def replayed(model: Any, step: Any, batch: Batch, boxes: int = 16) -> list[str]:
    """Let the next forward be a replay; the list gets why it was none, or an empty string."""
    ended: list[str] = []
    targets = pad_targets(batch, len(batch["img"]), boxes)
    rtdetr.replay_next_call(model, step, batch, targets, ended.append)
    return ended


def trained(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, items and gradients of a step with the random numbers of a seed."""
    torch.manual_seed(7)
    loss, items = model(batch)
    loss.sum().backward()
    return loss.detach(), items, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def precise() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(first: Any, batch: Batch, inside: bool, bound: float, seen: Batch | None = None) -> None:
    """A step from graphs that were captured of a batch, another perhaps, against an eager one."""
    second = copy.deepcopy(first)
    step, why_not = captured(second, seen or batch, inside=inside)
    assert bool(why_not) is not inside
    ended = replayed(second, step, batch)
    wanted = trained(first, batch)
    generator = torch.get_rng_state()
    found = trained(second, batch)
    assert ended[-1] == ""
    assert step.calls == [len(batch["img"])]
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(found[1]) == list(wanted[1])
    assert found[0].shape == wanted[0].shape
    for a, b in ((found[0], wanted[0]), (found[2], wanted[2]), *((found[1][n], wanted[1][n]) for n in wanted[1])):
        assert float((a - b).norm() / b.norm()) < bound
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [True, False], ids=["with its loss", "network alone"])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_those_of_an_eager_step(name: str, inside: bool) -> None:
    compare(a_model(), BATCHES[name], inside, 1e-5)


def test_the_kernel_assigns_in_a_step() -> None:
    compare(a_model(), BATCHES["an image without"], True, 1e-5)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("name", ["some", "more than are denoised"])
def test_in_float64_too(name: str) -> None:
    batch = {key: value.double() for key, value in BATCHES[name].items()}
    compare(a_model().double(), batch, True, 1e-9)


def test_graphs_of_one_batch_serve_the_others() -> None:
    for name in ("one", "more than are denoised", "an image without"):
        compare(a_model(), BATCHES[name], True, 1e-5, seen=BATCHES["some"])
    compare(a_model(), BATCHES["some"], True, 1e-5, seen=a_batch([], 6))  # captured without a box


@pytest.mark.parametrize("denoising", [1, 7, 100])
def test_any_number_of_denoising_queries(denoising: int) -> None:
    compare(a_model(denoising=denoising), BATCHES["some"], True, 1e-5)


def test_a_single_class() -> None:
    compare(a_model(classes=1), a_batch([0, 0, 1], classes=1), True, 1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_half_precision_is_that_of_an_eager_step(inside: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(a_model(), BATCHES["some"], inside, 2e-2)


@few_queries
def test_a_shipped_model_with_fused_attention() -> None:
    yolo = patch_model(RTDETR("rtdetr-resnet50.yaml"), backend="sdpa_flash")
    model: Any = yolo.model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.nc = 80
    model.criterion = model.init_criterion()
    compare(model, a_batch([0] * 3 + [1], images=2, classes=80), True, 1e-4)


def test_a_capture_leaves_no_trace() -> None:
    model, batch = a_model(), BATCHES["some"]
    model(batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    captured(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not {"predict", "loss"} & vars(model).keys()


class MeetsHost(TorchDispatchMode):
    """Notes the operators that a capture forbids: with tensors of both the host and the device, or with a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if len({leaf.device.type for leaf in leaves if leaf.dim()}) > 1:
            self.found.append(func.name())
        return out


def test_nothing_that_is_captured_meets_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by tensors without data, on another device than the host's: operators that read data raise."""
    monkeypatch.setattr(rtdetr_loss.assignment, "assign", lambda costs, counts: costs[:, :, 0].long())
    monkeypatch.setattr("ultralytics.utils.loss.autocast", lambda **keys: contextlib.nullcontext())  # unknown there
    with torch.device("meta"):
        model: Any = RTDETRDetectionModel(TINY, verbose=False).train()
        images, targets = torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, 8, 5)
        classes, boxes = torch.zeros(2, 200, dtype=torch.int64), torch.zeros(2, 200, 4)
        hidden = torch.zeros(200 + QUERIES, 200 + QUERIES, dtype=torch.bool)
    loss = MatchedLoss(RTDETRDetectionLoss(CLASSES, use_vfl=True), 200)
    rtdetr.Network(model, QUERIES)(images, classes, boxes, hidden)  # as an eager step, which makes anchors
    network = rtdetr.Network(model, QUERIES)
    found: list[list[str]] = []
    for _ in range(2):
        with MeetsHost() as seen:
            total, _ = loss(network(images, classes, boxes, hidden), targets, classes)
            gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        found.append(seen.found)
    assert total.device.type == "meta"
    assert any(gradient is not None for gradient in gradients)
    assert set(found[0]) == {"aten::_to_copy"}  # the constants: each goes to the device once
    assert found[1] == []


# Batches that run eager -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("of_image", "why_not"), [([], "no boxes"), ([0] * 13, "13 boxes in an image, the decoder has 12 queries")]
)
def test_batches_without_a_matching_in_fixed_shapes_run_eager(of_image: list[int], why_not: str) -> None:
    model, batch = a_model(), a_batch(of_image)
    other = copy.deepcopy(model)
    step, outside = captured(model, batch)
    assert outside == ""
    assert replayed(model, step, batch) == [why_not]
    found, wanted = trained(model, batch), trained(other, batch)
    assert step.calls == []
    assert torch.equal(found[2], wanted[2])


def test_the_network_alone_leaves_labels_without_boxes_to_the_model() -> None:
    model = a_model()
    step, _ = captured(model, BATCHES["some"], inside=False)
    batch = a_batch([])
    ended = replayed(model, step, batch)
    model(batch)
    assert ended == ["it has no denoising queries, or too many"]
    for call in (lambda: model.predict(batch["img"]), lambda: model.predict(batch["img"], batch=None, augment=False)):
        ended = replayed(model, step, batch)
        call()
        assert ended == ["the network was called for something else"]
    assert step.calls == []


def test_another_batch_is_its_own() -> None:
    model, batch = a_model(), BATCHES["some"]
    step, _ = captured(model, batch)
    ended = replayed(model, step, batch)
    model(BATCHES["an image without"])
    assert ended == ["the model was called for something else"]
    changed = dict(batch)
    ended = replayed(model, step, changed)
    changed["bboxes"] = batch["bboxes"] * 0.5
    model(changed)
    assert ended == ["boxes or masks were changed after preprocess_batch"]
    assert step.calls == []


# Refusals -------------------------------------------------------------------------------------------------------------
def shown(drawn: Any) -> Any:
    drawn.hidden[:, drawn.meta["dn_num_split"][0] : 20] = False
    return drawn


def told(drawn: Any) -> Any:
    drawn.hidden[20:, :20] = False
    return drawn


MISTAKES = {
    "queries see the padding": shown,
    "queries see the noisy labels": told,
    "no mask": lambda drawn: drawn._replace(hidden=torch.zeros_like(drawn.hidden)),
    "other classes": lambda drawn: drawn._replace(classes=(drawn.classes - 1).clamp(min=0)),
    "other boxes": lambda drawn: drawn._replace(boxes=drawn.boxes * 1.1),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_network_that_differs_is_noticed(mistake: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = rtdetr.Network.draw
    monkeypatch.setattr(rtdetr.Network, "draw", lambda self, labels: MISTAKES[mistake](own(self, labels)))
    with (
        torch.autocast("cpu", dtype=torch.float16, enabled=half),
        pytest.raises(RuntimeError, match="with a fixed number of denoising queries the outputs are off by"),
    ):
        captured(a_model(), BATCHES["some"])


def test_a_loss_that_differs_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = a_model(), BATCHES["some"]
    own = MatchedLoss.match
    monkeypatch.setattr(MatchedLoss, "match", lambda self, *given: own(self, *given).roll(1, dims=-1))
    step, why_not = captured(model, batch)
    assert step.loss is None
    assert why_not.startswith("in fixed shapes it is off by ")

    def gone(*args: Any) -> Any:
        raise NotImplementedError("a kernel")

    monkeypatch.setattr(MatchedLoss, "match", gone)
    step, why_not = captured(model, batch)
    assert (step.loss, why_not) == (None, "NotImplementedError: a kernel")

    def short(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MatchedLoss, "match", short)
    with pytest.raises(torch.OutOfMemoryError):
        captured(model, batch)


def test_a_capture_that_fails_with_its_loss_is_one_of_the_network_alone() -> None:
    class Refuses(Eager):
        def __init__(self, model: Any, images: Tensor, loss: Any, *inputs: Any) -> None:
            if loss is not None:
                raise RuntimeError("operation not permitted when stream is capturing")
            super().__init__(model, images, loss, *inputs)

    batch = BATCHES["some"]
    targets = pad_targets(batch, 3, 16)
    step, why_not = rtdetr.capture_step(a_model(), batch, targets, Capacity(16), Refuses)  # type: ignore[arg-type]
    assert step.loss is None
    assert why_not == "RuntimeError: operation not permitted when stream is capturing"


def test_a_decoder_that_denoises_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no denoising queries"):
        captured(a_model(denoising=0), BATCHES["some"])


class OwnLoss(RTDETRDetectionLoss):
    pass


class OwnMatcher(HungarianMatcher):
    pass


def test_a_users_loss_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = a_model().criterion
    assert not_supported_reason(criterion) == ""
    assert not_supported_reason(None) == "NoneType is not the loss of RT-DETR"
    assert not_supported_reason(OwnLoss(3, use_vfl=True)) == "OwnLoss is not the loss of RT-DETR"
    criterion.matcher = OwnMatcher()
    assert not_supported_reason(criterion) == "OwnMatcher is not the loss of RT-DETR"
    assert (
        not_supported_reason(RTDETRDetectionLoss(3)) == "NoneType is not the loss of RT-DETR"
    )  # without varifocal loss
    for change in ({"aux_loss": False}, {"use_uni_match": True}):
        other = a_model().criterion
        vars(other).update(change)
        assert not_supported_reason(other) == "its layers are not matched one by one"
    other = a_model().criterion
    other._get_loss_bbox = lambda *args: {}
    assert not_supported_reason(other) == "RTDETRDetectionLoss._get_loss_bbox is not Ultralytics' own"
    monkeypatch.setattr(HungarianMatcher, "forward", lambda self, *args: [])
    assert not_supported_reason(a_model().criterion) == "HungarianMatcher.forward is not Ultralytics' own"


def test_without_triton_the_loss_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtdetr_loss.assignment, "not_supported_reason", lambda: "no Triton")
    step, why_not = captured(a_model(), BATCHES["some"])
    assert (step.loss, why_not) == (None, "no Triton")


def test_numbers_of_the_loss_that_change_are_noticed() -> None:
    model = a_model()
    loss = MatchedLoss(model.criterion, 20)
    assert loss.holds(model.criterion)
    assert not loss.holds(copy.deepcopy(model.criterion))
    for change in (
        lambda criterion: criterion.loss_gain.update(bbox=6),
        lambda criterion: criterion.matcher.cost_gain.update(bbox=6),
        lambda criterion: setattr(criterion.vfl, "gamma", 1.0),
        lambda criterion: setattr(criterion.matcher, "alpha", 0.5),
    ):
        model = a_model()
        loss = MatchedLoss(model.criterion, 20)
        change(model.criterion)
        assert not loss.holds(model.criterion)
    model = a_model()
    model.criterion.loss_gain.update(bbox=50)
    model.criterion.matcher.cost_gain.update(bbox=0)
    compare(model, BATCHES["some"], True, 1e-5)


def test_what_the_loss_writes_or_does_is_no_change_of_the_network() -> None:
    model = a_model()
    network = Signature.of_model(rtdetr.Network(model, QUERIES))
    model(a_batch([]))
    model.criterion.fl.alpha = torch.tensor(0.25)  # as such a batch leaves it on another device
    assert not network.changed()
    model.criterion = OwnLoss(CLASSES, use_vfl=True)
    assert network.changed()
    assert not_supported_reasons(a_trainer(model, "cuda"), "auto") == []
    model.model[0].add_module("mine", OwnLoss(CLASSES))
    assert "OwnLoss is neither torch's nor Ultralytics'" in not_supported_reasons(a_trainer(model, "cuda"), "auto")[0]


def test_the_kind_of_a_model() -> None:
    model = a_model()
    assert kind_of(model) is KIND
    assert kind_of(nn.Identity()) is None
    model.__class__ = type("Mine", (RTDETRDetectionModel,), {"predict": lambda self, x: x})
    assert kind_of(model) is None


# In a run's policy ----------------------------------------------------------------------------------------------------
def test_more_boxes_and_another_loss_are_captured_anew(replays: list[Replay]) -> None:  # noqa: F811
    model = a_model()
    graphs, trainer = GraphPolicy("on"), a_trainer(model, imgsz=SIDE)
    graphs.prepare(trainer)

    def step(batch: Batch) -> dict[str, Any]:
        facts = graphs.before_forward(trainer, batch, graphs.before_transfer(trainer, batch))
        wanted = trained(copy.deepcopy(model), batch)[0]
        assert float(abs(trained(model, batch)[0] - wanted)) < 1e-4 * float(wanted)
        return facts

    few, many = a_batch([0, 1], images=2), a_batch([0] * 12, images=2)
    assert [step(few).get("boxes") for _ in range(3)] == [None, 8, None]
    assert step(many)["again"] == "a batch had up to 12 boxes an image"
    model.criterion.loss_gain["bbox"] = 7
    assert step(few)["again"] == "the model changed"
    assert step(a_batch([], images=2)) == {}
    assert [replay.calls for replay in replays] == [[2, 2], [2], [2]]
    counted = graphs.end_epoch(trainer)
    assert (counted["replayed"], counted["eager"]) == (4, {"before there were graphs": 1, "no boxes": 1})


# A run ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(tmp_path: Any) -> str:
    YAML.save(tmp_path / "rtdetr-tiny.yaml", {**TINY, "nc": 80})
    return str(tmp_path / "rtdetr-tiny.yaml")


@pytest.mark.parametrize("loss", ["stock", "own"])
def test_losses_of_a_run_are_those_of_eager_steps(
    loss: str,
    tiny: str,
    tiny_args: dict[str, Any],
    replays: list[Replay],  # noqa: F811
    log: list[str],
) -> None:
    losses: dict[str, list[float]] = {}
    for mode in ("off", "on"):
        model = patch_model(RTDETR(tiny), graphs=mode)
        found = losses[mode] = []

        def begin(trainer: Any) -> None:
            init_seeds(0)  # older Ultralytics draw numbers while they look through a data set for the first time
            if loss == "own":
                trainer.model.criterion = OwnLoss(80, use_vfl=True)

        model.add_callback("on_train_start", begin)
        model.add_callback("on_train_batch_end", lambda trainer, found=found: found.append(trainer.loss.item()))
        model.train(**{**tiny_args, "imgsz": 64, "epochs": 2, "mosaic": 0.0})
    (replay,) = replays
    assert replay.calls == [2] * 3
    assert isinstance(replay.loss, MatchedLoss) is (loss == "stock")
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)
    (facts,) = of(events(model), "graphs")
    assert facts["why_not"] == ""
    if loss == "own":
        assert facts["loss_outside"] == "OwnLoss is not the loss of RT-DETR"
        assert sum("the loss stays outside of them: OwnLoss is not" in line for line in log) == 1
    else:
        assert facts["boxes"] == replay.extra[3][1] > 0
