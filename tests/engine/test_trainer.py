"""Training through Ultralytics: attention is patched, and really runs, from the first batch to the final evaluation."""

from __future__ import annotations

import functools
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import ASSETS, YAML

from tests.counting import LAYERS, AttentionCalls, run_out_of_memory_once
from tests.patching.test_patch import load_without_plugin, patched_layers
from yolo_flash import (
    BackendNotSupportedError,
    FlashConfig,
    FlashConfigError,
    FlashKernelError,
    patch_model,
    unpatch_model,
)
from yolo_flash.backends import registry as backends_module
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.engine.model import patch_from_sources
from yolo_flash.engine.trainer import trainer_class
from yolo_flash.patching.blocks import FlashBlock
from yolo_flash.patching.fallback import AttentionCall

pytestmark = pytest.mark.usefixtures("tiny_model")  # writes tiny.yaml


class Phases(AttentionCalls):
    """Counts calls of the fused forward by what the trainer is doing."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_scaled_dot_product_flash_attention_for_cpu" in func.name():
            self.calls[self.phase + (" backward" if "backward" in func.name() else "")] += 1
        return func(*args, **(kwargs or {}))

    def follow(self, model: YOLO) -> None:
        """Switch the phase with the events of a run."""
        for event, phase in {
            "on_train_batch_start": "train batch",
            "on_train_epoch_end": "ema validation",
            "on_fit_epoch_end": "setup",
        }.items():
            model.add_callback(event, lambda trainer, phase=phase: setattr(self, "phase", phase))
        model.add_callback("on_val_start", lambda v: setattr(self, "phase", self.phase if v.training else "final"))
        model.add_callback("on_train_end", lambda trainer: setattr(self, "phase", "after"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stock checkpoint of yolo12n."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "start.pt"
    model = YOLO("yolo12n.yaml")
    model.model.args = {**model.model.args, "task": "detect"}
    model.save(str(path))
    return str(path)


@pytest.mark.parametrize("start", ["yaml", "pt"])
def test_every_phase_of_a_run_is_fused(start: str, weights: str, tiny_args: dict[str, Any]) -> None:
    layers = LAYERS if start == "yaml" else 8
    model = patch_model(YOLO("tiny.yaml" if start == "yaml" else weights), backend="sdpa_flash")
    with Phases() as phases:
        phases.follow(model)
        model.train(**tiny_args)
        assert phases.calls["train batch"] == phases.calls["train batch backward"] == layers * 2  # layers x batches
        assert phases.calls["ema validation"] == layers
        assert phases.calls["final"] >= layers
        assert patched_layers(model.model) == layers
        assert type(model) is not YOLO

        before = sum(phases.calls.values())
        model.predict(ASSETS / "bus.jpg", imgsz=32, verbose=False)
        assert sum(phases.calls.values()) >= before + layers

        before = sum(phases.calls.values())
        val_args = {**tiny_args, "batch": 4}
        model.val(**{k: v for k, v in val_args.items() if k not in ("epochs", "workers")})
        assert sum(phases.calls.values()) >= before + layers

        phases.calls.clear()
        model.train(**tiny_args)  # a second run, now from the checkpoint of the first
        assert phases.calls["train batch"] == layers * 2

    unpatch_model(model)
    assert type(model) is YOLO
    assert patched_layers(model.model) == 0


class Decided(Phases):
    """What the patched blocks decided, and the fused forward operators that ran, by phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.decided: Counter[tuple[str, str]] = Counter()
        choose = FlashBlock._attention_call

        def spy(block: FlashBlock, x: torch.Tensor) -> AttentionCall | None:
            call = choose(block, x)
            self.decided[self.phase, "stock" if call is None else call.backend] += 1
            return call

        monkeypatch.setattr(FlashBlock, "_attention_call", spy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = "_scaled_dot_product" in func.name() or "area_attention" in func.name()
        if fused and "backward" not in func.name():
            self.calls[self.phase] += 1
        return func(*args, **(kwargs or {}))


def check_every_phase(
    config: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, backend: str = "auto"
) -> Counter[tuple[str, str]]:
    """Train, predict and validate; every layer decides in every phase, and runs what it decided."""
    model = patch_model(YOLO(config), backend=backend)
    with Decided(monkeypatch) as phases:
        phases.follow(model)
        model.train(**args)
        phases.phase = "predict"
        model.predict(ASSETS / "bus.jpg", imgsz=args["imgsz"], device=args["device"], verbose=False)
        phases.phase = "val"
        model.val(**{key: args[key] for key in ("data", "imgsz", "device", "plots", "project")}, batch=4)
    layers = patched_layers(model.model)
    for phase in ("train batch", "ema validation", "final", "predict", "val"):
        decided = Counter({name: n for (when, name), n in phases.decided.items() if when == phase})
        assert sum(decided.values()) >= layers, phase
        fused = sum(n for name, n in decided.items() if backends_module.BACKENDS[name].fused)
        assert phases.calls[phase] == fused, phase
    trainer: Any = model.trainer
    planned = {row.decision.spec for row in trainer.flash_plan}
    met = {spec for spec, _, _ in trainer.flash_run.dispatcher._decisions}
    assert {spec for spec in met if spec.training}
    assert {spec for spec in met if spec.training} <= planned  # dtype, layout and sizes were foreseen
    assert {row.decision.spec for row in trainer.flash_plan if row.mode == "val"} & met
    return phases.decided


@pytest.mark.parametrize(("config", "imgsz"), [("yolo12n.yaml", 128), ("yolo26n.yaml", 64)])
def test_auto_decides_in_every_phase_and_runs_what_it_decided(
    config: str, imgsz: int, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_every_phase(config, {**tiny_args, "imgsz": imgsz}, monkeypatch)


def test_the_run_has_a_plan_before_its_first_step(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash")
    seen: list[int] = []
    model.add_callback("on_train_start", lambda trainer: seen.append(len(trainer.flash_plan)))
    model.train(**{**tiny_args, "imgsz": 64})
    assert seen == [16]
    assert isinstance(model.trainer, BaseTrainer)
    assert "Trainer" in type(model.trainer).__name__
    rows = model.trainer.flash_plan
    train, val = rows[0].decision.spec, rows[8].decision.spec
    assert (train.batch, train.seq_len_q, train.training) == (2 * 4, 4, True)  # 64 / 16 squared, over 4 areas
    assert val.batch == 4 * 4  # twice the batch
    assert val.seq_len_q in (6, 9)  # rectangles are padded by half a stride: 64 x 96 or 96 x 96
    assert any("8 attention layers on" in line for line in log)
    assert any(re.search(r"train +4 in model\.6 .* sdpa_flash +asked for", line) for line in log)


def test_log_false_writes_no_plan_and_changes_no_result(tiny_args: dict[str, Any], log: list[str]) -> None:
    results = []
    for quiet in (True, False):
        log.clear()
        torch.manual_seed(0)
        model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash", log=not quiet)
        model.train(**tiny_args)
        assert any("attention layers on" in line for line in log) is not quiet
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml"])
def test_the_plan_is_that_of_the_forward(config: str, tiny_args: dict[str, Any]) -> None:
    """Every spec met in training was planned: the ghost forward and the real one agree."""
    model = patch_model(YOLO(config), backend="sdpa_flash")
    model.train(**{**tiny_args, "imgsz": 64, "val": False})
    trainer = model.trainer
    planned = {row.decision.spec for row in trainer.flash_plan if row.mode == "train"}
    met = {spec for spec, _, _ in trainer.flash_run.dispatcher._decisions if spec.training}
    assert met
    assert met == planned


def test_checkpoints_are_stock(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    model.train(**tiny_args)
    for name in ("best.pt", "last.pt"):
        path = Path(model.trainer.save_dir) / "weights" / name
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(member) for member in archive.namelist() if member.endswith(".pkl")]
        assert contents
        assert not any(b"yolo_flash" in content or b"_flash_" in content for content in contents)
    load_without_plugin(path)


def test_a_user_given_trainer_keeps_its_methods(tiny_args: dict[str, Any]) -> None:
    class MyTrainer(DetectionTrainer):
        steps = 0

        def optimizer_step(self) -> None:
            type(self).steps += 1
            super().optimizer_step()

    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(trainer=MyTrainer, **tiny_args, nbs=2)  # an optimizer step a batch
    assert isinstance(model.trainer, MyTrainer)
    assert model.trainer.steps > 0
    assert calls.backward["sdpa_flash"] == 2 * LAYERS


def test_every_trainer_of_ultralytics_takes_the_mixin() -> None:
    import ultralytics.models.rtdetr.train
    import ultralytics.models.yolo.world.train_world
    import ultralytics.models.yolo.yoloe.train_seg  # noqa: F401

    def subclasses(cls: type) -> set[type]:
        return {cls}.union(*map(subclasses, cls.__subclasses__()))

    own = {cls for cls in subclasses(BaseTrainer) if cls.__module__.startswith("ultralytics")}
    assert len(own) >= 15
    for cls in own:
        ours = trainer_class(cls, FlashConfig(), {})
        assert issubclass(ours, cls)
        assert "Trainer" in ours.__name__
        assert "setup_model" in vars(ours.__mro__[1])


@pytest.mark.parametrize("through", ["python", "resume path"])
def test_resume_keeps_the_patch(through: str, tiny_args: dict[str, Any]) -> None:
    first = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")

    class InterruptedRunError(Exception):
        pass

    def interrupt(trainer: BaseTrainer) -> None:
        if trainer.epoch == 1:
            raise InterruptedRunError

    first.add_callback("on_train_epoch_start", interrupt)
    with pytest.raises(InterruptedRunError):
        first.train(**{**tiny_args, "epochs": 3})
    assert patched_layers(first.model) == LAYERS
    last = first.trainer.last

    second = patch_model(YOLO(str(last)), backend="sdpa_flash")
    with Phases() as phases:
        phases.follow(second)
        second.train(resume=True if through == "python" else str(last))
    assert second.trainer.start_epoch == 1
    assert phases.calls["train batch"] == LAYERS * 2 * 2  # layers x batches x remaining epochs
    assert phases.calls["ema validation"] == LAYERS * 2


def test_out_of_memory_halving_keeps_the_patch(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    run_out_of_memory_once(model)
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "batch": 4, "imgsz": 64})
    assert model.trainer.batch_size == 2
    assert calls.backward["sdpa_flash"] == LAYERS * 2
    assert model.trainer.flash_plan[0].decision.spec.batch == 2 * 4  # planned again for the halved batch


def test_nan_recovery_keeps_the_patch(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    poisoned: list[int] = []
    patched_emas: list[int] = []

    def poison_second_epoch_once(trainer: Any) -> None:
        if trainer.epoch == 1 and not poisoned:
            poisoned.append(1)
            trainer.loss = torch.tensor(float("nan"))

    model.add_callback("on_train_epoch_end", poison_second_epoch_once)
    model.add_callback("on_fit_epoch_end", lambda trainer: patched_emas.append(patched_layers(trainer.ema.ema)))
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "epochs": 2})
    assert any("recovering from last.pt" in line for line in log)
    assert set(patched_emas) == {LAYERS}
    assert calls.backward["sdpa_flash"] == LAYERS * 2 * 3  # the poisoned epoch was trained again


def test_an_impossible_explicit_choice_raises_before_the_first_step(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_cudnn")
    steps: list[int] = []
    model.add_callback("on_train_batch_start", lambda trainer: steps.append(1))
    with pytest.raises(BackendNotSupportedError, match="runs on NVIDIA cards"):
        model.train(**tiny_args)
    assert not steps
    assert patched_layers(model.model) == LAYERS


def test_no_targets_trains_with_one_warning(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("yolov8n.yaml"))
    model.train(**tiny_args)
    assert len([line for line in log if "has no attention layer" in line]) == 1
    assert Path(model.trainer.best).is_file()


def test_a_flash_section_of_a_cfg_file(tiny_args: dict[str, Any], tmp_path: Path) -> None:
    YAML.save(tmp_path / "mine.yaml", {**tiny_args, "flash": {"backend": "sdpa_flash", "log": False}})
    model = patch_model(YOLO("tiny.yaml"), log=True)
    with AttentionCalls() as calls:
        model.train(cfg=str(tmp_path / "mine.yaml"))
    assert calls.backward["sdpa_flash"] == 2 * LAYERS
    assert model.trainer.flash == FlashConfig(backend="sdpa_flash", log=True)
    assert "flash" not in YAML.load(Path(model.trainer.save_dir) / "args.yaml")


def test_a_wrong_section_spoils_its_own_run_only(tiny_args: dict[str, Any], tmp_path: Path) -> None:
    YAML.save(tmp_path / "bad.yaml", {**tiny_args, "flash": {"layers": {"model.99": "stock"}}})
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with pytest.raises(FlashConfigError, match=r"model\.99"):
        model.train(cfg=str(tmp_path / "bad.yaml"))
    with AttentionCalls() as calls:
        model.train(**tiny_args)
    assert calls.backward["sdpa_flash"] == 2 * LAYERS


def test_an_object_of_the_command_line_takes_another_section(tiny_args: dict[str, Any], tmp_path: Path) -> None:
    YAML.save(tmp_path / "mine.yaml", {**tiny_args, "flash": {"backend": "sdpa_flash"}})
    model = patch_from_sources(YOLO("tiny.yaml"), {"cli": {}, "section": None})
    with AttentionCalls() as calls:
        model.train(cfg=str(tmp_path / "mine.yaml"))
    assert calls.backward["sdpa_flash"] == 2 * LAYERS


def test_the_trainer_class_of_a_finished_run_can_be_given_again(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_math")
    model.train(**tiny_args)
    again = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        again.train(trainer=type(model.trainer), **tiny_args)
    assert calls.backward["sdpa_flash"] == 2 * LAYERS


def test_a_trainer_that_is_no_class_trains_stock_and_says_so(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(trainer=functools.partial(DetectionTrainer), **tiny_args)
    assert not calls.backward
    assert any("is not a class, so that it trains stock attention" in line for line in log)


class _FailingBackward(torch.autograd.Function):
    """Raises in the backward what cuDNN raises when it has no kernel for a problem."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cuDNN error: unable to find an engine to execute this computation")


def cudnn_with_a_failing_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = backends_module.BACKENDS["sdpa_flash"]

    def run(packed: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
        return flash.run(_FailingBackward.apply(packed) if packed.requires_grad else packed, spec)

    broken = backends_module.Backend("sdpa_cudnn", lambda spec, machine: iter(()), run, lambda spec, machine: True)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_cudnn", broken)
    rules = [("sdpa_cudnn", "for this test"), ("sdpa_flash", "after it")]
    monkeypatch.setattr("yolo_flash.dispatch.rules._cpu_rules", lambda spec: iter(rules))


def test_a_kernel_error_in_the_backward_does_not_halve_the_batch(
    tiny_args: dict[str, Any], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn_with_a_failing_backward(monkeypatch)
    model = patch_model(YOLO("tiny.yaml"))
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "batch": 4, "epochs": 2})
    assert model.trainer.batch_size == 4
    # In the first step below the backward that raises, and unfused attention answers; in the second in its place.
    assert calls.backward["sdpa_flash"] == LAYERS + LAYERS
    assert len([line for line in log if "sdpa_cudnn failed" in line and "unable to find an engine" in line]) == 1


def test_an_explicit_backend_that_raises_in_the_backward_ends_the_run(
    tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn_with_a_failing_backward(monkeypatch)
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_cudnn")
    with pytest.raises(
        FlashKernelError, match=r"sdpa_cudnn raised in the backward .*flash\.backend=auto, or flash\.layers=.*avoids it"
    ):
        model.train(**{**tiny_args, "batch": 4})


def test_disabled_by_the_section_or_the_environment(
    tiny_args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    YAML.save(tmp_path / "off.yaml", {**tiny_args, "flash": {"enabled": False, "backend": "sdpa_flash"}})
    model = patch_model(YOLO("tiny.yaml"))
    with AttentionCalls() as calls:
        model.train(cfg=str(tmp_path / "off.yaml"))
    assert not calls.forward
    assert patched_layers(model.model) == LAYERS  # the section was that run's
    monkeypatch.setenv("YOLO_FLASH", "0")
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(cfg=str(tmp_path / "off.yaml"))
    assert not calls.forward


def test_several_data_sets_train_in_this_process_with_the_plugin(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        results = model.train(**{**tiny_args, "data": [tiny_args["data"]] * 2})
    assert len(results) == 2
    assert calls.backward["sdpa_flash"] == 2 * 2 * LAYERS


def test_distillation_patches_student_and_teacher(weights: str, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash", layers={"model.6.*": "sdpa_math"})
    found: list[tuple[int, Counter[str]]] = []

    def look(trainer: Any) -> None:
        blocks = [block for block in trainer.model.modules() if isinstance(block, FlashBlock)]
        found.append((len(blocks), Counter(block._flash_choice for block in blocks)))

    model.add_callback("on_train_start", look)
    model.train(**tiny_args, distill_model=weights)
    assert found == [(16, Counter({"sdpa_flash": 12, "sdpa_math": 4}))]  # the teacher's names do not match model.6.*


@pytest.mark.parametrize(("config", "layers"), [("yolo26n.yaml", 2), ("yolo11n.yaml", 1), ("yolov10n.yaml", 1)])
def test_other_models_train_fused(config: str, layers: int, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO(config), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(**tiny_args)
    assert calls.backward["sdpa_flash"] == layers * 2


def test_another_task_trains_fused(tiny_args: dict[str, Any], tmp_path: Path) -> None:
    """Classification has its own trainer, data set and validator, and no rectangular batches."""
    for split in ("train", "val"):
        for label in ("bus", "people"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(2):
                shutil.copy(ASSETS / ("bus.jpg" if label == "bus" else "zidane.jpg"), folder / f"{number}.jpg")
    model = patch_model(YOLO("yolo12n-cls.yaml"), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "data": str(tmp_path / "pictures"), "imgsz": 64})
    assert calls.backward["sdpa_flash"] == 8 * 2
    assert {row.mode for row in model.trainer.flash_plan} == {"train", "val"}


def test_tune_says_that_it_runs_stock(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultralytics.engine.tuner.Tuner.__init__", lambda *args, **kwargs: None)
    monkeypatch.setattr("ultralytics.engine.tuner.Tuner.__call__", lambda *args, **kwargs: None)
    patch_model(YOLO("yolo12n.yaml")).tune(iterations=1)
    assert any("tune() starts" in line and "stock attention" in line for line in log)
