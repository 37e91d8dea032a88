"""The plan of a run: which backend every attention layer will use, known before the first step."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import RTDETRDetectionModel, guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import unwrap_model

from ..backends.spec import AttentionSpec
from ..dispatch.decision import Decision, Trial
from ..dispatch.dispatcher import Dispatcher
from ..machine import Machine
from ..patching.blocks import FlashBlock, block_spec
from ..patching.multihead import denoising_queries, images_and_tokens
from ..patching.patch import BLOCKS, layer_choices, targets, unpatch_modules


@dataclass(frozen=True)
class PlanRow:
    """What one layer does in one mode.

    Attributes:
        layer: Name in the model, as patterns of `flash.layers` see it.
        block: Name of the stock class.
        mode: `train` or `val`.
        decision: The backend with everything that led to it.
        note: What has to be known about the shape of the images; the same in all rows of a mode.
    """

    layer: str
    block: str
    mode: str
    decision: Decision
    note: str = ""


@dataclass(frozen=True)
class RunInput:
    """The input of a mode: enough to know every layer's spec.

    Attributes:
        mode: `train` or `val`.
        batch: Images.
        height: Pixels.
        width: Pixels.
        dtype: That convolutions compute in.
        nhwc: Whether the model runs in channels_last.
        deterministic: Whether torch asks for deterministic algorithms.
        note: For the reader of the plan, if the shape is not the only one or not known.
    """

    mode: str
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    nhwc: bool
    deterministic: bool = False
    note: str = ""


def precisions(amp: bool | str, on_gpu: bool) -> tuple[torch.dtype, torch.dtype]:
    """What Ultralytics computes in for a value of its `amp=`: in training, and in the validation of its EMA.

    Raises:
        ValueError: It takes no such value.
    """
    asked = amp.lower() if isinstance(amp, str) else amp
    if not isinstance(amp, bool) and asked not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"amp must be True, False, fp16, bf16 or fp32, found {amp!r}.")
    if not on_gpu or asked in (False, "fp32"):
        return torch.float32, torch.float32
    return torch.bfloat16 if asked == "bf16" else torch.float16, torch.float16


def largest_stride(model: Any) -> int:
    """What the sides of images are rounded up to, as Ultralytics' trainer has it."""
    strides = getattr(model, "stride", None)
    return max(int(strides.max()) if isinstance(strides, torch.Tensor) else 32, 32)


def rounded_size(model: Any, imgsz: int) -> int:
    """The size of the images of a run that was asked for `imgsz`; Ultralytics says so where it is another."""
    stride = largest_stride(model)
    return int(check_imgsz(imgsz, stride=stride, floor=stride, max_dim=1))


def assumed_inputs(model: Any, imgsz: int, batch: int, amp: bool | str, on_gpu: bool) -> list[RunInput]:
    """The inputs of a run whose data are not known: square pictures, and as many as a batch of validation holds.

    Ultralytics validates without resizing to a square, most tasks with half a stride of padding around the pictures,
    and with twice the training batch.

    Args:
        model: The network, for its task and strides.
        imgsz: Side of the training images, a multiple of the stride.
        batch: Training images a step.
        amp: As in Ultralytics.
        on_gpu: Whether it runs in channels_last and with AMP.
    """
    train_dtype, val_dtype = precisions(amp, on_gpu)
    task = getattr(model, "task", None) or guess_model_task(model)
    stride = largest_stride(model)
    padded = task in ("detect", "segment", "pose", "obb") and not isinstance(model, RTDETRDetectionModel)
    side = (math.ceil(imgsz / stride + 0.5) if padded else math.ceil(imgsz / stride)) * stride
    images = batch if task in ("obb", "semantic", "depth") else 2 * batch
    note = f"val: {images} square pictures, padded to {side} x {side}; a run plans with the shapes of its own data"
    deterministic = bool(DEFAULT_CFG_DICT["deterministic"])
    return [
        RunInput("train", batch, imgsz, imgsz, train_dtype, on_gpu, deterministic),
        RunInput("val", images, side, side, val_dtype, on_gpu, note=note if padded else ""),
    ]


class _AllSeenError(Exception):
    """Every attention layer has reported its input: the rest of the forward is not needed."""


def layer_inputs(model: nn.Module, batch: int, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Run a copy of the model on torch's meta device and note what reaches the attention layers.

    No memory is touched beyond the modules' Python objects, no BatchNorm statistic and no random number.

    Args:
        model: A model that takes `[batch, channels, height, width]` images.
        batch: Images.
        height: Pixels.
        width: Pixels.

    Returns:
        Layer name -> (images, tokens), for layers that a plain forward reaches: without labels, and so without the
        denoising queries of RT-DETR.
    """
    model = unwrap_model(model)
    names = list(targets(model))
    if not names:
        return {}
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*model.parameters(), *model.buffers())
    }
    if (criterion := getattr(model, "criterion", None)) is not None:
        memo[id(criterion)] = None  # holds tensors of the real device and refers back to the model
    ghost: Any = copy.deepcopy(model, memo)
    unpatch_modules(ghost)
    seen: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = images_and_tokens(module, args[0])
            if len(seen) == len(names):
                raise _AllSeenError

        return hook

    for name, block in targets(ghost).items():
        block.register_forward_pre_hook(note(name))
    config: Any = getattr(model, "yaml", None)
    channels = config.get("channels", 3) if isinstance(config, dict) else 3
    try:
        with torch.no_grad():
            ghost.train()(torch.empty(batch, channels, height, width, device="meta"))
    except _AllSeenError:
        pass
    return seen


def make_plan(
    model: nn.Module,
    dispatcher: Dispatcher,
    machine: Machine,
    run_inputs: Iterable[RunInput],
    measure: Callable[[list[AttentionSpec]], Mapping[AttentionSpec, Mapping[str, Trial]]] | None = None,
) -> list[PlanRow]:
    """Decide for every layer and mode.

    Args:
        model: Patched or stock.
        dispatcher: Settings, and the backends that failed so far; gets the trials.
        machine: The device to plan for; without `measure` it need not be the one at hand.
        run_inputs: One for each mode.
        measure: Gives trials of the specs for which no backend was asked for; if None, the rules decide.

    Returns:
        One row a layer and mode, layers in the order of the model.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
    """
    blocks = targets(unwrap_model(model))
    choices = layer_choices(unwrap_model(model), dispatcher.config)
    problems: list[tuple[str, str, RunInput, AttentionSpec]] = []
    for run_input in run_inputs:
        extra = denoising_queries(unwrap_model(model)) if run_input.mode == "train" else {}
        for layer, (images, tokens) in layer_inputs(model, run_input.batch, run_input.height, run_input.width).items():
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
            )
            if spec is not None:
                problems.append((layer, cls._stock.__name__, run_input, spec))
    undecided = [spec for layer, *_, spec in problems if choices[layer] == "auto"]
    if measure is not None and undecided:
        dispatcher.learn(measure(undecided), machine)
    return [
        PlanRow(layer, block_name, run_input.mode, dispatcher.select(spec, choices[layer], machine), run_input.note)
        for layer, block_name, run_input, spec in problems
    ]


def describe(rows: list[PlanRow], machine: Machine) -> str:
    """The plan as a compact table: layers of one stage with equal spec and backend are one line."""
    folded = Counter(
        (
            row.mode,
            row.block,
            row.decision.spec.batch,
            row.decision.spec.num_heads,
            row.decision.spec.seq_len_q,
            row.decision.backend,
            row.decision.summary(),
            _stage(row.layer),
        )
        for row in rows
    )
    wide = max(11, *(len(row.block) + 2 for row in rows)) if rows else 11
    lines = [
        f"yolo-flash: {len({row.layer for row in rows})} attention layers on {machine}",
        f"  {'mode':<6}{'layers':<16}{'block':<{wide}}{'groups':>7}{'heads':>7}{'tokens':>8}  {'backend':<16}why",
    ]
    for (mode, block, groups, heads, tokens, backend, why, stage), count in folded.items():
        layers = f"{count} in {stage}"
        lines.append(f"  {mode:<6}{layers:<16}{block:<{wide}}{groups:>7}{heads:>7}{tokens:>8}  {backend:<16}{why}")
    lines += [f"  {note}" for note in dict.fromkeys(row.note for row in rows) if note]
    if any(row.decision.spec.deterministic and not row.decision.reproducible for row in rows):
        lines.append(
            "  deterministic=True does not reach these backwards: losses may differ in the last bits from run to run. "
            "flash.deterministic=strict takes reproducible backends only."
        )
    return "\n".join(lines)


def _stage(layer: str) -> str:
    """`model.6.m.0.0.attn` -> `model.6`."""
    return ".".join(layer.split(".")[:2])


def plan_entry(row: PlanRow) -> dict[str, Any]:
    """A row of the plan as JSON: layer, block, mode, spec, backend, why, ms, error and the reasons of the refused.

    `notes` has the backends whose time was scaled, and from what.
    """
    decision = row.decision
    return {
        "layer": row.layer,
        "block": row.block,
        "mode": row.mode,
        "spec": decision.spec.as_json(),
        "backend": decision.backend,
        "why": decision.why,
        "ms": decision.ms,
        "notes": decision.notes,
        "error": decision.error,
        "refused": {name: list(reasons) for name, reasons in decision.refused.items()},
        "note": row.note,
    }
