"""From a spec and a machine to a `Decision`: data in, data out, the same on every rank and every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..backends.registry import BACKENDS, BackendNotSupportedError, check_name, label
from ..backends.spec import AttentionSpec
from ..machine import Machine
from .rules import rules_for

TIE = 0.03  # times this near are equal: the spread of repeats
WIDE = 0.3  # samples of a GPU that lie further apart, relative to their median, are no measurement


@dataclass(frozen=True)
class Trial:
    """What a backend did with a spec on this machine, see `autotune.judge`.

    Attributes:
        ms: Milliseconds of one call, median of the samples; forward and backward if the spec trains. None if not timed.
        ms_low: Lowest sample.
        ms_high: Highest sample.
        error: Largest relative error against high precision, of the output and the gradients.
        extra_bytes: Peak memory of the call, in bytes above what was allocated before; None where the device does not
            tell.
        why_not: Why it cannot be used: it raised, was wrong, or did not fit. Empty if it can.
        note: What has to be known to read the numbers.
        method: `graph`, `events` or `clock`.
        first_seconds: Seconds of the first call, compilation included.
        no_memory: Whether too little memory is why it cannot be used.
    """

    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    error: float | None = None
    extra_bytes: int | None = None
    why_not: str = ""
    note: str = ""
    method: str = ""
    first_seconds: float = 0.0
    no_memory: bool = False

    @property
    def spread(self) -> float:
        """From the lowest to the highest sample, relative to the median."""
        if self.ms is None or self.ms_low is None or self.ms_high is None:
            return 0.0
        return (self.ms_high - self.ms_low) / self.ms

    @property
    def wide(self) -> bool:
        """Whether a GPU's samples lie too far apart to be a measurement; on a CPU other processes always interfere."""
        return self.method != "clock" and self.spread > WIDE


@dataclass(frozen=True)
class Decision:
    """Which backend runs a spec, why, and what became of the others.

    Attributes:
        spec: The problem.
        backend: The winner's name.
        why: One clause for the log.
        refused: Backend -> the reasons for which it cannot or shall not run.
        reproducible: Whether the winner's backward gives the same bits every time.
        trials: Backend -> what it did with this very spec; empty where nothing was measured.
        by_rules: Whether `auto` took the winner by the rules, without a measurement.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash")
        >>> decision = plan(model, imgsz=640, batch=2, device="cpu")[0].decision
        >>> decision.backend, decision.why
        ('sdpa_flash', 'asked for')
        >>> decision.fate("triton_area")
        'runs on NVIDIA cards, the device is ...'
    """

    spec: AttentionSpec
    backend: str
    why: str
    refused: Mapping[str, tuple[str, ...]]
    reproducible: bool
    trials: Mapping[str, Trial] = field(default_factory=dict)
    by_rules: bool = False

    @property
    def ms(self) -> dict[str, float]:
        """Backend -> measured milliseconds."""
        return {name: trial.ms for name, trial in self.trials.items() if trial.ms is not None}

    @property
    def error(self) -> dict[str, float]:
        """Backend -> measured relative error."""
        return {name: trial.error for name, trial in self.trials.items() if trial.error is not None}

    @property
    def notes(self) -> dict[str, str]:
        """Backend -> what has to be known to read its time, such as `measured on 4 of 64 groups`."""
        return {name: trial.note for name, trial in self.trials.items() if trial.note and trial.ms is not None}

    def summary(self) -> str:
        """The winner's time and why it runs: `0.88 ms, 4.6x stock, the fastest measured`; why alone without a time."""
        ms, stock = self.ms.get(self.backend), self.ms.get("stock")
        if ms is None:
            return self.why
        gain = f", {stock / ms:.1f}x stock{self._scaled('stock')}" if stock and self.backend != "stock" else ""
        return f"{self._time(self.backend)}{gain}, {self.why}"

    def fate(self, name: str) -> str:
        """Why another backend was not taken, or else its time."""
        if name in self.refused:
            return "; ".join(self.refused[name])
        return self._time(name) if name in self.ms else "ready"

    def _time(self, name: str) -> str:
        return f"{self.ms[name]:.3g} ms{self._scaled(name)}"

    def _scaled(self, name: str) -> str:
        """` (measured on 4 of 64 groups)` behind a time that was scaled."""
        return f" ({self.notes[name]})" if name in self.notes else ""


def select(
    spec: AttentionSpec,
    machine: Machine,
    choice: str = "auto",
    deterministic: str = "prefer",
    failed: Mapping[str, str] | None = None,
    trials: Mapping[str, Trial] | None = None,
    memory_limited: bool = False,
) -> Decision:
    """Choose the backend for a spec: the fastest of those that were measured, or by the rules where none was.

    Args:
        spec: The problem.
        machine: The device it runs on.
        choice: `auto`, or the name of the backend to use.
        deterministic: `prefer` or `strict`, see FlashConfig.
        failed: Backend -> error of backends that raised in this run, which `auto` does not try again.
        trials: Backend -> what it did with the spec on this machine.
        memory_limited: Take nothing that needs more memory than what the rules would take.

    Raises:
        BackendNotSupportedError: The choice is a name, and that backend cannot run, or was wrong or raised in its
            trial. `auto` never raises.
    """
    refused: dict[str, tuple[str, ...]] = {}
    for name, backend in BACKENDS.items():
        reasons = list(backend.not_supported_reasons(spec, machine))
        if failed and name in failed and choice == "auto":
            reasons.append(failed[name])
        if backend.by_name and choice != name:
            reasons = [f"{backend.by_name}: runs only where it is asked for by name"]
        if deterministic == "strict" and spec.training and not backend.reproducible(spec, machine):
            reasons.append("deterministic=strict, and its backward adds in an order that changes from run to run")
        if reasons:
            refused[name] = tuple(reasons)
    trials = trials or {}
    by_rules = False
    if check_name(choice) == "auto":
        # Stock, which has no limits, ends them.
        rules = [rule for rule in rules_for(spec, machine) if rule[0] not in refused]
        timed = {name: trial for name, trial in trials.items() if trial.ms is not None and name not in refused}
        by_rules = not timed
        for name, trial in trials.items():
            # A trial without enough memory is no verdict where nothing could be timed: stock would need the most.
            if trial.why_not and not (by_rules and trial.no_memory):
                refused[name] = (*refused.get(name, ()), trial.why_not)
        if timed:
            winner, why = _fastest(timed, [name for name, _ in rules], memory_limited, spec, machine)
        else:
            winner, why = next((rule for rule in rules if _free(rule[0], refused)), ("stock", "nothing else is left"))
            refused.pop(winner, None)  # stock, which could not be tried
    else:
        tried = trials.get(choice)
        if tried and tried.why_not and not tried.no_memory:
            refused[choice] = (*refused.get(choice, ()), tried.why_not)
        if not _free(choice, refused):
            raise BackendNotSupportedError(
                f"backend={label(choice)} cannot run {spec} on {machine}: {'; '.join(refused[choice])}. "
                f"These can: {', '.join(['auto', *(name for name in BACKENDS if name not in refused)])}."
            )
        winner, why = choice, "asked for"
    return Decision(spec, winner, why, refused, BACKENDS[winner].reproducible(spec, machine), trials, by_rules)


def _free(name: str, refused: dict[str, tuple[str, ...]]) -> bool:
    """Whether nothing speaks against a backend that is to run: its package is imported now, and not before."""
    if name not in refused and (problem := BACKENDS[name].importable()):
        refused[name] = (problem,)
    return name not in refused


def _fastest(
    timed: Mapping[str, Trial], rules: list[str], memory_limited: bool, spec: AttentionSpec, machine: Machine
) -> tuple[str, str]:
    """The fastest backend and why; of those within 3 %, the reproducible one, then the one with less memory.

    On a CPU, whose clock other processes disturb, the choice of the rules stands unless another is faster beyond doubt.
    If `memory_limited`, no backend may exceed the memory of the first timed one of the rules, or, where none was, the
    least that one needs.
    """
    by_rules = rules[0]
    if memory_limited:
        needs = {name: trial.extra_bytes or 0 for name, trial in timed.items()}
        limit = next((needs[name] for name in rules if name in needs), min(needs.values()))
        timed = {name: trial for name, trial in timed.items() if needs[name] <= limit}
    ms = {name: trial.ms or 0.0 for name, trial in timed.items()}
    best = min(ms, key=lambda name: ms[name])
    low = {name: trial.ms_low or ms[name] for name, trial in timed.items()}
    if machine.kind == "cpu" and best != by_rules and by_rules in timed and low[by_rules] <= (1 + TIE) * low[best]:
        return by_rules, f"by the rules, as {best} was not faster beyond the noise"
    tied = [name for name in ms if ms[name] <= (1 + TIE) * ms[best]]
    same_bits = {name: BACKENDS[name].reproducible(spec, machine) for name in ms}
    winner = min(tied, key=lambda name: (not same_bits[name], timed[name].extra_bytes or 0, ms[name]))
    if winner == best:
        return winner, "the fastest measured"
    kept = "gives the same bits every time" if same_bits[winner] and not same_bits[best] else "takes less memory"
    return winner, f"within {TIE:.0%} of {best}, and {kept}"
