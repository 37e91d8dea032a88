"""Prove that fused attention runs: torch's own profiler, around a prediction of the stock and of the patched model."""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile
from ultralytics import YOLO
from ultralytics.utils import ASSETS

from yolo_flash import patch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo12n.yaml")
parser.add_argument("--source", default=str(ASSETS / "bus.jpg"))
parser.add_argument("--imgsz", type=int, default=640)
parser.add_argument("--backend", default="auto", help="auto may take stock where nothing else is faster")
args = parser.parse_args()


def operators_of_attention(model: YOLO) -> Counter[str]:
    """Calls of each operator of attention in one prediction; stock attention has none, it is two matrix products."""
    model.predict(args.source, imgsz=args.imgsz, verbose=False)  # a first one may measure and compile
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        model.predict(args.source, imgsz=args.imgsz, verbose=False)
    names = Counter({event.key: event.count for event in found.key_averages()})
    return Counter({name: count for name, count in names.items() if "attention" in name or "flash" in name})


stock = YOLO(args.model)
print("stock:  ", dict(operators_of_attention(stock)) or "no fused attention")
print("patched:", dict(operators_of_attention(patch_model(stock, backend=args.backend))) or "no fused attention")
