"""Ask for backends by name, for all layers and for some; where one cannot run, its reasons say what would."""

from __future__ import annotations

import argparse

from ultralytics import YOLO

from yolo_flash import BackendNotSupportedError, patch_model, plan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo12n.yaml")
parser.add_argument("--backend", default="triton_area")
parser.add_argument("--layers", default="model.8.*", help="pattern of the layers that stay stock")
parser.add_argument("--imgsz", type=int, default=640)
parser.add_argument("--batch", type=int, default=16)
args = parser.parse_args()

model = YOLO(args.model)
try:
    patch_model(model, backend=args.backend, layers={args.layers: "stock"})
    rows = plan(model, imgsz=args.imgsz, batch=args.batch)
except BackendNotSupportedError as error:  # a name that does not exist, or a kernel that this device cannot run
    print(f"{error}\nSo auto decides, among backends whose backward gives the same bits every time.")
    patch_model(model, config="strict")  # a shipped file of settings; `config` may be one of your own
    rows = plan(model, imgsz=args.imgsz, batch=args.batch)
for row in rows:
    print(f"{row.mode:<6}{row.layer:<24}{row.decision.backend:<16}{row.decision.why}")
