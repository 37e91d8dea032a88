"""`yolo-flash bench predict`: latency of the network in a prediction, stock against every backend that runs here.

The network is what Ultralytics' own predictor makes of the model: convolutions fused with their BatchNorm, in float16
if asked for, in NCHW on a GPU and in channels_last on an x86 CPU. A call is its forward on images that are already on
the device, with what the head does in it; reading, resizing and NMS, which no backend changes, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ultralytics.engine.predictor import BasePredictor
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.torch_utils import init_seeds

from ..assets.models import open_model
from ..backends.registry import BACKENDS
from ..config import FlashConfig
from ..dispatch.dispatcher import Dispatcher
from ..graphs.inference import InferenceGraphs
from ..machine import Machine, detect
from ..patching.patch import patch_modules
from ..planning.inputs import RunInput
from ..planning.plan import make_plan
from .process import GRAPHS, UNPATCHED, TimedJob, serve
from .rounds import bench


@dataclass(frozen=True)
class PredictJob(TimedJob):
    """What `bench predict` measures: a model of any task.

    Without `arms`, `unpatched`, which is stock Ultralytics, and all backends that can run the model here, and `auto`.
    On an NVIDIA GPU there is also `graphs`: `auto`, with the network from a CUDA graph.
    `amp` is `fp32`, as Ultralytics predicts by default, or `fp16`, its `quantize=16`.
    """

    command: ClassVar[str] = "predict"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    stock_arms: ClassVar[tuple[str, ...]] = (UNPATCHED,)
    columns: ClassVar[dict[str, str]] = {
        "kernel_ms": "GPU ms",
        "wall_ms": "wall ms",
        "images_per_second": "images/s",
        "peak_gib": "peak GiB",
    }


def bench_predict(job: PredictJob) -> list[dict[str, Any]]:
    """Measure all arms in turns; the results are those of `bench`.

    Raises:
        OSError: A file cannot be written, or the model is not there.
        ValueError: The job names no arms, and the model has no attention layer that the plugin knows.
    """
    if not job.arms:
        job = dataclasses.replace(job, arms=_arms_that_run(job, detect(job.torch_device())))
    return bench(job)


def _arms_that_run(job: PredictJob, machine: Machine) -> tuple[str, ...]:
    """Stock, the backends that no layer refuses at one of the sizes at least, and `auto`; the log has the others."""
    on_gpu = machine.kind in ("cuda", "rocm")
    dtype = torch.float16 if on_gpu and job.amp == "fp16" else torch.float32
    model: Any = open_model(job.model).model
    refused: dict[str, list[str]] = {name: [] for name in BACKENDS}  # at each size, the reasons of the first layer
    for imgsz in job.imgsz:
        run_input = RunInput("val", job.batch, imgsz, imgsz, dtype, nhwc=not on_gpu)
        rows = make_plan(model, Dispatcher(FlashConfig()), machine, [run_input])
        if not rows:
            raise ValueError(f"{job.model} has no attention layer that the plugin knows: every arm would run stock.")
        for name, sizes in refused.items():
            sizes += [reasons for row in rows if (reasons := "; ".join(row.decision.refused.get(name, ())))][:1]
    unable = {name: sizes[0] for name, sizes in refused.items() if len(sizes) == len(job.imgsz)}
    unable |= {name: why for name, b in BACKENDS.items() if name not in unable and (why := b.importable())}
    for name, reason in unable.items():
        LOGGER.info(f"bench predict: without {name}: {reason}")
    return (UNPATCHED, *(name for name in BACKENDS if name not in ("stock", *unable)), "auto")  # stock is unpatched


class Prediction:
    """The network of one arm, as Ultralytics' predictor sets it up, for images of any size."""

    def __init__(self, job: PredictJob, arm: str) -> None:
        """Build the network, patched unless the arm is `unpatched`, on the device."""
        init_seeds(0, deterministic=False)
        model: Any = open_model(job.model).model
        if arm != UNPATCHED:
            patch_modules(model, FlashConfig(backend="auto" if arm == GRAPHS else arm))
        half: dict[str, Any] = {"quantize": 16} if "quantize" in DEFAULT_CFG_DICT else {"half": True}
        predictor = BasePredictor(overrides={"verbose": False} | (half if job.amp == "fp16" else {}))
        self.device = device = job.torch_device()
        predictor.args.device = device if device.type == "cuda" else "cpu"  # a string sets the threads, as predict does
        predictor.setup_model(model, verbose=False)
        self.network: Any = predictor.model
        self.graphs = InferenceGraphs() if arm == GRAPHS else None

    def parts(self, imgsz: int, batch: int) -> dict[str, Callable[[], None]]:
        """The forward on random images, laid out as the predictor hands them over."""
        dtype = torch.float16 if self.network.fp16 else torch.float32
        images = torch.rand(batch, self.network.channels, imgsz, imgsz, device=self.device, dtype=dtype)

        def forward() -> None:
            with torch.inference_mode():
                if self.graphs is None:
                    self.network(images)
                else:
                    self.graphs(self.network, images)
                    if self.graphs.why_not:
                        raise RuntimeError(self.graphs.why_not)

        return {"kernel_ms": forward}


if __name__ == "__main__":
    serve(PredictJob, Prediction)
