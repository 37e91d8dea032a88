"""Time RT-DETR's `nn.MultiheadAttention`, stock against every backend that runs here: the numbers behind its rules.

    python scripts/study_multihead.py [cpu|cuda] > docs/results/multihead-<device>.md

One row a problem: milliseconds of the whole module, with its projections, 256 channels in 8 heads, on the tensors that
the decoder gives (three, transposed) and, in training, with the backward to inputs and weights, under autocast as
Ultralytics trains. Samples are interleaved; the lowest, and the median in brackets.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from ultralytics.nn.modules.transformer import TransformerLayer
from ultralytics.utils import NUM_THREADS

from yolo_flash import BackendNotSupportedError, FlashConfig, __version__
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.machine import detect
from yolo_flash.patching.multihead import denoising_mask
from yolo_flash.patching.patch import patch_modules
from yolo_flash.utils.timing import clock_ms

MODES = ("predict", "train", "train, masked")
SECONDS = 2.0


def sample(call: Callable[[], None], device: torch.device) -> float:
    return clock_ms(call, device, 10 if device.type == "cuda" else 1)


def arm(owner: TransformerLayer, inputs: list[Tensor], mask: Tensor | None, mode: str) -> Callable[[], None]:
    device = inputs[0].device.type
    upstream = torch.randn_like(inputs[0].transpose(0, 1)).transpose(0, 1)

    def call() -> None:
        amp = torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")
        with torch.set_grad_enabled(mode != "predict"), amp:
            out = owner.ma(*inputs, attn_mask=mask)[0]
        if mode != "predict":
            out.backward(upstream.to(out.dtype))

    return call


def main(device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_num_threads(NUM_THREADS)
    threads = f"; {torch.get_num_threads()} CPU threads" if device.type == "cpu" else "; on the clock"
    print(f"{detect(device).with_versions}; yolo-flash {__version__}{threads}\n")
    print("| mode | batch | tokens | scores |", " | ".join(BACKENDS), "|")
    print("|" + " --- |" * (4 + len(BACKENDS)))
    stock = TransformerLayer(256, 8).to(device)
    for batch, tokens in [(1, n) for n in (16, 100, 225, 300, 400, 500)] + [(4, n) for n in (16, 100, 225, 300, 500)]:
        for mode in MODES:
            size = (batch, tokens, 256)
            inputs = [torch.randn(size, device=device).transpose(0, 1) for _ in range(3)]
            inputs = [x.requires_grad_(mode != "predict") for x in inputs]
            mask = denoising_mask(tokens, 2 * tokens // 5, max(1, tokens // 20), device) if "masked" in mode else None
            runs: dict[str, Callable[[], None]] = {}
            for name in BACKENDS:
                owner = copy.deepcopy(stock).train(mode != "predict").requires_grad_(mode != "predict")
                patch_modules(owner, FlashConfig(backend=name))
                runs[name] = arm(owner, inputs, mask, mode)
                try:
                    runs[name]()
                except BackendNotSupportedError:
                    del runs[name]
            times: dict[str, list[float]] = {name: [] for name in runs}
            end = time.perf_counter() + SECONDS
            while time.perf_counter() < end:
                for name, call in runs.items():
                    times[name].append(sample(call, device))
            cells = [f"{min(t):.3f} ({statistics.median(t):.3f})" if (t := times.get(n)) else "-" for n in BACKENDS]
            print(f"| {mode} | {batch} | {tokens} | {batch * 8 * tokens**2:,} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
