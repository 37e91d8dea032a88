"""The largest training batch, from the peaks of steps on a card that is made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.machines import MACHINES
from yolo_flash.bench import largest_batch
from yolo_flash.cli import main
from yolo_flash.cli import plan as cli_plan


class Card:
    """A GPU of 64 GiB on which a step takes 2 GiB, and as much for each image as its arm says."""

    GIB_AN_IMAGE = {"unpatched": 1.0, "auto": 0.5, "sdpa_math": 20.0, "sdpa_flash": 40.0}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0.0
        self.steps: list[tuple[str, str, int, int]] = []
        card = self

        class Step:
            def __init__(self, job: Any, arm: str) -> None:
                self.job, self.arm = job, arm

            def parts(self, imgsz: int, batch: int) -> dict[str, Any]:
                return {"kernel_ms": lambda: card.run(self.arm, self.job.amp, imgsz, batch)}

        monkeypatch.setattr(largest_batch, "Step", Step)
        monkeypatch.setattr(largest_batch, "free_bytes", lambda device: 60 * 2**30)
        for name, value in (
            ("memory_allocated", lambda device: 4 * 2**30),
            ("max_memory_allocated", lambda device: int(self.peak * 2**30)),
            ("reset_peak_memory_stats", lambda device: setattr(self, "peak", 0.0)),
            ("empty_cache", lambda: None),
            ("synchronize", lambda device: None),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, arm: str, amp: str, imgsz: int, batch: int) -> None:
        self.steps.append((arm, amp, imgsz, batch))
        need = 2 + self.GIB_AN_IMAGE[arm] * batch
        if need > 64:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, need)


@pytest.mark.parametrize(
    ("arm", "batch"),
    [("unpatched", 58), ("auto", 117), ("sdpa_math", 2), ("sdpa_flash", 0)],  # 0.95 x 64 GiB, less 2, by image
)
def test_the_largest_batch_is_on_the_line_through_two_peaks(
    arm: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch)
    assert largest_batch.largest_batch("yolo12n.yaml", 640, arm, torch.device("cuda:0"), True) == batch


@pytest.mark.parametrize(("amp", "used"), [(True, "fp16"), ("bf16", "bf16"), (False, "fp32"), ("fp32", "fp32")])
def test_the_steps_have_the_precision_of_the_run(amp: Any, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    largest_batch.largest_batch("yolo12n.yaml", 320, "auto", torch.device("cuda:0"), amp)
    assert card.steps == [("auto", used, 320, batch) for batch in (2, 2, 6, 6)]


def test_fit_says_what_fits_without_graphs_and_that_they_hold_as_much_again(
    log: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Card(monkeypatch)
    monkeypatch.setattr(cli_plan, "resolve_device", lambda device: torch.device("cuda:0"))
    monkeypatch.setattr(cli_plan, "detect", lambda device: MACHINES["H100"])
    monkeypatch.setattr(cli_plan, "plan", lambda model, **run: [])
    main.main(["plan", "imgsz=1280", "--fit"])
    told = log[-1]
    assert told.startswith("largest training batch at 1280 pixels in ")
    assert "with flash.graphs=off: stock 58, with yolo-flash 117. CUDA graphs hold about as much again" in told
    assert "flash.graphs=auto, steps of up to about 58 images can run from them" in told
    main.main(["plan", "imgsz=1280", "--fit", "--json"])
    assert json.loads(capsys.readouterr().out)["fit"] == {"unpatched": 58, "auto": 117, "graphs": 58}


def test_fit_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match=r"--fit measures on a GPU, the device is .*CPU"):
        main.main(["plan", "--fit", "device=cpu"])
