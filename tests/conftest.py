"""A home of its own for Ultralytics, before it is imported: no test reads or changes the user's settings."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HOME = tempfile.TemporaryDirectory(prefix="yolo-flash-tests-")
os.environ["YOLO_CONFIG_DIR"] = _HOME.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; Ultralytics sets it when torch is there
for _name in [name for name in os.environ if name.startswith("YOLO_FLASH") and name != "YOLO_FLASH_DATASETS"]:
    del os.environ[_name]
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: our kernels run on the CPU
from ultralytics import settings  # noqa: E402
from ultralytics.utils import LOGGER, YAML  # noqa: E402

settings.update(
    {"datasets_dir": f"{_HOME.name}/datasets", "runs_dir": f"{_HOME.name}/runs", "weights_dir": f"{_HOME.name}/weights"}
)


def pytest_collection_finish() -> None:
    """Leave out of every collection what was imported: Ultralytics collects garbage several times a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _by_the_rules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times decide no test but those of measuring itself, which are marked."""
    if request.node.get_closest_marker("measures") is None:
        monkeypatch.setattr("yolo_flash.planning.autotune.measure", lambda specs, device: {})
        monkeypatch.setattr("yolo_flash.dispatch.trial_cache.known", lambda machine: {})


@pytest.fixture(scope="session")
def coco8() -> str:
    """data.yaml of the real coco8 where YOLO_FLASH_DATASETS has it, else of the stand-in."""
    from yolo_flash.assets.coco8_standin import create_standin

    real = Path(os.environ.get("YOLO_FLASH_DATASETS", "")) / "coco8"
    if not (real / "data.yaml").is_file():
        return str(create_standin(Path(_HOME.name) / "coco8-stand-in"))
    copy = Path(_HOME.name) / "coco8-copy"  # Ultralytics writes its label caches beside the labels
    shutil.copytree(real, copy, ignore=shutil.ignore_patterns("*.cache"), copy_function=shutil.copyfile)
    return str(copy / "data.yaml")


@pytest.fixture
def tiny_args(coco8: str, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a training run of a second or two."""
    return {
        "data": coco8,
        "imgsz": 32,
        "epochs": 1,
        "batch": 2,
        "workers": 0,
        "plots": False,
        "device": "cpu",
        "verbose": False,
        "project": str(tmp_path / "runs"),
    }


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A detector that trains in half the time of yolo12n: two layers of area attention, one of PSA."""
    layers = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 32, 128)]
    layers += [[-1, 1, "A2C2f", [128, True, 4]], [-1, 1, "C2PSA", [128]]]
    head = [[[4], 1, "Detect", ["nc"]]]
    model = {"nc": 80, "scales": {"n": [1.0, 1.0, 1024]}, "backbone": layers, "head": head}
    YAML.save(tmp_path / "tiny.yaml", model)
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Messages that go through Ultralytics' LOGGER during the test."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    yield messages
    LOGGER.removeHandler(handler)
