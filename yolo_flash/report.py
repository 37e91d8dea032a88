"""`yolo-flash checks` and `yolo-flash plan`: what a device can run and a model would run, and why not the rest."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import collect_system_info

from ._version import __version__
from .assets.models import open_model
from .backends.registry import BACKENDS
from .backends.spec import AttentionSpec
from .bench.largest_batch import largest_batch
from .config import FlashConfig
from .dispatch.decision import select
from .engine.model import patch_from_sources, plan
from .machine import Machine, cudnn_release, detect, resolve_device
from .patching.patch import targets
from .planning.memory import attention_memory, score_bytes
from .planning.plan import PlanRow, describe, plan_entry, precisions, rounded_size
from .utils.log import quiet
from .utils.memory import readable


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
    with quiet(as_json):
        machine = detect(resolve_device(device))
        facts: dict[str, Any] = {
            "yolo_flash": __version__,
            "device": str(machine),
            "machine": dataclasses.asdict(machine),
            "backends": {name: _verdicts(spec, machine) for name, spec in typical_specs(machine).items()},
        }
        LOGGER.info(_text(facts, machine))
        facts["ultralytics"] = collect_system_info()
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    return facts


def typical_specs(machine: Machine) -> dict[str, AttentionSpec]:
    """Layers of YOLO12n, YOLO26n and RT-DETR's decoder, as they train at 640 with batch 16 on such a machine."""
    on_gpu = machine.kind in ("cuda", "rocm")
    common: dict[str, Any] = {
        "num_heads": 2,
        "seq_len_q": 400,
        "seq_len_k": 400,
        "head_dim": 32,
        "dtype": torch.float16 if on_gpu else torch.float32,
        "layout": "nhwc" if on_gpu else "nchw",
    }
    tokens = {"seq_len_q": 500, "seq_len_k": 500}  # 300 queries, and 200 to denoise
    return {
        "YOLO12, area attention": AttentionSpec(batch=64, head_dim_v=32, **common),
        "YOLO26, PSA": AttentionSpec(batch=16, head_dim_v=64, **common),
        "RT-DETR, decoder": AttentionSpec(
            batch=16, head_dim_v=32, mask=True, **{**common, "num_heads": 8, **tokens, "layout": "separate"}
        ),
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


def show_plan(
    model: str,
    sources: dict[str, Any],
    modes: tuple[str, ...] = ("train", "val"),
    as_json: bool = False,
    fit: bool = False,
    **run: Any,
) -> dict[str, Any]:
    """Log what each attention layer of a model would run, and how much memory that takes, without training it.

    Args:
        model: Checkpoint or YAML, as in Ultralytics.
        sources: Settings, as keyword arguments of `FlashConfig.resolve`.
        modes: Of `train` and `val`.
        as_json: Print JSON on standard output, and nothing else.
        fit: Measure training steps at two batches, stock and with `auto` by its rules, and say what would fill the GPU.
        **run: `imgsz`, `batch`, `device` and `amp` of the run, as in `plan`.

    Returns:
        The rows as in flash.jsonl; the bytes that attention keeps for the backward of a step (`memory_bytes`) and the
        score matrices among them (`score_bytes`), in stock form and as planned; the largest batches (`fit`), of eager
        steps and, about, of `graphs`.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        ValueError: The plugin is off, the model has nothing to patch, there is no such device or precision, or the
            device is no GPU and `fit` was asked for.
    """
    with quiet(as_json):
        if not FlashConfig.resolve(**sources).enabled:
            raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to plan.")
        device = resolve_device(run.get("device"))
        machine = detect(device)
        if fit and device.type != "cuda":
            raise ValueError(f"--fit measures on a GPU, the device is {machine}.")
        precisions(run.get("amp", True), device.type == "cuda")  # a mistake is told before the model is built
        opened = open_model(model)
        if not targets(opened.model):
            raise ValueError(
                f"{model} has no attention layer that the plugin knows (of YOLO10, 11, 12, 26 or RT-DETR): "
                f"nothing to plan."
            )
        run["imgsz"] = rounded_size(opened.model, run.get("imgsz", 640))
        rows = [row for row in plan(patch_from_sources(opened, sources), **run) if row.mode in modes]
        stock, planned = _kept_scores(rows)
        memory = attention_memory(rows)
        LOGGER.info(describe(rows, machine))
        LOGGER.info(_others(rows))
        if "train" in modes:
            saved = memory.stock - memory.planned
            LOGGER.info(
                f"attention keeps for the backward of a step: stock {readable(memory.stock)}, planned "
                f"{readable(memory.planned)}: {readable(abs(saved))} {'less' if saved >= 0 else 'more'} "
                f"(score matrices: {readable(stock)}, {readable(planned)})"
            )
        batches = {}
        if fit:
            amp = run.get("amp", True)
            batches = {arm: largest_batch(model, run["imgsz"], arm, device, amp) for arm in ("unpatched", "auto")}
            memory_gib = f"{machine.memory_gib or 0:.0f} GiB"
            LOGGER.info(
                f"largest training batch at {run['imgsz']} pixels in {memory_gib} with flash.graphs=off: stock "
                f"{batches['unpatched']}, with yolo-flash {batches['auto']}. CUDA graphs hold about as much again: "
                f"with flash.graphs=auto, steps of up to about {batches['auto'] // 2} images can run from them, and "
                f"larger ones run eager."
            )
    facts = {
        "yolo_flash": __version__,
        "model": model,
        "imgsz": run["imgsz"],
        "machine": dataclasses.asdict(machine),
        "plan": [plan_entry(row) for row in rows],
        "score_bytes": {"stock": stock, "planned": planned},
        "memory_bytes": dataclasses.asdict(memory),
        **({"fit": batches | {"graphs": batches["auto"] // 2}} if fit else {}),
    }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    return facts


def _kept_scores(rows: list[PlanRow]) -> tuple[int, int]:
    """Bytes of score matrices kept for the backward: if all layers were stock, and as planned."""
    training = [row.decision for row in rows if row.mode == "train"]
    unfused = [decision.spec for decision in training if not BACKENDS[decision.backend].fused]
    return score_bytes(decision.spec for decision in training), score_bytes(unfused)


def _fate(name: str, row: PlanRow) -> str:
    """Milliseconds of a backend that lost, or why it was not taken."""
    if name in row.decision.refused:
        return "; ".join(row.decision.refused[name])
    if name not in row.decision.ms:
        return "ready"
    note = row.decision.notes.get(name)  # of a time that was scaled
    return f"{row.decision.ms[name]:.3g} ms" + (f" ({note})" if note else "")


def _others(rows: list[PlanRow]) -> str:
    """What became of the other backends, layers with the same fate in one block."""
    fates: dict[tuple[str, ...], list[PlanRow]] = {}
    for row in rows:
        lines = tuple(f"    {name:<16}{_fate(name, row)}" for name in BACKENDS if name != row.decision.backend)
        fates.setdefault((f"{row.decision.spec}: {row.decision.backend}", *lines), []).append(row)
    return "\n".join(line for (head, *lines) in fates for line in (f"  {head}; the others", *lines))
