"""32 steps of real training, stock and patched, from one seed: the losses agree, and the patched run was fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from tests.counting import AttentionCalls, randomise
from yolo_flash import patch_model
from yolo_flash.backends import registry, spec

TOLERANCE = 3e-4  # relative, of every loss of every step: ten times what was seen


def losses(start: Path, args: dict[str, Any], backend: str, epochs: int = 16) -> torch.Tensor:
    """Every loss of every step `[2 * epochs, 3]`."""

    def stop(trainer: Any) -> None:
        trainer.stop = trainer.epoch + 1 >= epochs

    model = YOLO(str(start))
    if backend != "unpatched":
        patch_model(model, backend=backend)
    history: list[list[float]] = []
    model.add_callback(
        "on_train_batch_end", lambda trainer: history.append([float(v) for v in trainer.loss_items.values()])
    )
    model.add_callback("on_train_epoch_end", stop)
    model.train(**args, save=epochs < 16)  # a run that is stopped has no other checkpoint
    return torch.tensor(history)


@pytest.mark.parametrize("config", ["yolo12n.yaml", "yolo26n.yaml"])
def test_losses_agree_over_32_steps(
    config: str, tiny_args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = YOLO(config)
    randomise(model.model)
    model.save(str(tmp_path / "start.pt"))
    args = {**tiny_args, "epochs": 16, "imgsz": 64, "val": False}
    args |= {"seed": 3, "optimizer": "SGD", "lr0": 1e-3}

    stock = losses(tmp_path / "start.pt", args, "unpatched")
    with AttentionCalls() as calls:
        ours = losses(tmp_path / "start.pt", args, "sdpa_flash")
    layers = 8 if config == "yolo12n.yaml" else 2
    assert calls.backward == {"sdpa_flash": 32 * layers}
    assert len(stock) == len(ours) == 32
    assert stock.isfinite().all()
    assert (stock[0] - stock[-1]).abs().max() > 0  # something is learned

    def distance(other: torch.Tensor) -> float:
        same = stock[: len(other)]
        return float(((other - same).abs() / same.abs().clamp_min(1e-3)).max())

    assert distance(ours) < TOLERANCE
    if config != "yolo12n.yaml":
        return

    def wrong_scale(packed: torch.Tensor, spec: spec.AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
        q, rest = packed.split([spec.head_dim, packed.shape[-1] - spec.head_dim], dim=-1)
        assert flash is not None
        return flash(torch.cat([3 * q, rest], dim=-1), spec)

    flash = registry.BACKENDS["sdpa_flash"].run
    broken = registry.Backend("sdpa_flash", lambda spec, machine: iter(()), wrong_scale, lambda spec, machine: True)
    monkeypatch.setitem(registry.BACKENDS, "sdpa_flash", broken)
    broke = losses(tmp_path / "start.pt", args, "sdpa_flash", epochs=4)
    assert len(broke) == 8
    assert distance(broke) > 100 * TOLERANCE  # the test can fail
