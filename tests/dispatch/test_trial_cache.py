"""Files of earlier measurements: what they may say, and for what they hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from tests.planning.test_autotune import AREA, CPU, PSA
from yolo_flash import patch_model, plan
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial
from yolo_flash.graphs.signature import Signature
from yolo_flash.machine import detect
from yolo_flash.utils import numerics

pytestmark = pytest.mark.measures
FAST = {"stock": Trial(ms=2.0, ms_low=1.9), "sdpa_flash": Trial(ms=1.0, ms_low=0.9)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")


# Files that say what cannot be ----------------------------------------------------------------------------------------
BAD: list[tuple[str, Any]] = [
    *[("ms", value) for value in ("1.0", math.nan, math.inf, 0, -5, True, [1.0], 10**400, None)],
    *[("ms_low", value) for value in ("1", -1, 99.0)],
    *[("ms_high", value) for value in (math.nan, 1e-9)],
    *[("error", value) for value in ("0", -1.0, math.nan)],
    *[("extra_bytes", value) for value in (-1, 1.5, "1")],
    *[("why_not", value) for value in (None, 1, "failed")],
    *[("note", 3), ("method", "stopwatch"), ("method", []), ("first_seconds", None), ("first_seconds", -1)],
    *[("no_memory", "yes"), ("no_memory", 1), ("speed", 1.0)],
]


def spoil(change: Callable[[Any], Any]) -> None:
    """Change the content of every file of the cache."""
    for file in trial_cache.folder().iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_field_that_cannot_be_is_not_believed(name: str, value: Any, log: list[str]) -> None:
    machine = detect(CPU)
    trial = Trial(ms=1.0, ms_low=0.9, ms_high=1.1, error=0.0, extra_bytes=1, method="clock")
    trial_cache.store({AREA: {"stock": trial}, PSA: {"stock": trial}}, machine)
    assert (
        trial_cache.known(machine)
        == trial_cache.load([AREA, PSA], machine)
        == {AREA: {"stock": trial}, PSA: {"stock": trial}}
    )
    spoil(lambda content: content["trials"]["stock"].update({name: value}))
    assert trial_cache.load([AREA, PSA], machine) == {}
    assert trial_cache.known(machine) == {}
    assert len(log) == 2  # one for all files, each time
    assert all("cannot be read" in line and "(and 1 more)" in line for line in log)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["trials"].update(sdpa_flesh=content["trials"]["stock"]),
        lambda content: content.update(trials={}),
        lambda content: content.update(trials=[1]),
        lambda content: content.update(trials={"stock": None}),
        lambda content: content["trials"]["stock"].pop("ms"),
        lambda content: [content],
    ],
    ids=["unknown backend", "none", "list", "null", "no ms", "in a list"],
)
def test_a_file_that_cannot_be_is_written_anew_and_ends_no_plan(change: Any, log: list[str]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    plan(model, imgsz=64, batch=1, device="cpu")

    def keep_the_file(content: Any) -> Any:
        changed = change(content)
        return changed if isinstance(changed, list) else None

    spoil(keep_the_file)
    log.clear()
    rows = plan(patch_model(YOLO("yolo12n.yaml")), imgsz=64, batch=1, device="cpu")
    assert all(row.decision.ms for row in rows)
    assert len([line for line in log if "measuring again what cannot be read" in line]) == 1
    assert set(trial_cache.known(detect(CPU))) == {row.decision.spec for row in rows}


def test_a_training_survives_a_cache_of_nonsense(tiny_args: dict[str, Any], tiny_model: str, log: list[str]) -> None:
    patch_model(YOLO(tiny_model)).train(**tiny_args)
    spoil(lambda content: [trial.update(ms="fast") for trial in content["trials"].values()][:0])
    model = patch_model(YOLO(tiny_model))
    model.train(**tiny_args)
    assert any("measuring again what cannot be read" in line for line in log)
    assert all(row.decision.ms for row in model.trainer.flash_plan)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", "8"),
        ("batch", 0),
        ("batch", 10**400),
        ("num_heads", True),
        ("dtype", "float17"),
        ("dtype", "nn"),
        ("layout", "hwc"),
        ("mask", 0),
    ],
)
def test_a_spec_that_cannot_be_is_not_known(name: str, value: Any) -> None:
    trial_cache.store({AREA: {"stock": Trial(ms=1.0)}}, detect(CPU))
    spoil(lambda content: content["key"]["spec"].update({name: value}))
    assert trial_cache.known(detect(CPU)) == {}


def test_known_are_the_newest_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect(CPU)
    trial_cache.store({AREA: FAST, PSA: FAST}, machine)
    trial_cache.store({AREA: FAST}, dataclasses.replace(machine, name="another"))
    assert trial_cache.known(machine) == {AREA: FAST, PSA: FAST}
    monkeypatch.setattr(trial_cache, "_MOST_KNOWN", 1)
    assert len(trial_cache.known(machine)) <= 1
    trial_cache.clear()
    assert trial_cache.known(machine) == {}


# The key --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def _switches() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("_switches")
def test_other_arithmetic_and_another_share_of_the_card_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect(CPU)
    trial_cache.store({AREA: FAST}, machine)
    torch.set_float32_matmul_precision("high")
    assert not trial_cache.load([AREA], machine)
    assert not trial_cache.known(machine)
    torch.set_float32_matmul_precision("highest")
    assert trial_cache.load([AREA], machine)
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    assert not trial_cache.load([AREA], machine)
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50")
    assert not trial_cache.load([AREA], machine)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one set of switches before 2.9")
def test_switches_that_torch_refuses_to_read_are_replaced_by_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    signature = Signature([torch.nn.Linear(2, 2)])
    assert not signature.changed()  # which reads the same switches, before every replay
    expected = torch.backends.cuda.matmul.fp32_precision, numerics._BACKENDS.mkldnn.matmul.fp32_precision
    assert dict(numerics.arithmetic())["float32"] == str(expected)


def test_every_file_of_the_package_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "deep.py").write_text("x = 1")
    monkeypatch.setattr(trial_cache, "__file__", str(tmp_path / "dispatch" / "trial_cache.py"))
    code = trial_cache._code.__wrapped__
    before = code()
    (tmp_path / "kernels" / "deep.py").write_text("x = 2")
    assert code() != before
    assert code() == code()
