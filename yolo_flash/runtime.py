"""What the patched blocks of one model share: the settings, the decisions taken so far, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from ultralytics.utils import LOGGER

from .backends import AttentionSpec
from .config import FlashConfig
from .machine import Machine, detect
from .selector import Decision, Trial, select

_MAX_DECISIONS = 1024  # predict on a folder of mixed aspect ratios meets a new spec an image
_UNPLANNED_SIZE = (16, 400)  # groups and tokens of a graph compiled outside of training: a YOLO at 640


class Runtime:
    """Decides, once for each spec and layer choice, which backend runs; all copies of a model share one Runtime.

    Attributes:
        config: The settings of the model.
        failed: Backend -> the error for which it is not used again.
        planned_sizes: (layer, whether training) -> groups and tokens of the run, once they are known.
        trials: Spec -> backend -> what was measured, see `learn`; the rules decide where there is nothing.
        frugal: Whether a measured backend may need no more memory than what the rules would take.
        unplanned: Specs that a run met and had not measured: they went by the nearest one, or by the rules.
    """

    def __init__(self, config: FlashConfig) -> None:
        """Start without decisions."""
        self.config = config
        self.planned_sizes: dict[tuple[str, bool], tuple[int, int]] = {}
        self._decisions: dict[tuple[AttentionSpec, str, torch.device], Decision] = {}
        self._plans: dict[tuple[tuple[Any, ...], str, torch.device], tuple[AttentionSpec, str]] = {}
        self.failed: dict[str, str] = {}
        self.trials: Mapping[AttentionSpec, Mapping[str, Trial]] = {}
        self._measured_on: Machine | None = None
        self.frugal = False
        self.unplanned: set[AttentionSpec] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """The EMA, the validator and the predictor run copies of the model, by the same decisions."""
        return self

    def learn(self, trials: Mapping[AttentionSpec, Mapping[str, Trial]], machine: Machine) -> None:
        """Decide by these trials from now on, on the machine where they ran; earlier decisions are forgotten."""
        self.trials, self._measured_on = trials, machine
        self.unplanned.clear()
        self._forget()

    def decide(self, spec: AttentionSpec, choice: str, device: torch.device) -> Decision:
        """Return the decision for a spec, taken by the rules when it is new.

        Raises:
            BackendNotSupportedError: `choice` names a backend that cannot run the spec.
        """
        key = (spec, choice, device)
        decision = self._decisions.get(key)
        if decision is None:
            if len(self._decisions) >= _MAX_DECISIONS:
                self._forget()
            decision = self.select(spec, choice, detect(device))
            self._decisions[key] = decision
            if choice == "auto" and self.trials and spec not in self.trials:
                self.unplanned.add(spec)
        return decision

    def plan(self, fields: tuple[Any, ...], choice: str, device: torch.device) -> tuple[AttentionSpec, str]:
        """A spec and the backend that `decide` takes for it, at less cost: every block asks in every step.

        Args:
            fields: Of the spec, in their order. They are hashed in C, a spec is not.
            choice: `auto` or a backend's name.
            device: Where it runs.

        Raises:
            BackendNotSupportedError: `choice` names a backend that cannot run the spec.
        """
        key = (fields, choice, device)
        plan = self._plans.get(key)
        if plan is None:
            spec = AttentionSpec(*fields)
            plan = spec, self.decide(spec, choice, device).backend
            self._plans[key] = plan  # of which there are no more than decisions: they are forgotten together
        return plan

    @torch.compiler.assume_constant_result
    def decide_for_compile(self, layer: str, choice: str, spec_parts: tuple[Any, ...], device: str) -> str:
        """The backend's name for a compiled graph, whose sizes may be symbols: taken for the planned size of the layer.

        Args:
            layer: Name of the layer.
            choice: `auto` or a backend's name.
            spec_parts: The spec without its sizes, as `AttentionSpec.without_sizes` gives it.
            device: Name of the device.
        """
        training = AttentionSpec.with_sizes(spec_parts, 1, 1).training
        batch, seq_len = self.planned_sizes.get((layer, training), _UNPLANNED_SIZE)
        return self.decide(AttentionSpec.with_sizes(spec_parts, batch, seq_len), choice, torch.device(device)).backend

    def select(self, spec: AttentionSpec, choice: str, machine: Machine) -> Decision:
        """The decision for a spec on any machine, with this model's settings and without the backends that failed.

        Never measures: it is called inside steps, compilations and captures.
        """
        known = self.trials if machine == self._measured_on else {}
        near = spec if spec in known else self._nearest(spec, known) if choice == "auto" else None
        decision = select(
            *(spec, machine, choice, self.config.deterministic, self.failed),
            trials=None if near is None else known[near],
            frugal=self.frugal,
        )
        if near is None or near == spec:
            return decision
        why = f"as measured for {near.batch} x {near.seq_len_q} tokens"
        return replace(decision, why=why, ms={}, error={}, extra_bytes={})

    @staticmethod
    def _nearest(spec: AttentionSpec, known: Iterable[AttentionSpec]) -> AttentionSpec | None:
        """The measured spec that differs in groups and tokens only, by a factor of 4 each at most."""

        def distance(other: AttentionSpec) -> float:
            ratios = other.batch / spec.batch, other.seq_len_q / spec.seq_len_q
            return (
                math.inf if not all(0.25 <= ratio <= 4 for ratio in ratios) else sum(abs(math.log(r)) for r in ratios)
            )

        alike = [other for other in known if other.without_sizes() == spec.without_sizes()]
        best = min(alike, key=distance, default=None)
        return best if best is not None and distance(best) < math.inf else None

    def fail(self, layer: str, spec: AttentionSpec, backend: str, error: Exception) -> None:
        """Take a backend that raised out of this run, with one warning."""
        if backend not in self.failed:
            LOGGER.warning(
                f"yolo-flash: {backend} failed in {layer or 'the block'} ({spec}) and is not used again in this run: "
                f"{type(error).__name__}: {error}"
            )
        self.failed[backend] = f"raised in this run: {type(error).__name__}: {error}"
        self._forget()

    def _forget(self) -> None:
        self._decisions.clear()
        self._plans.clear()
