"""`yolo-flash checks`: what this device can run, and why not the rest, for people and for bug reports."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import collect_system_info

from ._version import __version__
from .backends import BACKENDS, AttentionSpec
from .machine import Machine, cudnn_release, detect, resolve_device
from .selector import select


def checks(device: str | int | None = None, as_json: bool = False) -> dict[str, Any]:
    """Log the device, versions and every backend with `ready` or its reasons, then Ultralytics' own checks.

    Args:
        device: As in Ultralytics: `cpu`, `0`, `mps`; the GPU if there is one.
        as_json: Print JSON on standard output, and nothing else.

    Returns:
        The same facts, ready for JSON.

    Raises:
        ValueError: The device does not exist.
    """
    disabled, threads = LOGGER.disabled, torch.get_num_threads()
    LOGGER.disabled = disabled or as_json  # Ultralytics logs to standard output
    try:
        machine = detect(resolve_device(device))
        facts: dict[str, Any] = {
            "yolo_flash": __version__,
            "device": str(machine),
            "machine": dataclasses.asdict(machine),
            "backends": {name: _verdicts(spec, machine) for name, spec in typical_specs(machine).items()},
        }
        LOGGER.info(_text(facts, machine))
        facts["ultralytics"] = collect_system_info()
    finally:
        LOGGER.disabled = disabled
        torch.set_num_threads(threads)  # select_device, which Ultralytics' checks call too, changes it for the CPU
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    return facts


def typical_specs(machine: Machine) -> dict[str, AttentionSpec]:
    """A layer of YOLO12n and one of YOLO26n, as they train at 640 with batch 16 on such a machine."""
    on_gpu = machine.kind in ("cuda", "rocm")
    common: dict[str, Any] = {
        "num_heads": 2,
        "seq_len_q": 400,
        "seq_len_k": 400,
        "head_dim": 32,
        "dtype": torch.float16 if on_gpu else torch.float32,
        "layout": "nhwc" if on_gpu else "nchw",
    }
    return {
        "YOLO12, area attention": AttentionSpec(batch=64, head_dim_v=32, **common),
        "YOLO26, PSA": AttentionSpec(batch=16, head_dim_v=64, **common),
    }


def _verdicts(spec: AttentionSpec, machine: Machine) -> dict[str, Any]:
    decision = select(spec, machine)
    return {
        "spec": str(spec),
        "auto": decision.backend,
        "why": decision.why,
        **{name: list(decision.refused.get(name, ())) or "ready" for name in BACKENDS},
    }


def _text(facts: dict[str, Any], machine: Machine) -> str:
    versions = [f"torch {machine.torch}", machine.system]
    if machine.toolkit:
        versions.insert(1, f"{'ROCm' if machine.kind == 'rocm' else 'CUDA'} {machine.toolkit}")
    if machine.cudnn:
        versions.insert(2, f"cuDNN {cudnn_release(machine.cudnn)}")
    versions += [f"{name} {result}" for name, result in machine.packages.items()]
    memory = f", {machine.memory_gib:.0f} GiB" if machine.memory_gib else ""
    lines = [f"yolo-flash {facts['yolo_flash']}", f"{machine}{memory}", ", ".join(versions)]
    for name, verdicts in facts["backends"].items():
        lines += ["", f"{name}: {verdicts['spec']}"]
        for backend in BACKENDS:
            verdict = verdicts[backend]
            text = verdict if isinstance(verdict, str) else "; ".join(verdict)
            chosen = f"  <- auto: {verdicts['why']}" if backend == verdicts["auto"] else ""
            lines.append(f"  {backend:<15}{text}{chosen}")
    return "\n".join(lines)
