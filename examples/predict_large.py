"""Predict a picture of thousands of pixels: memory grows with the pixels, and not with their square."""

from __future__ import annotations

import argparse

import torch
from ultralytics import YOLO
from ultralytics.utils import ASSETS

from yolo_flash import patch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo12n.pt", help="your weights; a YAML has none, and finds nothing")
parser.add_argument("--source", default=str(ASSETS / "bus.jpg"))
parser.add_argument("--imgsz", type=int, default=4096, help="longer side: that of the picture, for native resolution")
parser.add_argument("--max-det", type=int, default=20_000, help="a large picture of small objects has thousands")
args = parser.parse_args()

model = patch_model(YOLO(args.model), config="high_resolution")
(result,) = model.predict(args.source, imgsz=args.imgsz, max_det=args.max_det, save=True)
height, width = result.orig_shape
print(f"{len(result.boxes)} objects in {width} x {height} pixels, read at {args.imgsz}; drawn in {result.save_dir}")
if torch.cuda.is_available():
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
