"""The plan of a run: which backend every attention layer will use, known before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from ..backends.registry import BACKENDS, is_approximate, label
from ..backends.spec import AttentionSpec, Window
from ..dispatch.decision import Decision
from ..dispatch.dispatcher import Dispatcher, Trials
from ..machine import PACKAGES, Machine
from ..patching.blocks import FlashBlock, block_spec
from ..patching.multihead import denoising_queries
from ..patching.patch import BLOCKS, layer_choices, layer_windows, targets
from ..patching.shapes import layer_inputs
from .inputs import RunInput


@dataclass(frozen=True)
class PlanRow:
    """What one layer runs in one mode.

    Attributes:
        layer: Name in the model, as patterns of `flash.layers` see it.
        block: Name of the stock class.
        mode: `train` or `val`.
        decision: The backend with everything that led to it.
        note: What a reader has to know about the shape of the images; the same in all rows of a mode.

    Examples:
        >>> row = plan(patch_model(YOLO("yolo12n.yaml"), autotune=False), imgsz=640, batch=2, device="cpu")[0]
        >>> row.layer, row.block, row.mode
        ('model.6.m.0.0.attn', 'AAttn', 'train')
    """

    layer: str
    block: str
    mode: str
    decision: Decision
    note: str = ""


def make_plan(
    model: nn.Module,
    dispatcher: Dispatcher,
    machine: Machine,
    run_inputs: Iterable[RunInput],
    measure: Callable[[list[AttentionSpec]], Trials] | None = None,
) -> list[PlanRow]:
    """Decide for every layer and mode.

    Args:
        model: Patched or stock.
        dispatcher: Has the settings and the backends that failed so far; learns the trials.
        machine: The device to plan for; without `measure` it need not be the one at hand.
        run_inputs: One for each mode.
        measure: Gives trials of specs, called with those of layers for which no backend was asked for, or one of a
            package, whose kernels change without us; if None, the rules decide.

    Returns:
        A row for each mode and layer, layers in the order of the model.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer, or was wrong or raised in its trial.
    """
    model = unwrap_model(model)
    blocks, choices = targets(model), layer_choices(model, dispatcher.config)
    windows = layer_windows(model, dispatcher.config, choices)
    problems: list[tuple[str, str, RunInput, AttentionSpec]] = []
    for run_input in run_inputs:
        extra = denoising_queries(model) if run_input.mode == "train" else {}
        shapes = layer_inputs(model, blocks, run_input.batch, run_input.height, run_input.width)
        for layer, (images, tokens, grid) in shapes.items():
            block = blocks[layer]
            cls = type(block) if isinstance(block, FlashBlock) else BLOCKS[type(block)]
            spec = block_spec(
                block,
                cls,
                images,
                tokens + extra.get(layer, 0),
                dtype=run_input.dtype,
                nhwc=run_input.nhwc,
                training=run_input.mode == "train",
                deterministic=run_input.deterministic,
                mask=layer in extra,
                window=Window(*grid, windows[layer]) if grid and layer in windows else None,
            )
            if spec is not None:
                problems.append((layer, cls._stock.__name__, run_input, spec))
    to_try = [spec for layer, *_, spec in problems if _is_tried(choices[layer])]
    if measure is not None and to_try:
        for layer, *_, spec in problems:
            if choices[layer] != "auto":
                dispatcher.select(spec, choices[layer], machine)  # what cannot run is told before seconds of measuring
        dispatcher.learn(measure(to_try), machine)
    return [
        PlanRow(layer, block_name, run_input.mode, dispatcher.select(spec, choices[layer], machine), run_input.note)
        for layer, block_name, run_input, spec in problems
    ]


def _is_tried(choice: str) -> bool:
    """Whether the limits do not tell all: `auto` needs times, and the kernels of a package change without us."""
    return choice == "auto" or (choice in PACKAGES and not BACKENDS[choice].by_name)


def describe(rows: list[PlanRow], machine: Machine) -> str:
    """The plan as a compact table: layers of one stage with equal spec and backend are one line."""
    folded = Counter(
        (
            row.mode,
            row.block,
            row.decision.spec.batch,
            row.decision.spec.num_heads,
            row.decision.spec.seq_len_q,
            label(row.decision.backend),
            row.decision.summary(),
            ".".join(row.layer.split(".")[:2]),  # model.6.m.0.0.attn -> model.6
        )
        for row in rows
    )
    wide = max(11, *(len(row.block) + 2 for row in rows)) if rows else 11
    named = max([16, *(len(label(row.decision.backend)) + 2 for row in rows)])
    lines = [
        f"yolo-flash: {len({row.layer for row in rows})} attention layers on {machine}",
        f"  {'mode':<6}{'layers':<16}{'block':<{wide}}{'groups':>7}{'heads':>7}{'tokens':>8}  {'backend':<{named}}why",
    ]
    for (mode, block, groups, heads, tokens, backend, why, stage), count in folded.items():
        layers = f"{count} in {stage}"
        lines.append(f"  {mode:<6}{layers:<16}{block:<{wide}}{groups:>7}{heads:>7}{tokens:>8}  {backend:<{named}}{why}")
    lines += [f"  {note}" for note in dict.fromkeys(row.note for row in rows) if note]
    if windows := sorted({row.decision.spec.window.size for row in rows if row.decision.spec.window}):
        sizes = ", ".join(f"{size} x {size}" for size in windows)
        lines.append(
            f"  approximate: a query sees the keys within {sizes} tokens around it, and no others; `yolo-flash verify` "
            f"says how far that is from exact attention"
        )
    if machine.flash_impl:
        lines.append(f"  sdpa_flash {machine.runs_flash}")
    if any(row.decision.spec.deterministic and not row.decision.reproducible for row in rows):
        lines.append(
            "  deterministic=True does not reach these backwards: losses may differ in the last bits from run to run. "
            "flash.deterministic=strict takes reproducible backends only."
        )
    return "\n".join(lines)


def plan_entry(row: PlanRow) -> dict[str, Any]:
    """A row of the plan as JSON: layer, block, mode, spec, backend, why, ms, error and the reasons of the refused.

    `approximate` is whether the backend computes something else than stock attention.

    `method` is how a backend was timed, `spread` how far its samples lie apart, relative to the median; `notes` has the
    backends whose time was scaled, and from what.
    """
    decision = row.decision
    timed = {name: trial for name, trial in decision.trials.items() if trial.ms is not None}
    return {
        "layer": row.layer,
        "block": row.block,
        "mode": row.mode,
        "spec": decision.spec.as_json(),
        "backend": decision.backend,
        "approximate": is_approximate(decision.backend),
        "why": decision.why,
        "ms": decision.ms,
        "method": {name: trial.method for name, trial in timed.items()},
        "spread": {name: round(trial.spread, 4) for name, trial in timed.items()},
        "notes": decision.notes,
        "error": decision.error,
        "refused": {name: list(reasons) for name, reasons in decision.refused.items()},
        "note": row.note,
    }
