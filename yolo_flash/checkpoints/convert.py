"""Write a checkpoint of YOLOv12's authors in Ultralytics' layout, or one of Ultralytics in theirs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER

from ..utils.files import write_file
from .authors import attention_blocks, to_authors, to_ultralytics
from .reading import CheckpointError, read_checkpoint

_TARGETS = {"ultralytics": to_ultralytics, "authors": to_authors}
_NOTHING = {
    "ultralytics": "has Ultralytics' layout already: Ultralytics runs it as it is",
    "authors": "has the layout of YOLOv12's authors already",
}


def convert(weights: str | Path, out: str | Path | None = None, to: str = "ultralytics") -> Path:
    """Write a YOLOv12 checkpoint in another layout; outputs stay the same up to rounding.

    Names, training arguments, EMA, epoch, metrics and dtypes are kept; the state of an optimizer is left out, since it
    belongs to weights of other shapes. The original stays as it is.

    Args:
        weights: A checkpoint with area attention.
        out: The file to write, by default `<stem>-<to>.pt` beside the original.
        to: `ultralytics`, for checkpoints of the authors' own repository, or `authors`, for those that came from there.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: A checkpoint that cannot be read or is not of a layout that is known, one that is in the wanted
            layout already, or a file in the place of the new one. Nothing is written.
        OSError: The original cannot be read or the new file cannot be written.

    Examples:
        >>> file = convert("yolov12n.pt")
        >>> print(file)
        yolov12n-ultralytics.pt
        >>> results = YOLO(file).predict("bus.jpg", imgsz=64)
    """
    if to not in _TARGETS:
        raise CheckpointError(f"to={to} is not one of {', '.join(_TARGETS)}.")
    source = Path(weights)
    target = Path(out) if out else source.with_name(f"{source.stem}-{to}.pt")
    if target.suffix != ".pt":
        raise CheckpointError(f"{target} must end in .pt, by which Ultralytics knows checkpoints.")
    _refuse_existing(target)
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist or is not a file.")
    checkpoint = read_checkpoint(source.read_bytes(), str(source))
    layers = _convert_models(checkpoint, to, source)
    note = ""
    if checkpoint.get("optimizer") is not None:
        checkpoint["optimizer"] = None
        note = f" The optimizer's state is left out: resume={target} goes on from its epoch with a new optimizer."
    content = io.BytesIO()
    torch.save(checkpoint, content)
    _refuse_existing(target)
    write_file(target, content.getvalue())
    LOGGER.info(f"yolo-flash: {layers} attention layers of {source} written in the layout of {to}: {target}.{note}")
    return target


def _convert_models(checkpoint: dict[str, Any], to: str, source: Path) -> int:
    """Convert every model of a checkpoint in place, and count the layers of one."""
    models = {key: model for key in ("model", "ema") if isinstance(model := checkpoint.get(key), nn.Module)}
    if not models:
        found = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
        raise CheckpointError(f"{source} has no model, in model or ema; it holds {found}.")
    changed = {}
    for key, model in models.items():
        blocks = attention_blocks(model)
        if not blocks:
            raise CheckpointError(f"{source} has no area attention in {key}: it is no YOLOv12.")
        changed[key] = sum([_TARGETS[to](block, f"{source}: {name}") for name, block in blocks.items()])
    if not any(changed.values()):
        raise CheckpointError(f"{source} {_NOTHING[to]}. Nothing was written.")
    return max(changed.values())


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists and is left alone. Name another file with out=...")
