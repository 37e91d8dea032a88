"""A model for the tests of graphs, and what stands in for the graph of a forward."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from ultralytics import YOLO

from yolo_flash.engine import predictor
from yolo_flash.graphs import inference, validation


@pytest.fixture(scope="package")
def detector() -> Any:
    return YOLO("yolo12n.yaml").model


class Forward:
    """In the place of `CapturedForward`: runs the network, and counts."""

    made: list[Forward] = []
    off = 0.0
    held, room = 2**20, 2**30

    def __init__(self, network: nn.Module, images: Tensor, earlier: Forward | None = None) -> None:
        self.network, self.shape, self.calls, self.earlier = network, tuple(images.shape), 0, earlier
        Forward.made.append(self)

    def __call__(self, images: Tensor) -> Any:
        self.calls += 1
        assert "forward" not in vars(self.network)
        out = self.network(images)
        return out * (1 + self.off) if isinstance(out, Tensor) else out


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Forward]:
    """Every forward in inference is one that could be replayed; the graphs there were."""
    monkeypatch.setattr(inference, "CapturedForward", Forward)
    for module in (predictor, validation):
        monkeypatch.setattr(module, "no_nvidia_gpu", lambda device: "")
    monkeypatch.setattr(Forward, "made", [])
    return Forward.made
