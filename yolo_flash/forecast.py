"""How much memory a run will take, before it runs: attention by counting, the whole step by two measured batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .backends.registry import BACKENDS
from .backends.spec import AttentionSpec
from .bench_step import Step, StepJob
from .planning import PlanRow, precisions
from .telemetry import score_bytes
from .utils.memory import free_bytes

_BATCHES = (2, 6)  # small enough for any card, far enough apart for a slope
_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FILLED = 0.95  # of the memory: the rest is lost between blocks of the allocator


@dataclass(frozen=True)
class Forecast:
    """Bytes that attention keeps from the forward to the backward of a training step: its peak.

    Attributes:
        stock: If every layer were stock.
        planned: As planned.
    """

    stock: int
    planned: int


def attention_memory(rows: Iterable[PlanRow]) -> Forecast:
    """Count what the attention of one training step keeps.

    Against measured steps the difference is right within 3 % (docs/results/steps-h100.md; a test holds it to 10 %).

    Args:
        rows: The plan; its training rows count.
    """
    decisions = [row.decision for row in rows if row.mode == "train"]
    return Forecast(
        stock=sum(kept_bytes(decision.spec, "stock") for decision in decisions),
        planned=sum(kept_bytes(decision.spec, decision.backend) for decision in decisions),
    )


def kept_bytes(spec: AttentionSpec, backend: str) -> int:
    """Bytes that one layer keeps for its backward, its queries, keys and values included.

    Unfused attention keeps its score matrices; a fused kernel its output, and a float32 number for each query and head.
    """
    tokens = spec.batch * spec.num_heads * spec.seq_len_q
    packed = tokens * (2 * spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
    if not BACKENDS[backend].fused:
        return packed + score_bytes([spec])
    return packed + tokens * (spec.head_dim_v * spec.dtype.itemsize + 4)


def largest_batch(model: str, imgsz: int, arm: str, device: torch.device, amp: bool | str) -> int:
    """The largest training batch that fits a GPU, from the peak memory of real steps at two batches, as a line.

    The steps are eager: CUDA graphs hold about as much memory again. Backends of `auto` are taken by the rules: what
    is measured decides about time, hardly about memory.

    Args:
        model: Checkpoint or YAML.
        imgsz: Side of the images in pixels.
        arm: `unpatched`, `auto` or a backend's name.
        device: The GPU.
        amp: Precision of the training, as in Ultralytics.

    Returns:
        Images; 0 where even the smaller of the two batches does not fit.
    """
    job = StepJob(model=model, arms=(arm,), device=str(device.index or 0), amp=_PRECISIONS[precisions(amp, True)[0]])
    total = free_bytes(device) + torch.cuda.memory_allocated(device)
    peaks: list[int] = []
    step: Step | None = None
    try:
        step = Step(job, arm)
        for batch in _BATCHES:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            for _ in range(2):  # the second has the optimizer's state
                step.parts(imgsz, batch)["kernel_ms"]()
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return _BATCHES[0] if peaks else 0
    finally:
        del step
        torch.cuda.empty_cache()
    slope = (peaks[1] - peaks[0]) / (_BATCHES[1] - _BATCHES[0])
    filling = int((_FILLED * total - peaks[0]) / slope + _BATCHES[0])
    return max(filling, _BATCHES[1])  # which was seen to fit
