"""Train a YOLO with fused attention: one line more than without."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ultralytics import YOLO

from yolo_flash import patch_model, plan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo12n.yaml")
parser.add_argument("--data", default="coco8.yaml")
parser.add_argument("--imgsz", type=int, default=640)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--workers", type=int, default=8)
parser.add_argument("--device", help="cpu, 0, 0,1; the GPU if there is one")
args = parser.parse_args()

model = patch_model(YOLO(args.model))
size = {"imgsz": args.imgsz, "batch": args.batch, "device": args.device}
for row in plan(model, **size):
    print(f"{row.mode:<6}{row.layer:<24}{row.decision.backend:<16}{row.decision.summary()}")

model.train(data=args.data, epochs=args.epochs, workers=args.workers, **size)
folder = Path(model.trainer.save_dir)

# One step of the run was profiled: these operators of attention really ran in it.
events = [json.loads(line) for line in (folder / "flash.jsonl").read_text(encoding="utf-8").splitlines()]
for event in events:
    if event["event"] == "kernels":
        print(f"one step ran {event['counts'] or 'no fused attention'}")

print(f"{model.trainer.best} is a plain Ultralytics checkpoint: `yolo predict model=...` needs no plugin")
