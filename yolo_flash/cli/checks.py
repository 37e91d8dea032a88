"""`yolo-flash checks`: which backends a device can run, and why not the others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import collect_system_info

from .._version import __version__
from ..backends.registry import BACKENDS, Backend, is_approximate
from ..backends.spec import AttentionSpec, Layout, Window
from ..config import FlashConfig
from ..dispatch.decision import select
from ..machine import Machine, cudnn_release, detect, resolve_device
from ..utils.log import log_disabled


def checks(device: str | int | None = None, as_json: bool = False) -> dict[str, Any]:
    """Log the device, versions and every backend with `ready` or its reasons, then Ultralytics' own checks.

    Args:
        device: As in Ultralytics: `cpu`, `0`, `mps`; the GPU if there is one.
        as_json: Print JSON on standard output, and nothing else.

    Returns:
        The same facts, ready for JSON.

    Raises:
        ValueError: The device does not exist.

    Examples:
        >>> facts = checks("cpu")
        >>> facts["backends"]["YOLO12, area attention"]["sdpa_flash"]
        'ready'
    """
    with log_disabled(as_json):
        machine = detect(resolve_device(device))
        facts: dict[str, Any] = {
            "yolo_flash": __version__,
            "device": str(machine),
            "machine": dataclasses.asdict(machine),
            "backends": {name: _verdicts(spec, machine) for name, spec in typical_specs(machine).items()},
        }
        LOGGER.info(_text(facts, machine))
        with _no_notebook():
            facts["ultralytics"] = collect_system_info()
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    return facts


@contextlib.contextmanager
def _no_notebook() -> Iterator[None]:
    """Keep Ultralytics from IPython, where there is one: it clears the cell, or a terminal's line in front of JSON."""
    modules: dict[str, Any] = sys.modules
    kept = {name: module for name, module in modules.items() if name == "IPython"}
    modules["IPython"] = None  # whose import then fails
    try:
        yield
    finally:
        del modules["IPython"]
        modules.update(kept)


def typical_specs(machine: Machine) -> dict[str, AttentionSpec]:
    """Layers of YOLO12n, YOLO26n and RT-DETR's decoder, as they train at 640 with batch 16 on such a machine."""
    on_gpu = machine.kind in ("cuda", "rocm")
    dtype = torch.float16 if on_gpu else torch.float32
    layout: Layout = "nhwc" if on_gpu else "nchw"
    return {  # batch, heads, tokens of queries and of keys, channels of a query and of a value
        "YOLO12, area attention": AttentionSpec(64, 2, 400, 400, 32, 32, dtype, layout),
        "YOLO26, PSA": AttentionSpec(16, 2, 400, 400, 32, 64, dtype, layout),
        # 300 queries, and 200 to denoise
        "RT-DETR, decoder": AttentionSpec(16, 8, 500, 500, 32, 32, dtype, "separate", mask=True),
    }


def _verdicts(spec: AttentionSpec, machine: Machine) -> dict[str, Any]:
    decision = select(spec, machine)
    return {
        "spec": str(spec),
        "auto": decision.backend,
        "why": decision.why,
        **{name: list(_reasons(backend, spec, machine)) or "ready" for name, backend in BACKENDS.items()},
    }


def _reasons(backend: Backend, spec: AttentionSpec, machine: Machine) -> tuple[str, ...]:
    """Why a backend cannot run, its package included; of an approximate one, why it could not if it were asked for."""
    if not backend.exact:
        spec = spec._replace(window=Window(20, 20, FlashConfig().window_tokens(32)))
    return backend.reasons_here(spec, machine)


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
            text = "ready" if verdicts[backend] == "ready" else "; ".join(verdicts[backend])
            if by_name := BACKENDS[backend].by_name:
                plain = text == "ready" and is_approximate(backend) and machine.kind == "cpu"
                text = f"{by_name}, by name only: {text}{', in plain operators that are slow' if plain else ''}"
            if backend == "sdpa_flash" and machine.flash_impl:
                text += f"; {machine.runs_flash}"
            chosen = f"  <- auto: {verdicts['why']}" if backend == verdicts["auto"] else ""
            lines.append(f"  {backend:<15}{text}{chosen}")
    return "\n".join(lines)
