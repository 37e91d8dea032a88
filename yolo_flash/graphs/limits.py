"""What forbids CUDA graphs in a run: a user's code, which a replay would not run, and what changes in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.utils.torch_utils import unwrap_model

from ..utils.stock_code import foreign
from .kinds import ENTRANCES, RTDETR, kind_of
from .signature import has_hooks, kept_graph, network_modules


def not_supported_reasons(trainer: Any, mode: str) -> list[str]:
    """What forbids CUDA graphs in a run, as far as known by now; empty if nothing does.

    Args:
        trainer: Ultralytics' trainer, whose model is set up.
        mode: `auto` also refuses runs whose batches seldom have one shape, and modules of a user's.
    """
    args, model = trainer.args, unwrap_model(trainer.model)
    reasons = []
    if trainer.device.type != "cuda" or torch.version.hip:
        device = "ROCm" if trainer.device.type == "cuda" else trainer.device.type
        reasons.append(f"needs an NVIDIA GPU, the device is {device}")
    if args.compile:
        reasons.append("compile=True has graphs of its own")
    if hasattr(model, "teacher_model"):
        reasons.append("distillation needs tensors from inside the network")
    elif (kind := kind_of(model)) is None:
        reasons.append(f"{type(model).__name__} gives its network more than images, or takes more from it")
    elif replaced := foreign([model], ENTRANCES) or (kind is RTDETR and _foreign_head(model.model[-1])):
        reasons.append(f"{replaced} is not Ultralytics' own")
    if getattr(args, "quantize", None) or getattr(args, "int8", False):
        reasons.append("quantisation-aware training changes its ranges in every forward")
    hooked = [name for name, module in model.named_modules() if has_hooks(module)]
    if hooked:
        reasons.append(f"a hook on {hooked[0] or 'the model'} would not be called")
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        reasons.append("SyncBatchNorm talks to other ranks")
    if mode == "auto" and not reasons and (unknown := foreign(network_modules(model))):
        reasons.append(
            f"{unknown} is neither torch's nor Ultralytics' and may do something else in every step: "
            f"flash.graphs=on captures it as it is"
        )
    if kept := kept_graph(model):
        reasons.append(f"{kept} is a tensor of the last step's own, with a gradient that a replay would not renew")
    if trainer.world_size > 1:
        if not isinstance(trainer.model, DistributedDataParallel):
            reasons.append(f"ranks need DistributedDataParallel, found {type(trainer.model).__name__}")
        elif trainer.model._comm_hooks:
            reasons.append("a communication hook of DDP would not be called")
        # An optimizer step of a user's class comes behind ours, which averages; one on the instance in its place.
        if "optimizer_step" in vars(trainer) or own_loop(trainer):
            reasons.append("a training loop or optimizer step of a user's own may not average the gradients of ranks")
    if torch.is_anomaly_enabled():
        reasons.append("torch's anomaly detection reads every operator")
    if args.multi_scale and (mode == "auto" or trainer.world_size > 1):  # each rank has its own size
        reasons.append(f"multi_scale={args.multi_scale} changes the image size in every step")
    if args.rect and (mode == "auto" or trainer.world_size > 1):
        reasons.append("rect=True gives batches of many shapes")
    return reasons


def _foreign_head(head: Any) -> str:
    """What takes the place of the forward of RT-DETR's head, for which the graphs have their own; empty if nothing."""
    return foreign([head], ["forward"]) if isinstance(head, RTDETRDecoder) else type(head).__name__


def boxes_stay(trainer: Any) -> bool:
    """Whether boxes reach the device as the loader gives them: a user's `preprocess_batch` might change them."""
    return not foreign([trainer], ("preprocess_batch",))


def own_loop(trainer: Any) -> bool:
    """Whether the training loop is a user's own, which may ask autograd for gradients."""
    return bool(foreign([trainer], ("_do_train",)))
