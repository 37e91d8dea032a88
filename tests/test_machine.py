"""A machine is plain data with names that people know."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.machines import MACHINES
from yolo_flash import machine as machine_module
from yolo_flash.machine import Machine, cudnn_release, detect


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [
        ("V100", "Volta"),
        ("T4", "Turing"),
        ("A100", "Ampere"),
        ("RTX 3090", "Ampere"),
        ("RTX 4090", "Ada"),
        ("H100", "Hopper"),
        ("B200", "Blackwell"),
        ("RTX 5090", "Blackwell"),
        ("P100", "Pascal"),
        ("MI300", "gfx942"),
        ("MPS", "MPS"),
        ("CPU", "CPU"),
    ],
)
def test_architecture(machine: str, architecture: str) -> None:
    assert MACHINES[machine].architecture == architecture


def test_a_card_is_told_with_its_capability() -> None:
    assert str(MACHINES["T4"]) == "Tesla T4 (Turing, compute capability 7.5)"
    assert str(MACHINES["MI300"]) == "AMD Instinct MI300X (gfx942)"
    assert Machine(kind="cuda", name="GTX 780", capability=(3, 5)).architecture == "older than Maxwell"


def test_versions_are_numbers() -> None:
    assert MACHINES["H100"].release == (2, 11, 0)
    assert cudnn_release(91501) == "9.15.1"
    assert MACHINES["CPU"].with_versions == "AMD EPYC (CPU), torch 2.11.0"
    assert MACHINES["T4"].with_versions.endswith("capability 7.5), torch 2.11.0+cu130, cuDNN 9.19.0")
    assert cudnn_release(8907) == "8.9.7"


def test_detect_reads_this_cpu() -> None:
    machine = detect(torch.device("cpu"))
    assert machine.kind == "cpu"
    assert machine.capability is None
    assert machine.torch == torch.__version__
    assert "Python" in machine.system
    assert machine.packages["triton"][0].isdigit() or "Error" in machine.packages["triton"]


def test_import_initialises_no_cuda_and_patches_nothing() -> None:
    code = """
import torch
from torch.nn import functional as F
from ultralytics.nn.modules.block import AAttn

before = F.scaled_dot_product_attention, torch.nn.Module.__call__, AAttn.forward
import yolo_flash, yolo_flash.cli

assert callable(yolo_flash.plan) and callable(yolo_flash.checks)
assert not torch.cuda.is_initialized()
assert before == (F.scaled_dot_product_attention, torch.nn.Module.__call__, AAttn.forward)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build", "580.82.07"),
        ("something else", None),
    ],
)
def test_the_driver_is_read_from_its_file(text: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module.Path, "read_text", lambda self, encoding: text)
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion", raising=False)
    assert machine_module._driver() == version
