"""What goes wrong around a run ends as it would in stock, or goes on; nothing of ours is left behind.

Elsewhere: halving after out-of-memory, kernels that raise in either direction, NaN at the end of an epoch and a file in
the way of flash.jsonl in test_trainer, test_telemetry and test_guard; two threads calling two models in test_patch.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import ultralytics
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules.block import AAttn
from ultralytics.utils import ASSETS, YAML, downloads
from ultralytics.utils.torch_utils import unset_deterministic

import yolo_flash
from tests.counting import LAYERS, AttentionCalls, in_threads
from tests.engine.test_options import train
from tests.engine.test_telemetry import FORWARD, events, of
from tests.patching.test_patch import patched_layers
from yolo_flash import patch_model
from yolo_flash.assets import offline
from yolo_flash.checkpoints import reading
from yolo_flash.cli import main
from yolo_flash.engine import telemetry as telemetry_module
from yolo_flash.engine.run_plot import draw_run
from yolo_flash.patching.patch import targets
from yolo_flash.utils import profiler
from yolo_flash.utils.files import write_file


# NaN ------------------------------------------------------------------------------------------------------------------
def test_a_batch_with_nan_is_seen_and_recovered_from_as_in_stock(
    tiny_model: str, tiny_args: dict[str, Any], log: list[str]
) -> None:
    """A fused kernel hands NaN on; the trainer then takes the last checkpoint, patched again, and repeats the epoch."""
    told = []
    for patched in (False, True):
        log.clear()
        model: Any = YOLO(tiny_model)
        if patched:
            patch_model(model, backend="sdpa_flash")
        begun: list[int] = []
        hooks: list[Any] = []

        def spoil(trainer: Any, begun: list[int] = begun, hooks: list[Any] = hooks) -> None:
            begun.append(trainer.epoch)
            if begun == [0, 0, 1, 1]:  # the last batch of an epoch, whose loss the trainer looks at
                stem = trainer.model.model[0]
                hooks.append(stem.register_forward_hook(lambda module, args, out: out * float("nan")))

        def mend(trainer: Any, hooks: list[Any] = hooks) -> None:
            for hook in hooks:
                hook.remove()

        model.add_callback("on_train_batch_start", spoil)
        model.add_callback("on_train_batch_end", mend)
        with AttentionCalls() as calls:
            model.train(**{**tiny_args, "epochs": 2})
        told.append([line for line in log if "recovering from last.pt" in line])
        assert all(value.isfinite().all() for value in model.state_dict().values())
    assert len(told[0]) == 1
    assert told[0] == told[1]
    assert calls.backward == {"sdpa_flash": LAYERS * 2 * 3}
    assert not model.trainer.flash_run.dispatcher.failed


# Killed ---------------------------------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
from ultralytics import YOLO
from yolo_flash import patch_model

def kill(trainer):
    if trainer.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)

model = patch_model(YOLO(sys.argv[1]), backend="sdpa_flash")
model.add_callback("on_train_batch_end", kill)
model.train(**eval(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_run_that_was_killed_within_an_epoch_is_resumed(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    command = [sys.executable, "-c", KILLED, tiny_model, repr({**tiny_args, "epochs": 3})]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (last,) = Path(tiny_args["project"]).rglob("last.pt")
    run = last.parents[1]
    with (run / "flash.jsonl").open("a") as file:
        file.write('{"event": "epoch", "ep')  # as it is left when the disk goes with the process
    model = patch_model(YOLO(str(last)), backend="sdpa_flash")
    with AttentionCalls() as calls:
        model.train(resume=True)
    assert calls.backward == {"sdpa_flash": LAYERS * 2 * 2}
    assert draw_run(run / "flash.jsonl")
    assert [row["resumed"] for row in of(events(model), "run")] == [False, True]
    assert [row["epoch"] for row in of(events(model), "epoch")] == [1, 2, 3]
    assert not list(run.rglob(".*"))  # no draft of a file


# Disks ----------------------------------------------------------------------------------------------------------------
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")


@needs_full
@pytest.mark.parametrize("event", ["on_train_batch_start", "on_train_epoch_end"])
def test_a_disk_that_fills_up_costs_one_warning_and_the_rest_of_telemetry(
    event: str, tiny_model: str, tiny_args: dict[str, Any], log: list[str]
) -> None:
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")

    def fill(trainer: Any) -> None:
        file = Path(trainer.save_dir) / "flash.jsonl"
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")

    model.add_callback(event, fill)
    with AttentionCalls() as calls:
        model.train(**{**tiny_args, "epochs": 2})
    assert calls.backward == {"sdpa_flash": LAYERS * 2 * 2}
    assert Path(model.trainer.best).is_file()
    (line,) = [line for line in log if "no more plan, kernels, memory and speed" in line]
    assert "No space left on device" in line
    assert not torch.autograd._profiler_enabled()


def test_telemetry_that_fails_within_a_profiled_step_leaves_no_profiler(
    tiny_model: str, tiny_args: dict[str, Any], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        assert torch.autograd._profiler_enabled()
        raise OSError("No space left on device")

    monkeypatch.setattr(telemetry_module.Telemetry, "graphs", fail)
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash", graphs="auto")
    model.add_callback(  # a fact about graphs in the middle of a step
        "on_train_batch_start", lambda trainer: trainer.flash_run.tell_graphs(trainer, {"why_not": "for this test"})
    )
    after: list[bool] = []
    model.add_callback("on_train_batch_start", lambda trainer: after.append(torch.autograd._profiler_enabled()))
    monkeypatch.setattr("yolo_flash.graphs.policy.GraphPolicy.prepare", lambda self, trainer: "")
    model.train(**tiny_args)
    assert after == [False, False]
    assert not profiler.PROFILER.locked()
    assert len([line for line in log if "no more plan, kernels, memory and speed" in line]) == 1


def test_the_note_of_a_stand_in_that_cannot_be_written_costs_one_warning(tmp_path: Path, log: list[str]) -> None:
    offline.note_standin(offline.STANDIN_FOLDER.resolve() / "data.yaml", tmp_path / "gone")
    assert len([line for line in log if "no note of the stand-in" in line]) == 1


@needs_full
def test_a_file_on_a_full_disk_is_as_it_was_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with Path("/dev/full").open("wb", buffering=0) as file:
            path.touch()
            return int(file.write(content) or 0)

    (tmp_path / "kept.json").write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "kept.json", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert (tmp_path / "kept.json").read_bytes() == b"before"


# Ctrl-C ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that no other process writes to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def everything_global() -> dict[str, Any]:
    """What the plugin, Ultralytics' settings for it and torch's switches could leave changed."""
    classes = (YOLO, ultralytics.engine.trainer.BaseTrainer, tasks.DetectionModel, AAttn, nn.Module)
    return {
        "classes": [{name: id(value) for name, value in vars(cls).items()} for cls in classes],
        "names": {name: id(value) for name, value in vars(ultralytics).items() if name in ("YOLO", "RTDETR")},
        "download": downloads.safe_download,
        "argv": sys.argv[:],
        "environment": dict(os.environ),
        "handlers": signal.getsignal(signal.SIGINT),
        "profiler": torch.autograd._profiler_enabled(),
        "our profiler": profiler.PROFILER.locked(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "kernels": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "temporary files": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
        "threads": {thread.name for thread in threading.enumerate()},
    }


def press(trainer: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "event",
    [
        "on_pretrain_routine_start",
        "on_pretrain_routine_end",
        "on_train_batch_start",
        "inside",
        "on_train_batch_end",
        "on_val_start",
        "on_train_end",
    ],
)
def test_ctrl_c_leaves_what_it_leaves_in_stock(
    event: str, tiny_model: str, tiny_args: dict[str, Any], temporary: Path
) -> None:
    def press_inside(trainer: Any) -> None:  # the forward of a step that is profiled
        trainer.model.model[4].register_forward_hook(lambda *given: press(trainer))

    left = []
    try:
        for model in (YOLO(tiny_model), patch_model(YOLO(tiny_model), backend="sdpa_flash")):
            if event == "inside":
                model.add_callback("on_train_batch_start", press_inside)
            else:
                model.add_callback(event, press)
            with pytest.raises(KeyboardInterrupt):
                model.train(**tiny_args)
            left.append(everything_global())
    finally:
        unset_deterministic()
    assert left[1] == left[0]
    assert not left[1]["profiler"]
    assert patched_layers(model.model) == LAYERS
    with AttentionCalls() as calls:
        model.predict(ASSETS / "bus.jpg", imgsz=32, verbose=False)
    assert calls.forward["sdpa_flash"] >= LAYERS


def test_ctrl_c_on_the_command_line_leaves_nothing_global_changed(
    tiny_model: str, tiny_args: dict[str, Any], temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    YAML.save(tmp_path / "mine.yaml", {**tiny_args, "flash": {"backend": "sdpa_flash"}})
    command = ["train", f"model={tiny_model}", f"cfg={tmp_path / 'mine.yaml'}"]
    seen: list[str] = []

    def interrupt(trainer: Any, *args: Any) -> None:
        seen.extend(path.name for path in temporary.iterdir())
        press(trainer)

    monkeypatch.setattr("ultralytics.models.yolo.detect.DetectionTrainer.preprocess_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        YOLO(tiny_model).train(**tiny_args)
    seen.clear()
    before = everything_global()
    with pytest.raises(KeyboardInterrupt):
        main.main(command)
    assert seen  # the copy of the cfg file
    assert everything_global() == before


# Two at once ----------------------------------------------------------------------------------------------------------
def test_two_trainings_at_once_keep_to_their_own_settings(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    models = {name: patch_model(YOLO(tiny_model), backend=name) for name in ("sdpa_flash", "sdpa_math")}

    def run(name: str) -> None:
        with torch.enable_grad():
            models[name].train(**{**tiny_args, "name": name, "epochs": 3})

    counts = in_threads({name: functools.partial(run, name) for name in models}, repeats=1)
    assert counts["sdpa_flash"].backward == {"sdpa_flash": LAYERS * 2 * 3}
    assert not counts["sdpa_math"].forward
    for name, model in models.items():
        assert {row["backends"].get(name) for row in of(events(model), "epoch")} == {LAYERS}
        for row in of(events(model), "kernels"):  # torch has one profiler for both: nobody counts the other's calls
            assert (FORWARD in row["counts"]) is (name == "sdpa_flash")
    assert not profiler.PROFILER.locked()


def test_a_profiler_that_another_training_holds_is_waited_for_until_a_later_step(
    tiny_model: str, tiny_args: dict[str, Any]
) -> None:
    """Torch has one for the process: two at a time mixed their events, and stopped each other."""
    profiled: list[bool] = []
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")

    def look(trainer: Any) -> None:
        profiled.append(torch.autograd._profiler_enabled())
        if len(profiled) == 1:
            profiler.PROFILER.release()

    model.add_callback("on_train_batch_start", look)
    profiler.PROFILER.acquire()
    model.train(**tiny_args)
    assert profiled == [False, True]
    (kernels,) = of(events(model), "kernels")
    assert kernels["counts"][FORWARD] == LAYERS


def test_a_profiler_of_the_user_sees_the_whole_run(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO(tiny_model), backend="sdpa_flash")
    with torch.profiler.profile() as profile:
        model.train(**tiny_args)
    seen = sum(event.name == f"{FORWARD}_backward" for event in profile.events() or [])
    assert seen == LAYERS * 2
    assert not of(events(model), "kernels")
    assert len(of(events(model), "epoch")) == 1


def test_two_threads_predict_with_two_settings(tiny_model: str) -> None:
    models = {name: patch_model(YOLO(tiny_model), backend=name) for name in ("sdpa_flash", "sdpa_math")}
    works: dict[str, Callable[[], object]] = {
        name: functools.partial(model.predict, ASSETS / "bus.jpg", imgsz=32, device="cpu", verbose=False)
        for name, model in models.items()
    }
    counts = in_threads(works, repeats=3)
    assert counts["sdpa_flash"].forward["sdpa_flash"] >= LAYERS * 3
    assert set(counts["sdpa_flash"].forward) == {"sdpa_flash"}
    assert not counts["sdpa_math"].forward


# Checkpoints of others ------------------------------------------------------------------------------------------------
class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def what_comes_of(weights: Path, patched: bool) -> str:
    try:
        model = YOLO(str(weights))
        if patched:
            patch_model(model, backend="sdpa_flash")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return type(model.model).__name__


def checkpoint(tiny_model: str, path: Path, **extra: Any) -> Path:
    model = YOLO(tiny_model)
    model.model.args = {**model.model.args, "task": "detect"}
    torch.save({"model": model.model, "train_args": {}, **extra}, path)
    return path


def test_with_safe_load_nothing_of_ours_can_be_named(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "SAFE_LOAD", True)
    mark = tmp_path / "written"
    hostile = checkpoint(tiny_model, tmp_path / "hostile.pt", extra=Calls(write_file, mark, b"by a checkpoint"))
    stock = what_comes_of(hostile, patched=False)
    assert "references types outside the supported Ultralytics checkpoint format" in stock
    assert what_comes_of(hostile, patched=True) == stock
    with pytest.raises(TypeError, match="references types outside"):
        main.main(["predict", f"model={hostile}", f"source={ASSETS / 'bus.jpg'}", "device=cpu", "flash.backend=auto"])
    assert not mark.exists()
    assert not [name for name in map(str, torch.serialization.get_safe_globals()) if "yolo_flash" in name]


@pytest.mark.parametrize("damage", ["empty", "truncated", "not a pickle", "no model"])
def test_a_damaged_or_foreign_file_is_refused_with_the_words_of_ultralytics(
    damage: str, tiny_model: str, tmp_path: Path
) -> None:
    file = checkpoint(tiny_model, tmp_path / "file.pt")
    content = {
        "empty": b"",
        "truncated": file.read_bytes()[:2000],
        "not a pickle": b"hello",
        "no model": pickle.dumps({"weights": 1}),
    }
    file.write_bytes(content[damage])
    stock = what_comes_of(file, patched=False)
    assert "Error" in stock
    assert what_comes_of(file, patched=True) == stock


def test_attributes_of_ours_in_a_checkpoint_are_written_over(tiny_model: str, tmp_path: Path) -> None:
    """A checkpoint may give a block any attribute; what it says of ours decides nothing."""
    model = YOLO(tiny_model)
    model.model.args = {**model.model.args, "task": "detect"}
    blocks: list[Any] = list(targets(model.model).values())
    for block in blocks:
        block._flash_choice = "stock"
        block._flash_layer = "elsewhere"
        block._flash_dispatcher = SimpleNamespace(plan=None)
    torch.save({"model": model.model, "train_args": {}}, tmp_path / "foreign.pt")
    foreign = patch_model(YOLO(str(tmp_path / "foreign.pt")), backend="sdpa_flash")
    with AttentionCalls() as calls, torch.no_grad():
        foreign.model.eval()(torch.rand(1, 3, 32, 32))
    assert calls.forward == {"sdpa_flash": LAYERS}
    foreign.save(str(tmp_path / "clean.pt"))
    assert b"_flash_" not in (tmp_path / "clean.pt").read_bytes()


def test_checkpoints_are_read_by_ultralytics_loader_alone(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of ours unpickles, our own caches are JSON, but what `convert` reads, which has rules of its own."""
    loaded: list[str] = []
    load = tasks.torch_safe_load

    def spy(weight: Any, **more: Any) -> Any:
        loaded.append(str(weight))
        return load(weight, **more)

    monkeypatch.setattr(tasks, "torch_safe_load", spy)
    model, _ = train(tiny_model, tiny_args)
    assert loaded.count(str(model.trainer.best)) == 2  # the final evaluation, and the object after the run
    sources = {path: path.read_text() for path in Path(yolo_flash.__file__).parent.rglob("*.py")}
    assert sources.pop(Path(reading.__file__))
    assert len(sources) > 30
    for call in ("torch.load(", "pickle.load", "Unpickler", "eval(compile", "exec("):
        assert not [path.name for path, source in sources.items() if call in source], call
