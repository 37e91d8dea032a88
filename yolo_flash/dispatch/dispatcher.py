"""What the patched blocks of one model share: the settings, the decisions taken so far, and what failed."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from ultralytics.utils import LOGGER, RANK

from ..backends.registry import BACKENDS
from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..machine import Machine, detect, flash_impl
from ..utils.compiler import assume_constant_result
from . import trial_cache
from .decision import Decision, Trial, select
from .rules import RULES_MEASURED_ON

Trials = Mapping[AttentionSpec, Mapping[str, Trial]]
Measure = Callable[[list[AttentionSpec], torch.device], Trials]
_Key = tuple[AttentionSpec, str, torch.device]

_MAX_DECISIONS = 1024  # predict on a folder of mixed aspect ratios meets a new spec an image
_MAX_MEASURED = 16  # specs that predictions of one model may have measured: half a minute at most
_LARGE = 2**28  # scores: 1 GiB and more in float32, of which unfused attention holds several
_UNPLANNED_SIZE = (16, 400)  # groups and tokens of a graph compiled outside of training: a YOLO at 640


class Dispatcher:
    """Decides, once for each spec and layer choice, which backend runs; all copies of a model share one Dispatcher.

    Attributes:
        config: The settings of the model.
        failed: Backend -> the error for which it is not used again.
        planned_sizes: (layer, whether training) -> groups and tokens of the run, once they are known.
        trials: Spec -> backend -> what was measured for this run, see `learn`. Specs without any go by what earlier
            runs have measured, see `trial_cache`, and else by the rules.
        memory_limited: Whether a measured backend may need no more memory than what the rules would take.
        unplanned: Specs that a run met without a measurement: decided by the nearest measured one, or by the rules.
        measure: Measures specs that predictions meet again, and that only the rules of another card decide. None, as in
            training: nothing is measured.
        layers: Attention layers that share the Dispatcher: that many may meet one spec in one forward.
    """

    def __init__(self, config: FlashConfig) -> None:
        """Start without decisions."""
        self.config = config
        self.planned_sizes: dict[tuple[str, bool], tuple[int, int]] = {}
        self._decisions: dict[_Key, Decision] = {}
        self.failed: dict[str, str] = {}
        self.trials: Trials = {}
        self._measured_on: Machine | None = None
        self._known: list[tuple[Machine, dict[AttentionSpec, Mapping[str, Trial]]]] = []
        self._recalled: set[torch.device] = set()
        self.memory_limited = False
        self.unplanned: set[AttentionSpec] = set()
        self.measure: Measure | None = None
        self.layers = 1
        self._met: dict[_Key, int] = {}
        self._flash_impl: str | None = None
        self._tried: set[AttentionSpec] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        """The EMA, the validator and the predictor run copies of the model, by the same decisions."""
        return self

    # What was measured ------------------------------------------------------------------------------------------------
    def learn(self, trials: Trials, machine: Machine) -> None:
        """Decide by these trials from now on, on the machine where they ran; earlier decisions are forgotten."""
        self.trials, self._measured_on = trials, machine
        self.unplanned.clear()
        self._decisions.clear()

    def remember(self, trials: Trials, machine: Machine) -> None:
        """Decide by these trials too, for specs that `learn` got no trials of."""
        for other, known in self._known:
            if other == machine:
                known.update(trials)
                break
        else:
            self._known.append((machine, dict(trials)))
        self._decisions.clear()

    def take_over(self, earlier: Dispatcher) -> None:
        """Take over the trials of another Dispatcher, such as that of a training that is over."""
        for machine, trials in earlier._known:
            self.remember(trials, machine)
        if earlier._measured_on is not None:
            self.remember(earlier.trials, earlier._measured_on)

    def recall(self, device: torch.device) -> None:
        """Read, once a device, what earlier runs have measured: before the first decision, and before a plan.

        Nothing is read while a graph is compiled or captured, nor in one of several ranks: ranks have to decide alike,
        their files may differ, and the plan brings the numbers of rank 0.
        """
        if device in self._recalled or not self.config.autotune or device.type not in ("cuda", "cpu"):
            return
        if _in_a_rank() or _is_traced(device):
            return
        self._recalled.add(device)
        machine = detect(device)
        known = trial_cache.known(machine)
        earlier: Trials = {spec: trials for spec, trials in known.items() if _timed_fused(trials)}
        if any(other == machine for other, _ in self._known):  # a card of the same kind, or what a training measured
            earlier = {**earlier, **self._measured(machine)}
        self.remember(earlier, machine)

    def _measured(self, machine: Machine) -> Trials:
        """All trials of a machine, those of this run before others."""
        mine = [self.trials] if machine == self._measured_on else []
        known = [trials for other, trials in self._known if other == machine]
        return ChainMap(*(dict(trials) for trials in (*mine, *known)))

    # Decisions --------------------------------------------------------------------------------------------------------
    def decide(self, spec: AttentionSpec, choice: str, device: torch.device) -> Decision:
        """Return the decision for a spec: by what was measured on this machine, now or earlier, or by the rules.

        Every block asks in every step: what was decided before costs one look into a dictionary.

        Raises:
            BackendNotSupportedError: `choice` names a backend that cannot run the spec.
        """
        if (now := flash_impl()) != self._flash_impl:  # `sdpa_flash` runs another kernel than when it was decided
            self._flash_impl = now
            self._decisions.clear()
        key = spec, choice, device
        decision = self._decisions.get(key)
        if decision is None:
            if len(self._decisions) >= _MAX_DECISIONS:
                self._decisions.clear()
            if choice == "auto":
                self.recall(device)
            decision = self._decisions[key] = self._decide(*key)
        elif not self._met or key not in self._met:
            return decision
        self._meet(key, decision)
        return decision if key in self._decisions else self.decide(*key)

    def _decide(self, spec: AttentionSpec, choice: str, device: torch.device) -> Decision:
        decision = self.select(spec, choice, detect(device))
        unplanned = choice == "auto" and self.trials and not decision.trials
        if unplanned and len(self.unplanned) < _MAX_DECISIONS:
            self.unplanned.add(spec)
        return decision

    def _meet(self, key: _Key, decision: Decision) -> None:
        """Count how often a prediction goes by a rule of another card, and have its spec measured the third time.

        Every layer may meet the spec in one forward, so that it has come a third time when it was met more than twice
        as often as there are layers. A spec is measured once, whatever came of it, and of a model 16 at most. A
        measurement empties the decisions.
        """
        spec, choice, device = key
        if self.measure is None or device.type != "cuda" or spec.training or choice != "auto":
            return
        if not self.config.autotune or _in_a_rank():
            return
        founded = detect(device).capability == RULES_MEASURED_ON or not decision.by_rules
        if founded or spec in self._tried or len(self._tried) >= _MAX_MEASURED:
            self._met.pop(key, None)
            return
        count = self._met.get(key, 0) + 1
        if count <= 2 * self.layers or _is_traced(device):
            if key in self._met or len(self._met) < _MAX_DECISIONS:
                self._met[key] = count
            return
        self._met.pop(key, None)
        self._tried.add(spec)
        try:
            self.remember(self.measure([spec], device), detect(device))
        except Exception as error:  # a prediction goes on, by the rules
            LOGGER.warning(f"yolo-flash: {spec} could not be measured: {type(error).__name__}: {error}")

    @assume_constant_result
    def decide_for_compile(self, layer: str, choice: str, spec_parts: tuple[Any, ...], device: str) -> str:
        """The backend's name for a compiled graph, whose sizes may be symbols: decided for the layer's planned size."""
        training = AttentionSpec.with_sizes(spec_parts, 1, 1).training
        batch, seq_len = self.planned_sizes.get((layer, training), _UNPLANNED_SIZE)
        return self._decide(AttentionSpec.with_sizes(spec_parts, batch, seq_len), choice, torch.device(device)).backend

    def select(self, spec: AttentionSpec, choice: str, machine: Machine) -> Decision:
        """The decision for a spec on any machine, with this model's settings and without the backends that failed.

        Never measures: it is called inside steps, compilations and captures.
        """
        known, near = self._measured(machine), None
        if spec in known:
            near = spec
        elif choice == "auto":  # what this run has measured first, so that files of others change nothing near it
            mine = self.trials if machine == self._measured_on else {}
            near = self._nearest(spec, mine) or self._nearest(spec, known)
        trials = None if near is None else known[near]
        if near and trials and spec.scores > max(_LARGE, near.scores):
            # Four times as many tokens are sixteen times the scores: unfused attention was measured where they fit.
            trials = {name: trial for name, trial in trials.items() if BACKENDS[name].fused}
        decision = select(
            *(spec, machine, choice, self.config.deterministic, self.failed),
            trials=trials,
            memory_limited=self.memory_limited,
        )
        if near is None or near == spec:
            return decision
        why = decision.why if decision.by_rules else f"as measured for {near.batch} x {near.seq_len_q} tokens"
        return replace(decision, why=why, trials={})

    @staticmethod
    def _nearest(spec: AttentionSpec, known: Iterable[AttentionSpec]) -> AttentionSpec | None:
        """The measured spec that differs in groups and tokens only, by a factor of 4 each at most."""

        def distances(other: AttentionSpec) -> tuple[float, float]:
            ratios = other.batch / spec.batch, other.seq_len_q / spec.seq_len_q
            return abs(math.log(ratios[0])), abs(math.log(ratios[1]))

        alike = [other for other in known if other.without_sizes() == spec.without_sizes()]
        near = [other for other in alike if max(distances(other)) <= math.log(4)]
        return min(near, key=lambda other: (sum(distances(other)), other.batch, other.seq_len_q), default=None)

    def fail(self, layer: str, spec: AttentionSpec, backend: str, error: Exception) -> None:
        """Take a backend that raised out of this run, with one warning."""
        if backend not in self.failed:
            LOGGER.warning(
                f"yolo-flash: {backend} failed in {layer or 'the block'} ({spec}) and is not used again in this run: "
                f"{type(error).__name__}: {error}"
            )
        self.failed[backend] = f"raised in this run: {type(error).__name__}: {error}"
        self._decisions.clear()


def _timed_fused(trials: Mapping[str, Trial]) -> bool:
    """Whether a fused backend was timed: a file of an earlier run lacks what failed, and may hold stock alone."""
    return any(BACKENDS[name].fused and trial.ms is not None for name, trial in trials.items())


def _in_a_rank() -> bool:
    return RANK != -1 or (dist.is_available() and dist.is_initialized())


def _is_traced(device: torch.device) -> bool:
    """Whether this very moment a graph is compiled, or captured from the device."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
