"""The inputs of a run: sizes, dtypes and memory formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from ultralytics.nn.tasks import RTDETRDetectionModel, guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.checks import check_imgsz


@dataclass(frozen=True)
class RunInput:
    """The input of a model in one mode: enough to know every layer's spec."""

    mode: str  # train or val
    batch: int
    height: int
    width: int
    dtype: torch.dtype  # in which convolutions compute
    nhwc: bool  # whether the model runs in channels_last
    deterministic: bool = False
    note: str = ""  # for the reader of the plan, where the shape is not the only one, or not known


def precisions(amp: bool | str, on_gpu: bool) -> tuple[torch.dtype, torch.dtype]:
    """In which dtypes Ultralytics computes for a value of `amp=`: in training, and in validation of the EMA.

    Raises:
        ValueError: Ultralytics takes no such value.
    """
    asked = amp.lower() if isinstance(amp, str) else amp
    if not isinstance(amp, bool) and asked not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"amp must be True, False, fp16, bf16 or fp32, found {amp!r}.")
    if not on_gpu or asked in (False, "fp32"):
        return torch.float32, torch.float32
    return torch.bfloat16 if asked == "bf16" else torch.float16, torch.float16


def largest_stride(model: Any) -> int:
    """The number of pixels to whose multiples Ultralytics' trainer rounds up the sides of images."""
    strides = getattr(model, "stride", None)
    return max(int(strides.max()) if isinstance(strides, torch.Tensor) else 32, 32)


def rounded_size(model: Any, imgsz: int) -> int:
    """The size of the images of a run that was asked for `imgsz`; where the two differ, Ultralytics says so."""
    stride = largest_stride(model)
    return int(check_imgsz(imgsz, stride=stride, floor=stride, max_dim=1))


def assumed_inputs(model: Any, imgsz: int, batch: int, amp: bool | str, on_gpu: bool) -> list[RunInput]:
    """The inputs of training and validation for a run whose data are not known: square pictures, full batches.

    Ultralytics validates without resizing to a square, for most tasks with half a stride of padding around the pictures
    and with twice the training batch. `imgsz` is a multiple of the stride; a GPU runs in channels_last and with AMP.
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
