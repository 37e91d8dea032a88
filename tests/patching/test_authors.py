"""Models of YOLOv12's authors that were loaded all the same: one line says how to convert them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.modules.block import AAttn

from tests.checkpoints.forks import save, tiny_fork
from yolo_flash import BackendNotSupportedError, convert, patch_model
from yolo_flash.patching.patch import _warn_once, known_blocks, targets


def test_their_blocks_stay_as_they_are_with_one_line(tmp_path: Path, log: list[str]) -> None:
    _warn_once.cache_clear()
    model = patch_model(YOLO(save(tiny_fork(), tmp_path / "fork.pt")))
    assert {type(block) for block in known_blocks(model.model).values()} == {AAttn}
    assert targets(model.model) == {}
    (line,) = [message for message in log if "yolo-flash" in message]
    assert line.removeprefix("WARNING ⚠️ ") == (
        "yolo-flash: model.2.m.0.0.attn and 3 more will fail: it has the layout of YOLOv12's authors (qk and v instead "
        "of qkv), which Ultralytics cannot run; `yolo-flash convert FILE.pt` writes a checkpoint that it can."
    )


def test_a_backend_by_name_raises_the_same(tmp_path: Path) -> None:
    model = YOLO(save(tiny_fork(), tmp_path / "fork.pt"))
    with pytest.raises(BackendNotSupportedError, match=r"authors .* `yolo-flash convert FILE.pt`"):
        patch_model(model, backend="sdpa_math")


def test_converted_ones_are_patched(tmp_path: Path) -> None:
    file = convert(save(tiny_fork(), tmp_path / "fork.pt"))
    x = torch.rand(1, 3, 32, 32)
    stock, ours = YOLO(file), patch_model(YOLO(file), backend="sdpa_math")
    assert len(targets(ours.model)) == 4
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x)[0], stock.model(x)[0], rtol=1e-4, atol=1e-4)
