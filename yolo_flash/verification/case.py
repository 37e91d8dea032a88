"""What one verification compares: a stock model, images, settings, and the modes in which both models run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from ultralytics.data.augment import LetterBox
from ultralytics.data.loaders import LoadImagesAndVideos
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import unwrap_model

from ..assets import offline
from ..assets.models import open_model
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..machine import Machine, detect
from ..patching.blocks import FlashBlock
from ..patching.patch import targets, unpatch_modules, without_known_blocks
from ..planning.inputs import precisions, rounded_size
from .compare import Mode


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
    """Open the model, resolve the settings and load the images; raises as `verify` does."""
    if batch < 2:
        why = "torch's BatchNorm is wrong on the CPU for one image"
        raise ValueError(f"batch must be at least 2, found {batch}: {why}.")
    if device.type == "mps":
        raise ValueError("device=mps has no float64 to compare with, and runs stock attention anyway.")
    on_gpu = device.type == "cuda"
    train_dtype, predict_dtype = precisions(amp, on_gpu)
    by_name = isinstance(model, (str, Path))
    name = str(model) if by_name else type(model).__name__
    given: Any = open_model(model) if by_name else model
    inner = given.model if isinstance(given, Model) else given
    if not (isinstance(inner, nn.Module) and targets(inner)):
        raise ValueError(f"{without_known_blocks(name)}: nothing to verify.")
    config = _config_of(inner, sources)
    if not config.enabled:
        raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to verify.")
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
    return Case(name, stock, fresh, images, found, config, Dispatcher(config), detect(device), modes, every)


def _config_of(model: nn.Module, sources: Mapping[str, Any]) -> FlashConfig:
    """The settings: those given, else those of a patched model, else the defaults."""
    block = next((b for b in model.modules() if isinstance(b, FlashBlock)), None)
    if block is not None and all(value is None or value == {} for value in sources.values()):
        return block._flash_dispatcher.config
    return FlashConfig.resolve(**sources)


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def is_fresh(model: nn.Module) -> bool:
    """Whether no BatchNorm has seen a batch, as after a YAML. A fused model has no BatchNorm, and was trained.

    The statistics tell, and not the count of batches, which stays at 0 in the EMA that Ultralytics saves.
    """
    means = [norm.running_mean for norm in _norms(model) if norm.running_mean is not None]
    variances = [norm.running_var for norm in _norms(model) if norm.running_var is not None]
    return bool(means) and all(not t.any() for t in means) and all(bool((t == 1).all()) for t in variances)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Make attention matter in fresh weights.

    Untrained statistics let activations fade from layer to layer, and the layer scales of A2C2f begin at 0.01.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)
    with contextlib.ExitStack() as undo:
        for norm in _norms(model):
            undo.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = 1.0
        model.train()(images)


def load_images(source: str | Path | None, channels: int, imgsz: int, batch: int) -> tuple[Tensor, str]:
    """Images `[batch, channels, imgsz, imgsz]` from 0 to 1, and a description."""
    if source is None:
        random = torch.Generator().manual_seed(0)
        sizes = [max(imgsz // scale, 1) for scale in (1, 8, 32)]
        layers = [interpolate(torch.rand(batch, channels, s, s, generator=random), (imgsz, imgsz)) for s in sizes]
        return torch.stack(layers).mean(0), "synthetic images"
    path: Any = str(source)
    if Path(path).suffix in (".yaml", ".yml"):
        data = check_det_dataset(offline.data_within_reach(path))
        path = data.get("val") or data["train"]
    loader = LoadImagesAndVideos(path, batch=batch, channels=channels)
    try:
        _, pictures, _ = next(iter(loader))
    except StopIteration:
        raise ValueError(f"source={source}: none of {loader.nf} files could be read.") from None
    finally:
        getattr(loader, "close", bool)()  # ultralytics 8.4.140 has none
    letterbox = LetterBox((imgsz, imgsz), auto=False)
    boxed = [np.atleast_3d(letterbox(image=picture)) for picture in pictures]
    if boxed[0].shape[2] != channels:
        raise ValueError(f"source={source}: {boxed[0].shape[2]} channels, and the model takes {channels}.")
    images = torch.from_numpy(np.stack([boxed[i % len(boxed)] for i in range(batch)])).permute(0, 3, 1, 2)
    images = images.flip(1) if channels == 3 else images  # BGR to RGB
    return images.contiguous().float() / 255, f"{len(pictures)} of {source}"
