"""`yolo-flash plan`: what a run would use, without running it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ultralytics.utils import LOGGER

from .._version import __version__
from ..assets.models import open_model
from ..backends.registry import BACKENDS, label
from ..bench.largest_batch import largest_batch
from ..config import FlashConfig
from ..engine.model import patch_from_sources, plan
from ..machine import detect, resolve_device
from ..patching.patch import targets, without_known_blocks
from ..planning.inputs import precisions, rounded_size
from ..planning.memory import attention_memory, score_bytes
from ..planning.plan import PlanRow, describe, plan_entry
from ..utils.log import log_disabled
from ..utils.memory import readable


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
    with log_disabled(as_json):
        if not FlashConfig.resolve(**sources).enabled:
            raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to plan.")
        device = resolve_device(run.get("device"))
        machine = detect(device)
        if fit and device.type != "cuda":
            raise ValueError(f"--fit measures on a GPU, the device is {machine}.")
        amp = run.get("amp", True)
        precisions(amp, device.type == "cuda")  # a mistake is told before the model is built
        opened = open_model(model)
        if not targets(opened.model):
            raise ValueError(f"{without_known_blocks(model)}: nothing to plan.")
        run["imgsz"] = rounded_size(opened.model, run.get("imgsz", 640))
        rows = [row for row in plan(patch_from_sources(opened, sources), **run) if row.mode in modes]
        stock, planned = _kept_scores(rows)
        memory = attention_memory(rows)
        LOGGER.info(describe(rows, machine))
        LOGGER.info(_fates(rows))
        if "train" in modes:
            saved = memory.stock - memory.planned
            LOGGER.info(
                f"attention keeps for the backward of a step: stock {readable(memory.stock)}, planned "
                f"{readable(memory.planned)}: {readable(abs(saved))} {'less' if saved >= 0 else 'more'} "
                f"(score matrices: {readable(stock)}, {readable(planned)})"
            )
        batches = {}
        if fit:
            batches = {arm: largest_batch(model, run["imgsz"], arm, device, amp) for arm in ("unpatched", "auto")}
            LOGGER.info(
                f"largest training batch at {run['imgsz']} pixels in {machine.memory_gib or 0:.0f} GiB with "
                f"flash.graphs=off: stock "
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


def _fates(rows: list[PlanRow]) -> str:
    """What became of the other backends, layers with the same fate in one block."""
    fates: dict[tuple[str, ...], list[PlanRow]] = {}
    for row in rows:
        lines = tuple(f"    {name:<16}{row.decision.fate(name)}" for name in BACKENDS if name != row.decision.backend)
        fates.setdefault((f"{row.decision.spec}: {label(row.decision.backend)}", *lines), []).append(row)
    return "\n".join(line for (head, *lines) in fates for line in (f"  {head}; the others", *lines))
