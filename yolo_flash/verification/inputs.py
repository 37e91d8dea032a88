"""What `yolo-flash verify` runs: weights in which attention matters, and the first pictures of the user's source."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from ultralytics.data.augment import LetterBox
from ultralytics.data.loaders import LoadImagesAndVideos
from ultralytics.data.utils import check_det_dataset

from ..assets import offline


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def is_fresh(model: nn.Module) -> bool:
    """Whether the model comes from a YAML: no BatchNorm has seen a batch. A fused model has none, and was trained.

    Its statistics say so, and not its count of batches, which stays at 0 in the EMA that Ultralytics saves.
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
    """Images `[batch, channels, imgsz, imgsz]` from 0 to 1, and what they are."""
    if source is None:
        random = torch.Generator().manual_seed(0)
        sizes = [max(imgsz // scale, 1) for scale in (1, 8, 32)]
        layers = [interpolate(torch.rand(batch, channels, s, s, generator=random), (imgsz, imgsz)) for s in sizes]
        return torch.stack(layers).mean(0), "synthetic images"
    path: Any = str(source)
    if Path(path).suffix in (".yaml", ".yml"):
        data = check_det_dataset(offline.training_data(path))
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
