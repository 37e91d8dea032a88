"""The kinds of models whose steps run from graphs, and what each does in its own way."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from ultralytics.nn.tasks import BaseModel, RTDETRDetectionModel

from . import capture, fixed_loss, rtdetr, rtdetr_loss
from .capture import NextCall
from .graphed_step import GraphedStep

ENTRANCES = ("forward", "predict", "loss")


class Kind(NamedTuple):
    """A kind of models.

    Attributes:
        base: Ultralytics' class, whose entrances a replay takes the place of.
        losses: The module of its loss in fixed shapes, with the functions `not_supported_reason`, `needed`,
            `needed_bytes` and `pad_targets`.
        capture_step: See `capture.capture_step`.
        replay_next_call: See `capture.replay_next_call`.
    """

    base: type
    losses: ModuleType
    capture_step: Callable[..., tuple[GraphedStep, str]]
    replay_next_call: Callable[..., NextCall | None]

    def has(self, model: Any) -> bool:
        """Whether a model is entered as those of the kind are."""
        mine, other = self.base, type(model)
        return isinstance(model, mine) and all(getattr(other, n) is getattr(mine, n) for n in ENTRANCES)


DETECTION = Kind(BaseModel, fixed_loss, capture.capture_step, capture.replay_next_call)
RTDETR = Kind(RTDETRDetectionModel, rtdetr_loss, rtdetr.capture_step, rtdetr.replay_next_call)


def kind_of(model: Any) -> Kind | None:
    """The kind of a model; None if a step of it cannot be replayed."""
    return next((kind for kind in (DETECTION, RTDETR) if kind.has(model)), None)
