"""Processes and folders that few have: streams that are closed, files in the way, writers that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

import yolo_flash
from tests.counting import LAYERS, AttentionCalls, settle
from tests.patching.test_patch import patched_layers
from tests.planning.test_autotune import AREA, CPU, PSA
from tests.twins import twins
from yolo_flash import patch_model
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial
from yolo_flash.machine import detect
from yolo_flash.planning import autotune

SOURCE = Path(yolo_flash.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}


# Damaged caches -------------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of trials of its own."""
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")
    return trial_cache.folder()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def _make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "kept.txt").write_text("of the user")


def _make_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def _make_dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("gone"))


def _forbid(file: Path) -> None:
    file.chmod(0)


def _garble(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x80" * 20)


DAMAGES = (_truncate, _make_folder, _make_loop, _make_dangling, _forbid, _garble)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs that were measured; in no time."""
    specs: list[Any] = []

    def judge(spec: Any, *more: Any) -> dict[str, Trial]:
        specs.append(spec)
        return {"stock": Trial(ms=2.0 + len(specs)), "sdpa_flash": Trial(ms=1.0)}

    monkeypatch.setattr(autotune, "judge", judge)
    return specs


@pytest.mark.measures
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_cannot_be_read_is_measured_and_the_rest_is_not(
    damage: Callable[[Path], None],
    cache: Path,
    judged: list[Any],
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autotune.measure([AREA], CPU)
    (file,) = cache.iterdir()
    kept = autotune.measure([PSA], CPU)
    damage(file)
    read = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        if damage is _forbid and path == file and path.stat().st_mode & 0o777 == 0:  # also for root
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    judged.clear()
    log.clear()
    found = autotune.measure([AREA, PSA], CPU)
    assert judged == [AREA]
    assert found[PSA] == kept[PSA]
    assert found[AREA]["sdpa_flash"].ms == 1.0
    told = [line for line in log if "measuring again what cannot be read" in line]
    assert len(told) == (damage is not _make_dangling)
    if damage is _make_folder:  # is the user's
        assert (file / "kept.txt").is_file()
        assert [line for line in log if "measurements are not kept for the next run" in line]
    else:
        assert json.loads(file.read_text())["trials"]
    assert not list(cache.glob(".*"))


@pytest.mark.measures
def test_a_run_with_folders_in_the_place_of_its_trials(
    cache: Path, judged: list[Any], tiny_model: str, tiny_args: dict[str, Any], log: list[str]
) -> None:
    args = {**tiny_args, "imgsz": 64}
    patch_model(YOLO(tiny_model)).train(**args)
    files = list(cache.iterdir())
    assert len(files) == len(judged) > 1
    for file in files:
        _make_folder(file)
    log.clear()
    model = patch_model(YOLO(tiny_model))
    with AttentionCalls() as calls:
        model.train(**args)
    assert calls.backward == {"sdpa_flash": LAYERS * 2}
    assert Path(model.trainer.best).is_file()
    assert {row.decision.ms["sdpa_flash"] for row in model.trainer.flash_plan} == {1.0}
    assert len([line for line in log if "measuring again what cannot be read" in line]) == 1
    assert all(file.is_dir() for file in files)


def _killed_within(method: str, folder: str) -> None:
    """Store trials and be killed: when half of the draft is written, or before the swap."""
    trial_cache.USER_CONFIG_DIR = Path(folder)
    write = Path.write_bytes

    def die(path: Path, content: Any) -> Any:
        if method == "write_bytes":
            write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Path, method, die)
    trial_cache.store({AREA: {"stock": Trial(ms=7.0)}}, detect(CPU))


@pytest.mark.measures
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the platform cannot fork")
@pytest.mark.parametrize("method", ["write_bytes", "replace"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_writer_that_is_killed_leaves_what_was_there(method: str, earlier: bool, cache: Path, log: list[str]) -> None:
    before = autotune.measure([AREA], CPU) if earlier else {}
    process = multiprocessing.get_context("fork").Process(target=_killed_within, args=(method, str(cache.parent)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([file for file in cache.iterdir() if file.suffix != ".json"]) == 1
    assert trial_cache.load([AREA], detect(CPU)) == before
    log.clear()
    after = autotune.measure([AREA], CPU)
    assert after == before or not earlier
    assert after[AREA]["sdpa_flash"].ms is not None
    assert not [line for line in log if "cannot be read" in line]
    assert trial_cache.load([AREA], detect(CPU)) == after
    assert trial_cache.clear() == 2  # the draft too
    assert not list(cache.iterdir())


# A folder whose files have the names of ours --------------------------------------------------------------------------
SHADOWED = """
import json, sys
before = set(sys.modules)
import torch
from ultralytics import YOLO
from tests_of_shadows import LAYERS  # the folder is searched first
import yolo_flash
from yolo_flash import FlashConfig, checks, patch_model, plan
model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
rows = plan(model, imgsz=64, batch=2, device="cpu")
checks(device="cpu")
with torch.profiler.profile() as profile, torch.no_grad():
    model.model.eval()(torch.rand(1, 3, 64, 64))
calls = sum(event.name == "aten::_scaled_dot_product_flash_attention_for_cpu" for event in profile.events())
patch_model(model, backend="auto", config="strict")
print("answer", json.dumps({
    "calls": calls,
    "rows": len(rows),
    "deterministic": FlashConfig.resolve(config="strict").deterministic,
    "ours": [name for name in sys.modules if name in __SHADOWS__],
}))
"""


def test_files_of_the_user_with_the_names_of_ours_are_not_imported(tiny_model: str, tmp_path: Path) -> None:
    """A script's own folder is the first place where Python looks; what a user has there is not ours.

    But for triton.py, which torch itself imports, with or without us: see the test below.
    """
    files = [*SOURCE.rglob("*.py"), *(file.parent for file in SOURCE.glob("*/__init__.py"))]
    shadows = sorted({file.stem for file in files if not file.stem.startswith("_")})
    assert {"config", "graphs", "trainer"} <= set(shadows)
    for name in shadows:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('configs of the user was imported')\n")
    (tmp_path / "configs" / "strict.yaml").write_text("deterministic: prefer\n")
    (tmp_path / "strict").write_text("no YAML")
    (tmp_path / "tests_of_shadows.py").write_text(f"LAYERS = {LAYERS}\n")
    script = tmp_path / "mine.py"
    script.write_text(SHADOWED.replace("__SHADOWS__", repr(shadows)))
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.split("answer ")[1])
    assert answer["calls"] == LAYERS
    assert answer["rows"] == 2 * LAYERS
    assert answer["deterministic"] == "strict"
    assert answer["ours"] == []


def test_an_import_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A triton.py of the user ends torch._dynamo, and so Ultralytics, with an AttributeError that names it."""

    def fail(*args: Any) -> None:
        raise AttributeError("module 'triton' has no attribute 'language'")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises((AttributeError, ImportError), match="triton"):
        exec("from yolo_flash import patch_model")


# Streams --------------------------------------------------------------------------------------------------------------
CLOSED = """
import json, sys
assert sys.stdout is None and sys.stderr is None
from ultralytics import ASSETS, YOLO
from yolo_flash import patch_model
from yolo_flash.cli import main as cli
model, args, found = sys.argv[1], eval(sys.argv[2]), {}
for patched in (False, True):
    losses = []
    yolo = patch_model(YOLO(model), backend="sdpa_flash") if patched else YOLO(model)
    yolo.add_callback("on_train_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    yolo.train(**args)
    yolo.predict(ASSETS / "bus.jpg", imgsz=64, device="cpu")
    found["ours" if patched else "stock"] = losses, str(yolo.trainer.save_dir)
cli.main(["plan", f"model={model}", "imgsz=64", "batch=2", "device=cpu", "flash.autotune=false"])
cli.main(["checks", "device=cpu", "--json"])
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
def test_a_run_with_closed_streams_has_the_losses_of_stock(
    tiny_model: str, tiny_args: dict[str, Any], tmp_path: Path
) -> None:
    """As under a daemon. Ultralytics' bars need a standard output, unless it is told to be silent."""
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, tiny_model, repr(tiny_args)]
    assert subprocess.run(command, env={**ENVIRONMENT, "YOLO_VERBOSE": "false"}).returncode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (wanted, _), (got, folder) = found["stock"], found["ours"]
    assert len(wanted) == 2
    assert got == pytest.approx(wanted, rel=1e-3)
    rows = [json.loads(line) for line in (Path(folder) / "flash.jsonl").read_text().splitlines()]
    assert [row["backends"] for row in rows if row["event"] == "epoch"] == [{"sdpa_flash": LAYERS}]


def test_bars_without_a_standard_output_end_as_in_stock(
    tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    stock, ours = twins(tiny_model, lambda twin: twin.train(**tiny_args))
    assert ours.error == stock.error
    assert ours.losses == pytest.approx(stock.losses, rel=1e-3)


@pytest.mark.measures
def test_measuring_without_a_standard_output(cache: Path, judged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` never raises, so that a plan is made wherever `predict` runs."""
    monkeypatch.setattr(sys, "stdout", None)
    assert autotune.measure([AREA, PSA], CPU)[AREA]["sdpa_flash"].ms is not None


# Spawn ----------------------------------------------------------------------------------------------------------------
def _predict_elsewhere(given: Any, x: torch.Tensor, folder: str) -> None:
    kind, layers = type(given).__name__, patched_layers(given.model)
    patch_model(given, backend="sdpa_flash")
    with torch.no_grad(), AttentionCalls() as calls:
        out = given.model.eval()(x)[0]
    torch.save({"kind": kind, "layers": layers, "out": out, "calls": dict(calls.forward)}, Path(folder, "out.pt"))


def test_a_patched_model_goes_to_a_spawned_process_as_stock_and_is_patched_there(
    tiny_model: str, tmp_path: Path
) -> None:
    model: Any = YOLO(tiny_model)
    settle(model.model)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        stock = model.model.eval()(x)[0]
    patch_model(model, backend="sdpa_flash")
    process = multiprocessing.get_context("spawn").Process(target=_predict_elsewhere, args=(model, x, str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = torch.load(tmp_path / "out.pt")
    assert (found["kind"], found["layers"], found["calls"]) == ("YOLO", 0, {"sdpa_flash": LAYERS})
    torch.testing.assert_close(found["out"], stock, rtol=1e-3, atol=1e-2)
    assert patched_layers(model.model) == LAYERS  # here it stays
