"""Models as the repository of YOLOv12's authors has them, with a forward written from its description."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.nn.modules.block import A2C2f, AAttn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import yaml_model_load

MODELS = {
    "": tasks.DetectionModel,
    "-seg": tasks.SegmentationModel,
    "-cls": tasks.ClassificationModel,
    "-pose": tasks.PoseModel,
    "-obb": tasks.OBBModel,
}


class Fork(AAttn):
    """Area attention of the turbo release, head by head and area by area; `AAttn` while it is in a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qk, v = self.qk(x), self.v(x)
        queries, keys = qk[:, :channels].flatten(2), qk[:, channels:].flatten(2)
        values = v.flatten(2)  # batch, channels, tokens: rows of the picture one after another
        out = torch.zeros_like(values)
        size = height * width // self.area
        for area in range(self.area):
            tokens = slice(area * size, (area + 1) * size)
            for head in range(self.num_heads):
                own = slice(head * self.head_dim, (head + 1) * self.head_dim)
                q, k, value = (t[:, own, tokens] for t in (queries, keys, values))
                scores = torch.einsum("bdn,bdm->bnm", q, k) / self.head_dim**0.5
                out[:, own, tokens] = torch.einsum("bnm,bdm->bdn", torch.softmax(scores, -1), value)
        return self.proj(out.view(batch, channels, height, width) + self.pe(v))


def as_fork(block: Any) -> None:
    """Give a stock block the authors' convolutions, fresh ones."""
    dim = block.num_heads * block.head_dim
    block._modules.clear()
    block.qk = Conv(dim, 2 * dim, 1, act=False)
    block.v = Conv(dim, dim, 1, act=False)
    block.proj = Conv(dim, dim, 1, act=False)
    block.pe = Conv(dim, dim, 5, 1, 2, g=dim, act=False)
    vars(block).pop("all_head_dim", None)
    block.__class__ = Fork


def randomise(model: nn.Module) -> None:
    """No two rows alike, BatchNorm far from identity, and branches whose weight is not close to zero."""
    for name, t in model.state_dict().items():
        if name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            t.normal_(std=0.3)
        elif name.endswith("num_batches_tracked"):
            t.fill_(17)
        elif t.ndim == 4 and "dfl" not in name:
            t.normal_(std=1.5 / t[0].numel() ** 0.5)
        elif t.ndim == 1:
            t.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, A2C2f) and module.gamma is not None:
            module.gamma.data.uniform_(0.5, 1.0)
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03


def fork_yaml(scale: str, task: str = "") -> dict[str, Any]:
    """The YAML of the turbo release: groups in two convolutions of the backbone."""
    yaml = yaml_model_load(f"yolo12{scale}{task}.yaml")
    yaml["backbone"][1][3], yaml["backbone"][3][3] = [128, 3, 2, 1, 2], [256, 3, 2, 1, 4]
    return yaml | {"yaml_file": f"yolov12{scale}{task}.yaml", "scale": scale}


def fork_model(scale: str, task: str = "") -> Any:
    """A model of the turbo release with random weights, which runs; its blocks are `Fork`."""
    model = MODELS[task](fork_yaml(scale, task), nc=7, verbose=False)
    for module in model.modules():
        if type(module) is AAttn:
            as_fork(module)
    randomise(model)
    model.args = {"imgsz": 64, "task": "detect"}
    model.names = dict(enumerate(["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]))
    return model.eval()


def checkpoint(model: Any, **more: Any) -> dict[str, Any]:
    """What a trainer saves, with the classes as the authors' pickles name them."""
    saved = copy.deepcopy(model)
    for module in saved.modules():
        if type(module) is Fork:
            module.__class__ = AAttn
    return {
        "epoch": -1,
        "best_fitness": None,
        "model": saved,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": {"imgsz": 64, "data": "coco8.yaml"},
        "train_metrics": {"fitness": 0.5},
        "train_results": {"epoch": [1.0]},
        "date": "2025-03-09",
        "version": "8.3.63",
        "license": "AGPL-3.0",
        "docs": "https://docs.ultralytics.com",
        **more,
    }


def save(model: Any, file: Path, **more: Any) -> Path:
    torch.save(checkpoint(model, **more), file)
    return file


def tiny_fork(dim: int = 64) -> Any:
    """A detector with two attention layers, areas 4 and 1, whose checkpoint is written in no time."""
    layers: list[Any] = [[-1, 1, "Conv", [c, 3, 2]] for c in (16, 32)]
    layers += [[-1, 1, "A2C2f", [dim, True, 4]], [-1, 1, "A2C2f", [dim, True, 1]]]
    yaml = {"nc": 7, "scales": {"n": [1.0, 1.0, 1024]}, "scale": "n", "backbone": layers}
    model = tasks.DetectionModel({**yaml, "head": [[[3], 1, "Detect", ["nc"]]]}, verbose=False)
    for module in model.modules():
        if type(module) is AAttn:
            as_fork(module)
    randomise(model)
    return model.eval()
