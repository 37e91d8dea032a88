"""Proof of what ran: the aten operators of attention that were called."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import cv2
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics import YOLO
from ultralytics.utils import ASSETS

from yolo_flash import patch_model

LAYERS = 3  # of attention in the tiny model
OPERATORS = {  # spelled out: the plugin's own list is under test
    "area_attention": "triton_area",
    "_scaled_dot_product_flash_attention_for_cpu": "sdpa_flash",
    "_scaled_dot_product_flash_attention": "sdpa_flash",
    "_scaled_dot_product_efficient_attention": "sdpa_efficient",
    "_scaled_dot_product_cudnn_attention": "sdpa_cudnn",
}


class AttentionCalls(TorchDispatchMode):
    """Counts, while active, the calls of each fused backend's forward and backward operator."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in OPERATORS:
            self.forward[OPERATORS[name]] += 1
        elif (forward := name.replace("_backward", "")) in OPERATORS:
            self.backward[OPERATORS[forward]] += 1
        return func(*args, **(kwargs or {}))


def in_threads(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, AttentionCalls]:
    """Run each work that often in a thread of its own, all at the same time; what each called."""
    counts = {name: AttentionCalls() for name in works}
    start = threading.Barrier(len(works))

    def run(name: str) -> None:
        start.wait()
        with torch.no_grad(), counts[name]:
            for _ in range(repeats):
                works[name]()

    threads = [threading.Thread(target=run, args=(name,)) for name in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def run_out_of_memory_once(model: Any) -> None:
    """Let the first training step of a `YOLO` object raise what CUDA raises without memory."""
    done: list[bool] = []

    def fail_once(trainer: Any) -> None:
        if not done:
            done.append(True)

            def out_of_memory(*args: Any, **kwargs: Any) -> Any:
                del trainer.model.forward
                raise torch.OutOfMemoryError("CUDA out of memory")

            trainer.model.forward = out_of_memory

    model.add_callback("on_train_batch_start", fail_once)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give BatchNorm and projections values that matter: attention does not reach the output of a fresh YOLO12."""
    generator = torch.Generator().manual_seed(1)
    for m in module.modules():
        if isinstance(m, torch.nn.Conv2d):
            fan_in = m.weight[0].numel()
            m.weight.data.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.7, 1.3, generator=generator)
            m.bias.data.normal_(std=0.1, generator=generator)
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_(std=0.1, generator=generator)
            m.running_var.uniform_(0.7, 1.3, generator=generator)
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):  # the layer scale of A2C2f starts at 0.01
            parameter.data.fill_(1.0)
    return module


def settle(module: torch.nn.Module, side: int = 96) -> torch.nn.Module:
    """`randomise`, and the statistics of a photograph in BatchNorm: activations stay of order one in prediction."""
    photo = cv2.imread(str(ASSETS / "bus.jpg"))
    assert photo is not None
    x = torch.from_numpy(cv2.resize(photo, (side, side))).permute(2, 0, 1)[None].float() / 255
    norms = [m for m in randomise(module).eval().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(torch.cat([x, x.flip(3)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return module


def train_compiled(config: str, args: dict[str, Any]) -> tuple[Any, list[int], list[int]]:
    """Train a model with compile=True, stock and patched: the patched one, and both numbers of graphs and of breaks.

    The stock one is traced and not compiled further: nobody asks for its kernels.
    """
    graphs, breaks = [], []
    compiler = torch.compile
    for patched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model: Any = YOLO(config)
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch_model(model, backend="sdpa_flash")
            else:
                patch.setattr(torch, "compile", lambda model, **ignored: compiler(model, backend="eager"))
            model.train(**{**args, "compile": True})
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return model, graphs, breaks
