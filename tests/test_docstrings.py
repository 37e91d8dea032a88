"""Every public name has an example in its docstring, and the examples run on a CPU as they stand there."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import ASSETS

import yolo_flash
from tests.checkpoints.forks import save, tiny_fork

NAMES = [name for name in yolo_flash.__all__ if name != "__version__"]


class Checker(doctest.OutputChecker):
    """What an example does not show is not compared: progress bars."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_public_name_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)  # else runs are saved beside the installed package
    shutil.copy(ASSETS / "bus.jpg", tmp_path)
    save(tiny_fork(), tmp_path / "yolov12n.pt")
    known: dict[str, Any] = {public: getattr(yolo_flash, public) for public in NAMES} | {"YOLO": YOLO, "torch": torch}
    examples = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, None)
    assert examples.examples
    results = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS).run(examples)
    assert results.failed == 0, capsys.readouterr().out
