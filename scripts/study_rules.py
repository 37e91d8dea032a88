"""Measure every backend that runs here in the real blocks: the numbers behind the rules of `auto` and docs/results.

    python scripts/study_rules.py [cpu|cuda] [repeats] > docs/results/rules-<device>.md

One row a layer: milliseconds of the whole block (both 1x1 convolutions, attention, positional convolution), median and
range over interleaved repeats in one process. Training is forward and backward under autocast as Ultralytics trains;
predict is forward alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.utils import NUM_THREADS

from yolo_flash import BackendNotSupportedError, FlashConfig, __version__
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.machine import detect
from yolo_flash.patching.patch import patch_modules
from yolo_flash.utils.timing import clock_ms, events_ms

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "area 4": lambda heads: AAttn(32 * heads, heads, 4),
    "area 1": lambda heads: AAttn(32 * heads, heads, 1),
    "PSA": lambda heads: Attention(64 * heads, heads),
}
# block, heads, batch, side of the feature map
TRAIN = [
    *[("area 4", 2, 64, 40), ("area 1", 4, 64, 20), ("area 4", 12, 16, 40), ("area 4", 8, 4, 80), ("area 1", 4, 4, 64)],
    *[("PSA", 2, 64, 20), ("PSA", 2, 16, 20), ("PSA", 4, 4, 40), ("PSA", 2, 4, 80)],
]
PREDICT = [
    *[("area 4", 2, 1, 40), ("area 1", 4, 1, 20), ("area 4", 12, 1, 40), ("area 4", 8, 1, 80), ("area 1", 4, 1, 64)],
    *[("PSA", 2, 1, 20), ("PSA", 6, 1, 20), ("PSA", 4, 1, 40), ("PSA", 2, 1, 80)],
    *[("area 4", 2, 16, 40), ("PSA", 2, 16, 20)],
]


def milliseconds(runs: dict[str, Callable[[], None]], repeats: int, on_gpu: bool) -> dict[str, list[float]]:
    """Times of every run, interleaved; on a GPU a sample is the mean of 10 calls between two events."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for call in runs.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in runs.items():
            if on_gpu:
                torch.cuda._sleep(80_000_000)  # the launches queue up behind it, so that Python's time is not measured
                times[name].append(events_ms(call, 10) / 10)
            else:
                times[name].append(clock_ms(call, torch.device("cpu")))
    return times


def measure(
    kind: str,
    heads: int,
    batch: int,
    side: int,
    dtype: torch.dtype,
    layout: str,
    train: bool,
    repeats: int,
    device: str,
) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    stock = BLOCKS[kind](heads).to(device).to(memory_format=LAYOUTS[layout]).train(train)  # type: ignore[call-overload]
    x = torch.randn(batch, stock.proj.conv.out_channels, side, side, device=device)  # type: ignore[union-attr, arg-type]
    x = x.to(memory_format=LAYOUTS[layout])
    weight = torch.randn_like(x)
    runs: dict[str, Callable[[], None]] = {}
    for name in BACKENDS:
        block = BLOCKS[kind](heads).to(device).to(memory_format=LAYOUTS[layout]).train(train)  # type: ignore[call-overload]
        patch_modules(block, FlashConfig(backend=name))

        def call(block: nn.Module = block) -> None:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32), torch.set_grad_enabled(train):
                out = block(x.detach().requires_grad_(train))
            if train:
                torch.autograd.backward(out, weight.to(out.dtype))

        try:
            call()
            runs[name] = call
        except (BackendNotSupportedError, torch.OutOfMemoryError):
            continue
    times = milliseconds(runs, repeats, device == "cuda")
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    cells = []
    for name in BACKENDS:
        if name not in times:
            cells.append("-")
            continue
        text = f"{medians[name]:.3f} ({min(times[name]):.3f}..{max(times[name]):.3f})"
        cells.append(f"**{text}**" if name == best else text)
    tokens = side * side // (4 if kind == "area 4" else 1)
    mode = "train" if train else "predict"
    return (
        f"| {mode} | {kind} | {heads} | {batch} | {tokens} | {str(dtype)[6:]} | {layout} | " + " | ".join(cells) + " |"
    )


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    machine = detect(torch.device(device))
    if device == "cpu":
        torch.set_num_threads(NUM_THREADS)  # as Ultralytics does
    print(f"{machine.with_versions}; yolo-flash {__version__}; {torch.get_num_threads()} CPU threads\n")
    print("| mode | block | heads | batch | tokens | dtype | layout | " + " | ".join(BACKENDS) + " |")
    print("| --- " * (7 + len(BACKENDS)) + "|")
    if device == "cuda":
        half = torch.float16
        for case in TRAIN:
            print(measure(*case, half, "nhwc", True, repeats, device), flush=True)
        for case in (TRAIN[0], TRAIN[4], TRAIN[6], TRAIN[8]):
            print(measure(*case, torch.float32, "nhwc", True, repeats, device), flush=True)
        for dtype, layout in ((half, "nhwc"), (half, "nchw"), (torch.float32, "nchw")):
            for case in PREDICT:
                print(measure(*case, dtype, layout, False, repeats, device), flush=True)
    else:
        single = torch.float32
        for side in (4, 10, 14, 20, 28, 32, 40):
            for kind, heads in (("area 4", 2), ("area 1", 4), ("PSA", 2)):
                for batch in (1, 8) if side < 32 else (1,):
                    print(measure(kind, heads, batch, side, single, "nchw", True, repeats, device), flush=True)
                    print(measure(kind, heads, batch, side, single, "nhwc", False, repeats, device), flush=True)
                    print(measure(kind, heads, batch, side, single, "nchw", False, repeats, device), flush=True)


if __name__ == "__main__":
    main()
