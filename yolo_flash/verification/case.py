"""What one verification compares: a stock model, images, settings, and the modes in which both models run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import unwrap_model

from ..assets.models import open_model
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..machine import Machine, detect
from ..patching.blocks import FlashBlock
from ..patching.patch import targets, unpatch_modules
from ..planning.plan import precisions, rounded_size
from .compare import Mode
from .inputs import is_fresh, load_images, settle


@dataclass(frozen=True)
class Case:
    """What one verification compares.

    Attributes:
        name: The model as the user gave it, or its class.
        stock: The stock model in float32, on the device.
        fresh: Whether its weights were untrained; `settle` has made attention matter in them.
        images: `[batch, channels, imgsz, imgsz]` in float32, on the device.
        source: Where the images come from.
        config: The settings of the patched model.
        dispatcher: Decides which backends the patched model runs.
        machine: The device.
        modes: Training, then prediction.
        every: Whether each layer runs on every backend that can run it, and not on that of the plan alone.
    """

    name: str
    stock: nn.Module
    fresh: bool
    images: Tensor
    source: str
    config: FlashConfig
    dispatcher: Dispatcher
    machine: Machine
    modes: tuple[Mode, Mode]
    every: bool


def prepare(
    model: Any,
    sources: Mapping[str, Any],
    device: torch.device,
    source: str | Path | None = None,
    imgsz: int = 640,
    batch: int = 2,
    amp: bool | str = True,
    every: bool = False,
) -> Case:
    """Open the model, resolve the settings and load the images.

    Args:
        model: As in `verify`.
        sources: Settings, as keyword arguments of `FlashConfig.resolve`.
        device: Where everything runs.
        source: As in `verify`.
        imgsz: Side of the images in pixels, rounded up as by Ultralytics.
        batch: Images.
        amp: As in `verify`.
        every: What `verify` calls `all`.

    Raises:
        ValueError: As in `verify`.
        FileNotFoundError: No such model or source.
    """
    if batch < 2:
        raise ValueError(
            f"batch must be at least 2, found {batch}: torch's BatchNorm is wrong on the CPU for one image."
        )
    if device.type == "mps":
        raise ValueError("device=mps has no float64 to compare with, and runs stock attention anyway.")
    on_gpu = device.type == "cuda"
    train_dtype, predict_dtype = precisions(amp, on_gpu)
    by_name = isinstance(model, (str, Path))
    name = str(model) if by_name else type(model).__name__
    given: Any = open_model(model) if by_name else model
    inner = given.model if isinstance(given, Model) else given
    if not (isinstance(inner, nn.Module) and targets(inner)):
        raise ValueError(
            f"{name} has no attention layer that the plugin knows (of YOLOv10, YOLO11, YOLO12, YOLO26 or RT-DETR): "
            f"nothing to verify."
        )
    config = _config_of(inner, sources)
    if not config.enabled:
        raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to verify.")
    dispatcher, machine = Dispatcher(config), detect(device)
    stock: Any = copy.deepcopy(unwrap_model(inner))
    unpatch_modules(stock)
    stock.to(device, torch.float32)
    channels = (getattr(stock, "yaml", None) or {}).get("channels", 3)
    images, found = load_images(source, channels, rounded_size(stock, imgsz), batch)
    images = images.to(device)
    if fresh := is_fresh(stock):
        settle(stock, images)
    modes = (
        Mode("train", train_dtype, on_gpu, deterministic=bool(DEFAULT_CFG_DICT["deterministic"])),
        Mode("predict", predict_dtype, False),
    )
    return Case(name, stock, fresh, images, found, config, dispatcher, machine, modes, every)


def _config_of(model: nn.Module, sources: Mapping[str, Any]) -> FlashConfig:
    """The settings: those given, else those of a patched model, else the defaults."""
    block = next((b for b in model.modules() if isinstance(b, FlashBlock)), None)
    if block is not None and all(value is None or value == {} for value in sources.values()):
        return block._flash_dispatcher.config
    return FlashConfig.resolve(**sources)
