"""Every file of examples/ runs as its user would run it, with tiny inputs, and does what it is there to show."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

from tests.counting import AttentionCalls

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example with arguments; gives what it printed."""

    def call(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_train(run: Callable[..., str], tiny_model: str, coco8: str) -> None:
    small = ("--imgsz", 64, "--batch", 2, "--epochs", 1, "--workers", 0, "--device", "cpu")
    text = run("train.py", "--model", tiny_model, "--data", coco8, *small)
    assert "train model.3.m.0.0.attn" in text
    assert "one step ran" in text
    assert "best.pt is a plain Ultralytics checkpoint" in text


def test_is_flash_on(run: Callable[..., str], tiny_model: str) -> None:
    text = run("is_flash_on.py", "--model", tiny_model, "--imgsz", 64, "--backend", "sdpa_flash")
    stock, patched = (line for line in text.splitlines() if line.startswith(("stock:", "patched:")))
    assert stock.endswith("no fused attention")
    assert "'aten::_scaled_dot_product_flash_attention_for_cpu': 3" in patched


def test_choose_backend(run: Callable[..., str], tiny_model: str) -> None:
    args = ("--model", tiny_model, "--imgsz", 64, "--batch", 2, "--layers", "model.4*", "--backend")
    text = run("choose_backend.py", *args, "sdpa_flash")
    assert "model.3.m.0.0.attn      sdpa_flash      asked for" in text
    assert "model.4.m.0.attn        stock           asked for" in text
    if not torch.cuda.is_available():
        text = run("choose_backend.py", *args, "triton_area")
        assert "backend=triton_area cannot run" in text
        assert "runs on NVIDIA cards" in text
        assert "So auto decides" in text
        assert "model.4.m.0.attn        stock" in text


def test_predict_large(run: Callable[..., str], tiny_model: str) -> None:
    text = run("predict_large.py", "--model", tiny_model, "--imgsz", 256)
    assert "objects in 810 x 1080 pixels, read at 256; drawn in" in text
    assert list(Path(text.rpartition("drawn in ")[2].splitlines()[0]).glob("bus.*"))


def test_own_loop(run: Callable[..., str], tiny_model: str) -> None:
    losses = {}
    for backend in ("stock", "sdpa_flash"):
        torch.manual_seed(0)
        with AttentionCalls() as calls:
            small = ("--imgsz", 64, "--batch", 2, "--steps", 3, "--backend", backend)
            text = run("own_loop.py", "--model", tiny_model, *small)
        assert calls.forward == calls.backward == ({} if backend == "stock" else {backend: 9})
        losses[backend] = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("step ")]
        assert len(losses[backend]) == 3
    assert losses["sdpa_flash"] == pytest.approx(losses["stock"], rel=0.01)
    assert torch.load("weights.pt").keys() == YOLO(tiny_model).model.state_dict().keys()


def test_every_example_has_a_test_and_a_line_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f"test_{file.stem}" in globals(), file.name
        assert f"[{file.name}]({file.name})" in table
