"""Machines as plain data, for decisions about cards that nobody has at hand."""

from __future__ import annotations

from typing import Any

from yolo_flash import Machine

_RECENT: dict[str, Any] = {
    "kind": "cuda",
    "torch": "2.11.0+cu130",
    "toolkit": "13.0",
    "cudnn": 91900,
    "packages": {"triton": "3.6.0"},
}

MACHINES = {
    "P100": Machine(name="Tesla P100", capability=(6, 0), **_RECENT),
    "V100": Machine(name="Tesla V100-SXM2-16GB", capability=(7, 0), **_RECENT),
    "T4": Machine(name="Tesla T4", capability=(7, 5), **_RECENT),
    "A100": Machine(name="NVIDIA A100-SXM4-40GB", capability=(8, 0), **_RECENT),
    "RTX 3090": Machine(name="NVIDIA GeForce RTX 3090", capability=(8, 6), **_RECENT),
    "RTX 4090": Machine(name="NVIDIA GeForce RTX 4090", capability=(8, 9), **_RECENT),
    "H100": Machine(name="NVIDIA H100 80GB HBM3", capability=(9, 0), **_RECENT),
    "H100 without Triton": Machine(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        **{**_RECENT, "packages": {"triton": "ModuleNotFoundError: No module named 'triton'"}},
    ),
    "B200": Machine(name="NVIDIA B200", capability=(10, 0), **_RECENT),
    "RTX 5090": Machine(name="NVIDIA GeForce RTX 5090", capability=(12, 0), **_RECENT),
    "MI300": Machine(kind="rocm", name="AMD Instinct MI300X", gcn="gfx942", torch="2.11.0+rocm7.1", toolkit="7.1"),
    "RX 7900": Machine(
        kind="rocm", name="AMD Radeon RX 7900 XTX", gcn="gfx1100", torch="2.11.0+rocm7.1", toolkit="7.1"
    ),
    "MPS": Machine(kind="mps", name="Apple GPU", torch="2.11.0"),
    "CPU": Machine(kind="cpu", name="AMD EPYC", torch="2.11.0"),
}
