"""Trials of earlier runs on disk: one small file for each spec, machine and version of the kernels.

The files lie in Ultralytics' own configuration folder. Each is written whole and swapped in, so that several processes
may read and write at once; what cannot be read, or was written for something else, is measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics.utils import LOGGER, NUM_THREADS, USER_CONFIG_DIR

from .backends import BACKENDS, AttentionSpec, short
from .files import write_file
from .machine import Machine
from .selector import Trial

Trials = dict[str, Trial]


def folder() -> Path:
    """Where the files lie; not made by asking."""
    return Path(USER_CONFIG_DIR) / "yolo-flash-trials"


def load(specs: Iterable[AttentionSpec], machine: Machine) -> dict[AttentionSpec, Trials]:
    """What earlier runs have measured; files that cannot be used are left out, with one warning for all."""
    found: dict[AttentionSpec, Trials] = {}
    spoilt: list[str] = []
    for spec in specs:
        try:
            key = _key(spec, machine)
            content = json.loads(_file(key).read_text(encoding="utf-8"))
            if content["key"] != key:
                raise ValueError("it was written for something else")
            found[spec] = {name: Trial(**values) for name, values in content["trials"].items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            spoilt.append(f"{folder()}: {type(error).__name__}: {error}")
    if spoilt:
        more = f" (and {len(spoilt) - 1} more)" if len(spoilt) > 1 else ""
        LOGGER.warning(f"yolo-flash: measuring again what cannot be read: {spoilt[0]}{more}")
    return found


def store(trials: Mapping[AttentionSpec, Mapping[str, Trial]], machine: Machine) -> None:
    """Keep trials for later runs, but those in which a fused backend had too little memory: there may be more of it."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        for spec, of_spec in trials.items():
            if any(trial.no_memory for name, trial in of_spec.items() if BACKENDS[name].fused):
                continue
            key = _key(spec, machine)
            content = {"key": key, "trials": {name: dataclasses.asdict(trial) for name, trial in of_spec.items()}}
            write_file(_file(key), json.dumps(content, indent=1).encode())
    except OSError as error:  # a read-only home; the run has its numbers all the same
        LOGGER.warning(f"yolo-flash: measurements are not kept for the next run: {error}")


def clear() -> int:
    """Delete the files of all machines and versions; their number."""
    files = [*folder().glob("*.json"), *folder().glob(".*.json.*")]
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


def _file(key: dict[str, Any]) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _key(spec: AttentionSpec, machine: Machine) -> dict[str, Any]:
    """All that a measurement depends on, as JSON gives it back."""
    facts = {name: value for name, value in dataclasses.asdict(machine).items() if name != "memory_gib"}
    key = {
        "spec": dataclasses.asdict(spec) | {"dtype": short(spec.dtype)},
        "machine": facts,
        "ultralytics": ultralytics.__version__,  # whose stock blocks are measured too
        "threads": NUM_THREADS if machine.kind == "cpu" else None,
        "code": _code(),
    }
    return dict(json.loads(json.dumps(key)))


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Fingerprint of the code that is measured and that measures: a changed kernel is another kernel."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in (
        "autotune.py",
        "trial_multihead.py",
        "measuring.py",
        "backends.py",
        "blocks.py",
        "multihead.py",
        "separate.py",
        "guard.py",
        "kernels/area.py",
        "kernels/area_triton.py",
    ):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:16]
