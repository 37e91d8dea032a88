"""`yolo-flash verify`: the patched model against the stock one, on the user's own weights and images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER

from ..config import known_keys
from ..machine import detect, resolve_device
from ..utils.log import log_disabled
from .case import prepare
from .report import as_text
from .run import run_case


def verify(
    model: str | Path | nn.Module,
    source: str | Path | None = None,
    imgsz: int = 640,
    batch: int = 2,
    device: str | int | None = None,
    amp: bool | str = True,
    all: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Compare the patched with the stock model, both against float64, and log a table with a verdict.

    Every attention layer is run alone on the input that it has in the model, in training and in prediction; then the
    whole model. Ours passes where it lies at most twice as far from float64 as stock does, plus the rounding of the
    dtype. Copies are run: the model, random numbers and flags of torch stay as they are.

    The backends are those of a run on this machine: measured, now or earlier, unless `autotune=False`. Torch's profiler
    tells which one each layer really ran.

    Args:
        model: Checkpoint or YAML, as in Ultralytics; or a `YOLO` object or its module, stock or patched.
        source: Picture, video, folder, list or data YAML, of which the first pictures are taken; without it synthetic
            ones.
        imgsz: Side of the images in pixels.
        batch: Images; pictures of the source are repeated where there are fewer.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Precision on a GPU, as in Ultralytics: float16 where True, `bf16` trains in bfloat16; False is float32, as
            on a CPU.
        all: Run each layer on every backend that can run it, and not on that of the plan alone.
        **settings: As in `patch_model`; without them, a patched model keeps its own.

    Returns:
        `ok`, `off` (what is off, one sentence each; also where nothing fused was compared, `fused` then being False),
        `notes`, `layers`, `model`, `detections` and what was run, ready for JSON; a number that is not finite is None.

    Raises:
        ValueError: The model has no attention layer of ours, the plugin is off, the batch is below 2, there is too
            little memory, or there is no such device or precision.
        FileNotFoundError: No such model or source.
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        FlashKernelError: A backend asked for by name raised.

    Examples:
        >>> facts = verify("yolo12n.yaml", imgsz=64, device="cpu", backend="sdpa_flash")
        >>> facts["ok"], facts["off"]
        (True, [])
    """
    run: dict[str, Any] = {"source": source, "imgsz": imgsz, "batch": batch, "device": device, "amp": amp, "every": all}
    return verify_from_sources(model, known_keys(settings, "the keyword arguments"), **run)


def verify_from_sources(model: Any, sources: Mapping[str, Any], as_json: bool = False, **run: Any) -> dict[str, Any]:
    """`verify` for settings that still have to be resolved.

    Args:
        model: As in `verify`.
        sources: Settings, as keyword arguments of `FlashConfig.resolve`.
        as_json: Print JSON on standard output, and nothing else.
        **run: `source`, `imgsz`, `batch`, `device`, `amp` and `every`, as in `verify`, where the last is `all`.
    """
    with log_disabled(as_json), torch.inference_mode(False), torch.enable_grad():
        device = resolve_device(run.pop("device", None))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.random.default_generator.manual_seed(0)  # of fresh weights
            try:
                facts = run_case(prepare(model, sources, device, **run)).as_dict()
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory on {detect(device)}: float64 writes the score matrices of every layer. "
                    f"A smaller imgsz= or batch= helps."
                ) from error
        LOGGER.info(as_text(facts))
    if as_json:
        print(json.dumps(facts, indent=2))
    return facts
