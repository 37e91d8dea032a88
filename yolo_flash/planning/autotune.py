"""Trials of backends in a real block, see `arms.py`: is each exact, how fast is it, how much memory does it take."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM

from ..backends.registry import BACKENDS, Backend
from ..backends.spec import AttentionSpec
from ..dispatch import trial_cache
from ..dispatch.decision import Trial
from ..kernels import area
from ..machine import Machine, detect
from ..utils.errors import first_line, is_out_of_memory
from ..utils.memory import extra_bytes, free_bytes, readable
from ..utils.numerics import Results, allowed_error
from ..utils.timing import sampler_of, wait
from .arms import Arm, arm_of, channels
from .probes import Probe, hard_probe, random_probe

_SCORES_TO_CHECK = 2**22  # exactness does not depend on the number of groups: as many as make this, one at least
_SECONDS = 1.0  # for the samples of one backend, of which there are two at least
_CPU_SECONDS, _CPU_REPEATS = 0.3, 60  # a clock among other processes needs more samples than a GPU: as many as fit
_NEW = Trial()


class DeadDeviceError(RuntimeError):
    """A kernel's fault makes every later call of CUDA in this process raise, whichever backend makes the call."""


# Known or new ---------------------------------------------------------------------------------------------------------
def measure(specs: Iterable[AttentionSpec], device: torch.device) -> dict[AttentionSpec, dict[str, Trial]]:
    """Trials of all backends that can run, from earlier runs where there are any. Logs the time it took; never raises.

    A backend that failed in an earlier run is tried again. When a kernel takes the device with it, nothing more is
    measured, and nothing of this round is kept for later runs.

    Args:
        specs: The problems; equal ones are measured once.
        device: A CUDA device or a CPU; other devices have nothing to choose from, and nothing is measured.

    Returns:
        Spec -> backend -> Trial; specs that could not be measured are left out.
    """
    if device.type not in ("cuda", "cpu"):
        return {}
    start = time.perf_counter()
    machine = detect(device)
    wanted = list(dict.fromkeys(specs))
    trials = trial_cache.load(wanted, machine)
    missing = {spec: _missing(spec, device, machine, trials.get(spec, {})) for spec in wanted}
    new = [spec for spec in wanted if missing[spec]]
    first = 0.0
    # The bar goes to standard output: JSON may be expected there, or the stream be closed.
    silent = len(new) < 2 or LOGGER.disabled or sys.stdout is None
    again = {name for spec in new if spec in trials for name in missing[spec]}
    if device.type == "cuda":
        with torch.cuda.device(device):
            area.compile_ahead(map(_area_problem, (spec for spec in new if "triton_area" in missing[spec])), device)
    for spec in TQDM(new, desc="yolo-flash: measuring attention", disable=silent, leave=False):
        try:
            trials[spec] = _complete(spec, device, machine, missing[spec], trials.get(spec, {}))
            first += sum(trials[spec][name].first_seconds for name in missing[spec])
        except DeadDeviceError as error:
            LOGGER.warning(f"yolo-flash: {spec}: no more measuring: {error}")
            break
        except Exception as error:
            LOGGER.warning(f"yolo-flash: {spec}: by the rules, for measuring failed: {first_line(error)}")
    else:  # a round that took the device along is not kept
        trial_cache.store({spec: trials[spec] for spec in new if spec in trials}, machine)
    if device.type == "cuda" and new:
        with contextlib.suppress(RuntimeError):  # of a dead device
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    if new:
        LOGGER.info(
            f"yolo-flash: measured {len(new)} attention problems in {seconds:.1f} s, {first:.1f} s of it first calls, "
            f"which compile; {len(wanted) - len(new)} were known"
            + (f"; {', '.join(sorted(again))} tried again, as it failed or varied before" if again else "")
        )
    elif wanted:
        LOGGER.info(f"yolo-flash: {len(wanted)} attention problems known from earlier, read in {seconds * 1e3:.0f} ms")
    return {spec: {**of_spec, **_not_importable(spec, machine, of_spec)} for spec, of_spec in trials.items()}


def _not_importable(spec: AttentionSpec, machine: Machine, known: Container[str]) -> dict[str, Trial]:
    """Of the backends without a trial, those whose package cannot be imported, which was tried when measuring."""
    others = [backend for backend in BACKENDS.values() if backend.name not in known and not backend.by_name]
    able = [backend for backend in others if not backend.not_supported_reasons(spec, machine)]
    return {backend.name: Trial(why_not=problem) for backend in able if (problem := backend.importable())}


def _area_problem(spec: AttentionSpec) -> area.Problem:
    return area.Problem(spec.seq_len_q, spec.head_dim, spec.head_dim_v, spec.dtype, spec.training)


def candidates(spec: AttentionSpec, machine: Machine, known: Container[str] = ()) -> list[str]:
    """The exact backends worth a trial: all that can run, but torch's unfused one only where nothing fused can.

    Packages are imported to find out whether they can run, but not those of `known` backends, which ran once: an import
    may take seconds, and another backend may be the fastest.
    """

    def reasons(backend: Backend) -> tuple[str, ...]:
        ask = backend.not_supported_reasons if backend.name in known else backend.reasons_here
        return ask(spec, machine)

    able = [name for name, b in BACKENDS.items() if not b.by_name and not reasons(b)]
    fused = any(BACKENDS[name].fused for name in able)
    return [name for name in able if name != "sdpa_math" or not fused]


def _missing(spec: AttentionSpec, device: torch.device, machine: Machine, known: Mapping[str, Trial]) -> list[str]:
    """The candidates without a trial, and those whose trial lacked memory that is free now."""
    names = candidates(spec, machine, known)
    lacking = [name for name, trial in known.items() if trial.no_memory]
    room = free_bytes(device) // (2 * len(names)) if lacking else 0
    fits = [name for name in lacking if _bytes_a_group(spec, name) * spec.area <= room]
    return [name for name in names if name not in known or name in fits]


def _complete(
    spec: AttentionSpec, device: torch.device, machine: Machine, names: list[str], known: Mapping[str, Trial]
) -> dict[str, Trial]:
    """Known trials and new ones of the missing backends; where their methods of timing differ, all are made anew."""
    trials = {**known, **judge(spec, device, names)}
    if known and len({trial.method for trial in trials.values() if trial.ms is not None}) > 1:
        return judge(spec, device, candidates(spec, machine))
    return {name: trials[name] for name in BACKENDS if name in trials}


# Judging --------------------------------------------------------------------------------------------------------------
def judge(spec: AttentionSpec, device: torch.device, names: Iterable[str], repeats: int = 5) -> dict[str, Trial]:
    """Run backends that can run a spec: first whether each is exact, then how fast it is and how much memory it takes.

    The random generator, flags of torch and the switches of its attention are left as found; of CUDA's allocator only
    the high-water mark changes. All backends together may use half of the memory that is free. Stock attention, whose
    score matrices may need more than its share, is then measured on fewer groups, and its time scaled.

    Returns:
        Backend -> Trial. A backend that raised, ran out of memory or is wrong has a reason instead of a time.

    Raises:
        torch.OutOfMemoryError: There is no memory for the reference in high precision.
        DeadDeviceError: The device answers no more.
    """
    trials: dict[str, Trial] = {}
    with _as_found(spec, device):
        exact = _check(spec, device, list(names), trials)
        _time(spec, device, exact, trials, repeats)
    return trials


def _check(spec: AttentionSpec, device: torch.device, names: list[str], trials: dict[str, Trial]) -> list[str]:
    """Hold every backend against float64 on a few groups, of random and of hard inputs; returns the exact ones."""
    cap = free_bytes(device) // 4
    fitting = cap // min(_bytes_a_group(spec, name) for name in names) // spec.area
    wanted = math.ceil(_SCORES_TO_CHECK * spec.batch / spec.scores / spec.area)
    groups = min(spec.batch, max(1, min(fitting, wanted)) * spec.area)
    arms = {name: arm_of(spec, name, device) for name in dict.fromkeys(["stock", *names])}  # stock is the yardstick
    stock = arms["stock"]
    for name in [name for name in arms if _bytes_a_group(spec, name) * groups > cap]:
        trials[name] = _too_large(spec, name, cap)
        del arms[name]
    exact = _hold(arms, trials, random_probe(stock, groups))
    hard = hard_probe(stock)
    if hard is not None and hard.groups <= fitting * spec.area:
        arms = {name: arm for name, arm in arms.items() if name in exact or (name == "stock" and name in trials)}
        arms = {name: arm for name, arm in arms.items() if _bytes_a_group(spec, name) * hard.groups <= cap}
        unheld = [name for name in exact if name not in arms]
        exact = [*_hold(arms, trials, hard), *unheld]
    if "stock" not in names:
        trials.pop("stock", None)
    return [name for name in names if name in exact]


def _hold(arms: Mapping[str, Arm], trials: dict[str, Trial], probe: Probe) -> list[str]:
    """Run arms on a probe, stock first; returns those as exact as the probe allows. The others get the reason."""
    errors: dict[str, dict[str, float]] = {}
    for name, arm in arms.items():
        start = time.perf_counter()
        try:
            results = arm.call(probe.given, probe.upstream)
            wait(arm.device)
            seconds = time.perf_counter() - start
            errors[name] = probe.errors(results)
        except Exception as error:  # a kernel raises whatever it likes
            trials[name] = _failed(name, error, arm.device, trials.get(name, _NEW))
            if name == "stock" and not trials[name].no_memory:  # without a yardstick no backend is better than another
                raise
            continue
        trials.setdefault(name, Trial(error=max(errors[name].values()), first_seconds=seconds))
    exact = []
    for name, found in errors.items():
        wrong = []
        for part, off in found.items():
            yardstick = errors["stock"][part] if "stock" in errors else math.inf
            if not math.isfinite(yardstick):  # stock could not run, or is wrong itself
                yardstick = probe.usual
            limit = allowed_error(yardstick, arms[name].spec.dtype) + probe.rounding
            if not off <= limit and name != "stock":  # NaN too
                wrong.append(f"{part} is off by {off:.2g}, {limit:.2g} is allowed")
        if wrong:
            trials[name] = replace(trials[name], why_not="wrong: " + "; ".join(wrong))
        else:
            exact.append(name)
    return exact


# Timing ---------------------------------------------------------------------------------------------------------------
def _time(spec: AttentionSpec, device: torch.device, names: list[str], trials: dict[str, Trial], repeats: int) -> None:
    """Time the exact backends in turns, each on as many groups as its memory allows, all by one method."""
    cap = free_bytes(device) // (2 * max(1, len(trials)))  # all keep their memory until all are timed
    calls: dict[str, Callable[[], Results]] = {}
    samplers: dict[str, tuple[Callable[[], float], str]] = {}
    scales: dict[str, float] = {}
    for name in names:
        groups = min(spec.batch, cap // _bytes_a_group(spec, name))
        if device.type == "cpu":  # many groups would show nothing more, and take minutes
            groups = min(groups, max(spec.area, _SCORES_TO_CHECK * spec.batch // spec.scores))
        groups = groups // spec.area * spec.area
        if not groups:
            trials[name] = _too_large(spec, name, cap, trials[name])
            continue
        try:
            arm = arm_of(spec, name, device)
            call = partial(arm.call, *arm.inputs(groups))
            call()
            extra = extra_bytes(call, device)
            samplers[name] = sampler_of(call, device)
        except Exception as error:
            trials[name] = _failed(name, error, device, trials[name])
            continue
        calls[name], scales[name] = call, spec.batch / groups
        trials[name] = replace(
            trials[name],
            extra_bytes=None if extra is None else round(extra * scales[name]),
            note=f"measured on {groups} of {spec.batch} groups" if groups < spec.batch else "",
        )
    if len({method for _, method in samplers.values()}) > 1:  # one backend cannot be captured
        samplers = {name: sampler_of(calls[name], device, graphs=False) for name in samplers}
    _sample(samplers, scales, device, trials, repeats)
    wide = {name: sampler for name, sampler in samplers.items() if trials[name].wide}
    _sample(wide, scales, device, trials, repeats)  # once more: what ran beside them may be over


def _sample(
    samplers: Mapping[str, tuple[Callable[[], float], str]],
    scales: Mapping[str, float],
    device: torch.device,
    trials: dict[str, Trial],
    repeats: int,
) -> None:
    """Sample each backend in turns, and put the median into its trial."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(_CPU_REPEATS if device.type == "cpu" else repeats):
        for name in list(samples):
            mine = samples[name]
            budget = _SECONDS if len(mine) < repeats else _CPU_SECONDS
            if len(mine) >= 2 and sum(mine) >= budget * 1e3:
                continue
            try:
                mine.append(samplers[name][0]())
            except Exception as error:  # late, but no reason to lose the others
                trials[name] = replace(_failed(name, error, device, trials[name]), ms=None, ms_low=None, ms_high=None)
                del samples[name]
    for name, mine in samples.items():
        ms = [value * scales[name] for value in mine]
        method = samplers[name][1]
        trials[name] = replace(trials[name], ms=statistics.median(ms), ms_low=min(ms), ms_high=max(ms), method=method)


def _failed(name: str, error: Exception, device: torch.device, trial: Trial) -> Trial:
    """The trial of a backend that raised.

    Raises:
        DeadDeviceError: The backend took the device with it.
    """
    reason = f"failed in its trial: {first_line(error)}"
    try:
        wait(device)
    except Exception as fault:
        raise DeadDeviceError(
            f"{name} {reason}, and the device answers no more in this process: {first_line(fault)}. "
            f"Nothing of this is remembered. A new process can run with flash.backend=stock, or flash.autotune=false."
        ) from error
    return replace(trial, why_not=reason, no_memory=is_out_of_memory(error))


def _too_large(spec: AttentionSpec, name: str, cap: int, trial: Trial = _NEW) -> Trial:
    """The trial of a backend that is not run, since the model beside it would lack the memory."""
    need = readable(_bytes_a_group(spec, name) * spec.area)
    reason = f"not measured: one image takes about {need}, a trial may take {readable(cap)}"
    return replace(trial, why_not=reason, no_memory=True)


def _bytes_a_group(spec: AttentionSpec, name: str) -> int:
    """An upper estimate of what a backend allocates for one group."""
    packed, out = channels(spec)
    linear = spec.seq_len_k * (packed + out) * spec.dtype.itemsize * (5 if spec.training else 3)
    if BACKENDS[name].fused:
        return linear
    return linear + spec.scores // spec.batch * (20 if spec.training else 12)


@contextlib.contextmanager
def _as_found(spec: AttentionSpec, device: torch.device) -> Iterator[None]:
    """Set the device, threads as Ultralytics does and modes of torch as in the spec; restore them afterwards."""
    threads = torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    on_gpu = device.type == "cuda"
    place = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
    plain = torch.autocast(device.type, enabled=False)  # not that of a prediction under way; arms enter the spec's
    with warnings.catch_warnings(), place, torch.inference_mode(False), torch.no_grad(), plain:
        warnings.simplefilter("ignore")  # about what is not deterministic, which is the run's concern
        torch.use_deterministic_algorithms(spec.deterministic, warn_only=True)
        if not on_gpu:
            torch.set_num_threads(NUM_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
