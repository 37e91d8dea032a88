"""Trials of earlier runs on disk: one small file for each spec, machine and version of the code.

The files lie in Ultralytics' own configuration folder. Writes are atomic, so that several processes may read and write
at once. Only what went well is kept. A file that cannot be read, or has impossible values, is ignored, and written anew
when its spec is measured again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import ultralytics
from ultralytics.utils import LOGGER, NUM_THREADS, USER_CONFIG_DIR

from ..backends.registry import BACKENDS
from ..backends.spec import AttentionSpec, Layout
from ..machine import Machine
from ..utils.files import write_file
from ..utils.numerics import arithmetic
from .decision import Trial

_MOST_KNOWN = 512  # files that `known` looks at, the newest first
_METHODS = ("graph", "events", "clock", "")
_NOT_USABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


def folder() -> Path:
    """Where the files lie; may not exist."""
    return Path(USER_CONFIG_DIR) / "yolo-flash-trials"


# Read -----------------------------------------------------------------------------------------------------------------
def load(specs: Iterable[AttentionSpec], machine: Machine) -> dict[AttentionSpec, dict[str, Trial]]:
    """What earlier runs have measured; files that cannot be used are left out, with one warning for all.

    Backends are missing that failed, or were measured badly, in those runs.
    """
    found: dict[AttentionSpec, dict[str, Trial]] = {}
    spoilt: list[str] = []
    for spec in specs:
        key = _key(spec, machine)
        try:
            found[spec] = _trials(json.loads(_file(key).read_text(encoding="utf-8")), key)
        except FileNotFoundError:
            continue
        except _NOT_USABLE as error:
            spoilt.append(f"{_file(key)}: {type(error).__name__}: {error}")
    _tell(spoilt, "measuring again what cannot be read")
    return found


def known(machine: Machine) -> dict[AttentionSpec, dict[str, Trial]]:
    """All that earlier runs have measured on a machine, with these versions and settings, among the newest files."""
    facts = _facts(machine)
    found: dict[AttentionSpec, dict[str, Trial]] = {}
    spoilt: list[str] = []
    for file in _newest():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            key = content["key"]
            if {name: value for name, value in key.items() if name != "spec"} != facts:
                continue
            spec = _spec(key["spec"])
            found.setdefault(spec, _trials(content, _key(spec, machine)))
        except FileNotFoundError:  # deleted since
            continue
        except _NOT_USABLE as error:
            spoilt.append(f"{file}: {type(error).__name__}: {error}")
    _tell(spoilt, "ignoring measurements that cannot be read")
    return found


def _newest() -> list[Path]:
    dated: list[tuple[float, str, Path]] = []
    with contextlib.suppress(OSError):
        for file in folder().glob("*.json"):
            with contextlib.suppress(OSError):  # deleted since
                dated.append((file.stat().st_mtime, file.name, file))
    return [file for *_, file in sorted(dated, reverse=True)[:_MOST_KNOWN]]


def _tell(spoilt: list[str], what: str) -> None:
    if spoilt:
        more = f" (and {len(spoilt) - 1} more)" if len(spoilt) > 1 else ""
        LOGGER.warning(f"yolo-flash: {what}: {spoilt[0]}{more}")


# What a file may say --------------------------------------------------------------------------------------------------
def _trials(content: Any, key: dict[str, Any]) -> dict[str, Trial]:
    """The trials in the content of a file.

    Raises:
        ValueError: The file is of something else, or its content can be of no trial; other errors of Python likewise.
    """
    if content["key"] != key:
        raise ValueError("it was written for something else")
    trials = {_checked("backend", name, name in BACKENDS): _trial(values) for name, values in content["trials"].items()}
    if not trials:
        raise ValueError("it has no trial")
    return trials


def _trial(values: Any) -> Trial:
    """A trial of which every field is of its type and within its range."""
    checks: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("ms", "ms_low", "ms_high"), lambda value: value is None or (_number(value) and value > 0)),
        "error": lambda value: value is None or (_number(value) and value >= 0),
        "extra_bytes": lambda value: value is None or (type(value) is int and value >= 0),
        "why_not": lambda value: type(value) is str,
        "note": lambda value: type(value) is str,
        "method": lambda value: value in _METHODS,
        "first_seconds": lambda value: _number(value) and value >= 0,
        "no_memory": lambda value: type(value) is bool,
    }
    if set(values) != set(checks):
        raise ValueError(f"a trial has the fields {', '.join(map(str, values))}, not {', '.join(checks)}")
    trial = Trial(**{name: _checked(name, values[name], check(values[name])) for name, check in checks.items()})
    if (trial.ms is None) != bool(trial.why_not):
        raise ValueError(f"a trial has ms={trial.ms} and why_not={trial.why_not!r}: one of the two has to be")
    if trial.ms is not None and not (trial.ms_low or trial.ms) <= trial.ms <= (trial.ms_high or trial.ms):
        raise ValueError(f"ms={trial.ms} does not lie within {trial.ms_low} and {trial.ms_high}")
    return trial


def _spec(values: Any) -> AttentionSpec:
    """A spec of which every field is of its type and within its range."""
    flags = ("mask", "training", "deterministic")
    fields = AttentionSpec._fields
    if set(values) != set(fields):
        raise ValueError(f"a spec has the fields {', '.join(map(str, values))}, not {', '.join(fields)}")
    dtype = getattr(torch, values["dtype"])
    for name, value in values.items():
        if name == "dtype":
            _checked(name, value, isinstance(dtype, torch.dtype))
        elif name == "layout":
            _checked(name, value, value in get_args(Layout))
        elif name == "window":
            _checked(name, value, value is None)  # what is approximate is never measured for a choice
        elif name in flags:
            _checked(name, value, type(value) is bool)
        else:
            _checked(name, value, type(value) is int and 0 < value < 2**31)
    return AttentionSpec(**{**values, "dtype": dtype})


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _checked(name: str, value: Any, good: bool) -> Any:
    if not good:
        raise ValueError(f"{name}={value!r} cannot be")
    return value


# Write ----------------------------------------------------------------------------------------------------------------
def store(trials: Mapping[AttentionSpec, Mapping[str, Trial]], machine: Machine) -> None:
    """Keep for later runs what went well, see `worth_keeping`."""
    try:
        for spec, of_spec in trials.items():
            good = {name: dataclasses.asdict(trial) for name, trial in of_spec.items() if worth_keeping(name, trial)}
            if not good:
                continue
            folder().mkdir(parents=True, exist_ok=True)
            key = _key(spec, machine)
            write_file(_file(key), json.dumps({"key": key, "trials": good}, indent=1).encode())
    except OSError as error:  # a read-only home; the run has its numbers all the same
        LOGGER.warning(f"yolo-flash: measurements are not kept for the next run: {error}")


def worth_keeping(name: str, trial: Trial) -> bool:
    """Whether later runs may go by a trial: its samples agree.

    A backend that raised, had too little memory or was wrong is tried again by the next run. Most causes pass (another
    process on the card, a full disk below a compiler), and a stored verdict would keep the backend out for ever. A
    backend that is always wrong is refused again, at the cost of a second.

    Unfused attention that does not fit is the exception: every start would try it in vain. It is measured as soon as
    there is memory for it.
    """
    if trial.why_not:
        return trial.no_memory and not BACKENDS[name].fused
    return trial.ms is not None and not trial.wide


def clear() -> int:
    """Delete the files of all machines and versions; their number."""
    files = [*folder().glob("*.json"), *folder().glob(".*.json.*")]
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


# Keys -----------------------------------------------------------------------------------------------------------------
def _file(key: dict[str, Any]) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _key(spec: AttentionSpec, machine: Machine) -> dict[str, Any]:
    return {"spec": spec.as_json(), **_facts(machine)}


def _facts(machine: Machine) -> dict[str, Any]:
    """What a measurement depends on besides the spec, as JSON gives it back."""
    facts = {
        "machine": {name: value for name, value in dataclasses.asdict(machine).items() if name != "memory_gib"},
        "ultralytics": ultralytics.__version__,  # whose stock blocks are measured too
        "threads": NUM_THREADS if machine.kind == "cpu" else None,
        "arithmetic": dict(arithmetic()),
        "share": os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),  # of the card, that NVIDIA's MPS leaves us
        "code": _code(),
    }
    return dict(json.loads(json.dumps(facts)))


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Fingerprint of the package: a changed kernel is another kernel.

    It covers all source files, so that none is forgotten. The price is that every update measures again.
    """
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
