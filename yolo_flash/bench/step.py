"""`yolo-flash bench step`: one training step, stock against ours, measured so that the numbers can be quoted.

A step is what the trainer of Ultralytics does with a batch: forward, loss, backward, clipping, optimizer and EMA, under
autocast, on random images with eight boxes each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.utils.torch_utils import ModelEMA, init_seeds

from ..assets.models import open_model
from ..config import FlashConfig
from ..graphs.capture import LABELS
from ..graphs.fixed_loss import Capacity
from ..graphs.graphed_step import GraphedStep
from ..graphs.kinds import DETECTION, kind_of
from ..patching.patch import patch_modules
from .process import GRAPHS, UNPATCHED, TimedJob, serve

NCHW = "nchw"  # an arm without the plugin and without channels_last, in which Ultralytics trains on CUDA


@dataclass(frozen=True)
class StepJob(TimedJob):
    """What `bench step` measures: a detection model in training.

    `arms` may have `unpatched`, which is stock Ultralytics, and `nchw`: the same without channels_last, to see what
    that memory layout gains by itself. On a CPU, where Ultralytics trains without it, both are the same. And, on a GPU,
    `graphs`: `auto`, with forward, loss and backward from CUDA graphs.

    `amp` is `fp16`, `bf16` or `fp32`.
    """

    batch: int = 16
    arms: tuple[str, ...] = (UNPATCHED, "auto")
    amp: str = "fp16"

    command: ClassVar[str] = "step"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")
    stock_arms: ClassVar[tuple[str, ...]] = (UNPATCHED, NCHW)
    columns: ClassVar[dict[str, str]] = {
        "network_kernel_ms": "GPU ms, forward to backward",
        "kernel_ms": "GPU ms, whole step",
        "wall_ms": "wall ms",
        "peak_gib": "peak GiB",
    }

    def __post_init__(self) -> None:
        """As in `TimedJob`; there must be an arm."""
        super().__post_init__()
        if not self.arms:
            raise ValueError(f"arms must name at least one of {', '.join(self.stock_arms)}, auto or a backend.")


class Step:
    """A training step of one arm, for batches of any size."""

    def __init__(self, job: StepJob, arm: str) -> None:
        """Build the network, patched unless the arm is a stock one, on the device, with optimizer and EMA."""
        self.device = job.torch_device()
        self.on_gpu = self.device.type == "cuda"
        init_seeds(0, deterministic=False)
        model: Any = open_model(job.model).model
        if not isinstance(model, nn.Module) or getattr(model, "task", "") != "detect":
            raise ValueError(f"bench step measures detection models, {job.model} is none.")
        model.args = get_cfg()
        described: Any = model.yaml
        model.nc = described["nc"]  # as the trainer does; the loss of RT-DETR asks for it
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        self.model: Any = model.to(self.device).train()
        if self.on_gpu and arm != NCHW:
            self.model = self.model.to(memory_format=torch.channels_last)
        if arm not in StepJob.stock_arms:
            patch_modules(self.model, FlashConfig(backend="auto" if arm == GRAPHS else arm))
        self.replays = arm == GRAPHS
        self.kind = kind_of(self.model) or DETECTION
        self.graphed: GraphedStep | None = None
        self.targets: torch.Tensor | None = None
        self.ema = ModelEMA(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.on_gpu)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[job.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_gpu and self.dtype is torch.float16)

    def parts(self, imgsz: int, batch: int) -> dict[str, Callable[[], None]]:
        """Forward to backward, and the whole step, on a random batch."""
        images = _random_batch(batch, imgsz, self.device)
        return {"network_kernel_ms": partial(self.network, images), "kernel_ms": partial(self.whole, images)}

    def _forward_to_backward(self, batch: dict[str, Any]) -> None:
        amp = self.on_gpu and self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=amp):
            if self.replays:
                self._replay(batch)
            loss, _ = self.model(batch)
            loss = loss.sum()
        self.scaler.scale(loss).backward()

    def _replay(self, batch: dict[str, Any]) -> None:
        """Have the next forward replay graphs, which are captured for the first batch of each size."""
        if self.graphed is None or not self.graphed.fits(batch["img"]):
            self.graphed = None  # frees the other size first
            if getattr(self.model, "criterion", None) is None:
                self.model.criterion = self.model.init_criterion()
            count, _, *side = batch["img"].shape
            boxes = {name: batch[name].cpu() for name in LABELS}
            losses = self.kind.losses
            capacity = Capacity().grown(losses.needed(boxes, count, tuple(side), self.model.criterion))
            self.targets = losses.pad_targets(boxes, count, capacity.boxes)
            self.graphed, _ = self.kind.capture_step(self.model, batch, self.targets, capacity)
        self.kind.replay_next_call(self.model, self.graphed, batch, self.targets)

    def network(self, batch: dict[str, Any]) -> None:
        """Forward, loss and backward; the gradients are dropped."""
        self._forward_to_backward(batch)
        self.optimizer.zero_grad()

    def whole(self, batch: dict[str, Any]) -> None:
        """All that the trainer does with a batch."""
        self._forward_to_backward(batch)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


def _random_batch(batch: int, imgsz: int, device: torch.device) -> dict[str, Any]:
    boxes = batch * 8
    return {
        "img": torch.rand(batch, 3, imgsz, imgsz, device=device),
        "cls": torch.randint(0, 80, (boxes, 1), device=device).float(),
        "bboxes": torch.rand(boxes, 4, device=device) * 0.4 + 0.1,
        "batch_idx": torch.arange(batch, device=device).repeat_interleave(8).float(),
    }


if __name__ == "__main__":
    serve(StepJob, Step)
