"""A training loop of one's own: a patched module is a module, and computes what it computed before."""

from __future__ import annotations

import argparse

import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from yolo_flash import patch_model, unpatch_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="yolo12n.yaml")
parser.add_argument("--imgsz", type=int, default=640)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--backend", default="auto", help="auto goes by earlier measurements, or by rules")
parser.add_argument("--steps", type=int, default=5)
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
network = YOLO(args.model).model.to(device, memory_format=torch.channels_last).train()
network.args = get_cfg()  # gains of Ultralytics' loss
patch_model(network, backend=args.backend)  # in place; the optimizer may be made before or after

images = torch.rand(args.batch, 3, args.imgsz, args.imgsz, device=device).to(memory_format=torch.channels_last)
batch = {  # one box in the middle of each picture, of the first class
    "img": images,
    "batch_idx": torch.arange(args.batch, device=device),
    "cls": torch.zeros(args.batch, 1, device=device),
    "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]], device=device).repeat(args.batch, 1),
}
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
for step in range(args.steps):
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        loss = network(batch)[0].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

torch.save(unpatch_model(network).state_dict(), "weights.pt")  # stock again; a patched one would save the same
