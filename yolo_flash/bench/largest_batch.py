"""The largest training batch that fits, from the peak memory of real steps."""

from __future__ import annotations

import torch

from ..planning.inputs import precisions
from ..utils.memory import free_bytes
from .step import Step, StepJob

_BATCHES = (2, 6)  # small enough for any card, far enough apart for a slope
_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FILLED = 0.95  # of the memory: the rest is lost between blocks of the allocator


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
