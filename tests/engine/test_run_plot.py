"""flash.png is drawn from flash.jsonl alone: readable for one epoch and many, for any number of layers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from yolo_flash.backends.registry import BACKENDS
from yolo_flash.bench.pictures import ARM_COLORS
from yolo_flash.engine.run_plot import draw_run


def written(folder: Path, epochs: int, layers: int) -> Path:
    lines: list[dict[str, Any]] = [{"event": "run", "yolo_flash": "1.0", "machine": {"name": "a card"}}]
    for mode in ("train", "val"):
        lines += [
            {"event": "plan", "mode": mode, "layer": f"model.6.m.{i}.0.attn", "backend": "sdpa_efficient"}
            for i in range(layers)
        ]
    lines += [
        {"event": "epoch", "epoch": e, "images_per_second": 9.5, "peak_allocated_gib": 1.0, "peak_reserved_gib": 1.5}
        for e in range(1, epochs + 1)
    ]
    file = folder / "flash.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(("epochs", "layers"), [(1, 2), (3, 16), (300, 8), (2, 0)])
def test_a_run_is_drawn(epochs: int, layers: int, tmp_path: Path) -> None:
    picture = draw_run(written(tmp_path, epochs, layers))
    assert picture is not None
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width > 1200
        assert 400 < image.height < 500
        colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
        red, green, blue = bytes.fromhex(ARM_COLORS["sdpa_efficient"][1:])
        assert ((red, green, blue) in colors) == (layers > 0)


def test_nothing_is_drawn_before_the_first_epoch_has_ended(tmp_path: Path) -> None:
    assert draw_run(written(tmp_path, 0, 8)) is None


def test_every_backend_has_a_color_of_its_own() -> None:
    assert list(ARM_COLORS) == [*BACKENDS, "nchw", "unpatched", "auto", "graphs"]
    assert len(set(ARM_COLORS.values())) == len(ARM_COLORS)
