"""What the patched blocks of one model share: the settings, the decisions taken so far, and what failed."""

from __future__ import annotations

from typing import Any

import torch
from ultralytics.utils import LOGGER

from .backends import AttentionSpec
from .config import FlashConfig
from .machine import Machine, detect
from .selector import Decision, select

_MAX_DECISIONS = 1024  # predict on a folder of mixed aspect ratios meets a new spec an image


class Runtime:
    """Decides, once for each spec and layer choice, which backend runs; all copies of a model share one Runtime.

    Attributes:
        config: The settings of the model.
    """

    def __init__(self, config: FlashConfig) -> None:
        """Start without decisions."""
        self.config = config
        self._decisions: dict[tuple[AttentionSpec, str, torch.device], Decision] = {}
        self._failed: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The EMA, the validator and the predictor run copies of the model, by the same decisions."""
        return self

    def decide(self, spec: AttentionSpec, choice: str, device: torch.device) -> Decision:
        """Return the decision for a spec, taken by the rules when it is new.

        Raises:
            BackendNotSupportedError: `choice` names a backend that cannot run the spec.
        """
        key = (spec, choice, device)
        decision = self._decisions.get(key)
        if decision is None:
            if len(self._decisions) >= _MAX_DECISIONS:
                self._decisions.clear()
            decision = self.select(spec, choice, detect(device))
            self._decisions[key] = decision
        return decision

    def select(self, spec: AttentionSpec, choice: str, machine: Machine) -> Decision:
        """The decision for a spec on any machine, with this model's settings and without the backends that failed."""
        return select(spec, machine, choice, self.config.deterministic, self._failed)

    def fail(self, layer: str, decision: Decision, error: Exception) -> None:
        """Take a backend that raised out of this run, with one warning."""
        if decision.backend not in self._failed:
            LOGGER.warning(
                f"yolo-flash: {decision.backend} failed in {layer} ({decision.spec}) and is not used again in this "
                f"run: {type(error).__name__}: {error}"
            )
        self._failed[decision.backend] = f"raised in this run: {type(error).__name__}: {error}"
        self._decisions.clear()
