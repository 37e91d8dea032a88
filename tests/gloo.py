"""Ultralytics' DDP on two CPU ranks: its launcher, its worker file and its trainer, with gloo instead of NCCL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK

from tests.counting import AttentionCalls
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch.decision import Trial
from yolo_flash.graphs import policy
from yolo_flash.patching.blocks import FlashBlock
from yolo_flash.planning import autotune


def measure(specs: list[AttentionSpec], device: torch.device) -> dict[AttentionSpec, dict[str, Trial]]:
    """Numbers of which rank 1 would conclude otherwise."""
    return {spec: {"stock": Trial(ms=2.0 + RANK), "sdpa_flash": Trial(ms=1.0 + 3 * RANK)} for spec in specs}


class GlooTrainer(DetectionTrainer):
    """A trainer that Ultralytics launches as for two GPUs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = 2
        self.ddp = LOCAL_RANK == -1
        if not self.ddp:  # in a worker: the launching process has more tests to run
            autotune.measure = measure  # type: ignore[assignment]

    def _setup_ddp(self) -> None:
        distributed.init_process_group("gloo", rank=RANK, world_size=self.world_size)
        wrapper = nn.parallel.DistributedDataParallel
        nn.parallel.DistributedDataParallel = lambda model, device_ids, **kwargs: wrapper(model, **kwargs)  # type: ignore
        self.calls = AttentionCalls()
        self.calls.__enter__()

    def final_eval(self) -> None:
        """Ultralytics' takes its device from CUDA here."""
        self.calls.__exit__(None, None, None)
        report(self)


def report(trainer: Any) -> None:
    """One JSON file a rank, in the folder that REPORT_FOLDER names."""
    blocks = [block for block in trainer.model.modules() if isinstance(block, FlashBlock)]
    facts = {
        "patched": len(blocks),
        "patched ema": sum(isinstance(block, FlashBlock) for block in trainer.ema.ema.modules()),
        "plan": [(row.layer, row.mode, row.decision.backend, str(row.decision.spec)) for row in trainer.flash_plan],
        "config": str(trainer.flash),
        "backward": trainer.calls.backward["sdpa_flash"],
        "ms": [row.decision.ms for row in trainer.flash_plan],
        "data": str(trainer.args.data),
        "weights": float(sum(parameter.detach().double().sum() for parameter in trainer.model.parameters())),
    }
    Path(os.environ["REPORT_FOLDER"], f"rank{RANK}.json").write_text(json.dumps(facts))


def count_epochs(trainer: Any) -> None:
    """A user's callback, which has to reach the workers."""
    Path(os.environ["REPORT_FOLDER"], f"callback{RANK}.txt").write_text(str(trainer.epoch + 1))


class GraphTrainer(GlooTrainer):
    """The same with graphs that are none: the network and its loss run eager, and are counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.ddp:
            policy.not_supported_reasons = lambda trainer, mode: []
        self.replayed: list[int] = []
        self.averaged: list[bool] = []  # in which optimizer steps by us, not by DDP
        self.flash_run.graphs._capture_step = self.capture

    def capture(self, model: Any, images: Any, loss: Any, extra: Any) -> Any:
        if os.environ.get("NO_GRAPHS_ON") == str(RANK):
            raise RuntimeError("not on this rank")
        return Counting(self.replayed, model, loss, images.shape)

    def optimizer_step(self) -> None:
        self.averaged.append(not self.model.require_backward_grad_sync)
        super().optimizer_step()

    def final_eval(self) -> None:
        graphs: Any = self.flash_run.graphs
        facts = {"replayed": len(self.replayed), "why_not": graphs.why_not, "averaged": self.averaged}
        facts["given back"] = self.model.require_backward_grad_sync
        super().final_eval()
        Path(os.environ["REPORT_FOLDER"], f"graphs{RANK}.json").write_text(json.dumps(facts))


class Counting:
    """In the place of the graphs."""

    pool_bytes, seconds = 1, 0.5

    def __init__(self, replayed: list[int], model: Any, loss: Any, shape: torch.Size) -> None:
        self.replayed, self.model, self.loss, self.shape = replayed, model, loss, shape

    def __call__(self, images: torch.Tensor, *extra: torch.Tensor) -> Any:
        self.replayed.append(len(images))
        return self.loss(self.model._predict_once(images), *extra)

    def fits(self, images: torch.Tensor, *extra: torch.Tensor) -> bool:
        return images.shape == self.shape

    def stale(self, model: Any = None) -> bool:
        return False


assert torch.distributed.is_available()
