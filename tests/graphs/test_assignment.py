"""Assignments without the host are those of Ultralytics' solver; the kernel compiles for cards that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from ultralytics.models.utils.ops import linear_sum_assignment

from tests.versions import needs_triton
from yolo_flash.graphs import assignment
from yolo_flash.graphs.assignment import assign

needs_triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COSTS = {
    "far apart": lambda costs: costs,
    "contested": lambda costs: costs * 0.01 + torch.linspace(0, 5, costs.shape[-1]),
    "negative": lambda costs: costs - 3,
    "large": lambda costs: costs * 1e30,
    "contested by pairs": lambda costs: costs * 0.1 + torch.arange(costs.shape[-1]) // 2,
}


def by_the_host(costs: Tensor, counts: Tensor) -> Tensor:
    layers, images, _, queries = costs.shape
    found = torch.full((layers, images, queries), -1)
    for layer in range(layers):
        for image, count in enumerate(counts.tolist()):
            rows, columns = linear_sum_assignment(costs[layer, image, :count].T)
            found[layer, image, torch.as_tensor(rows)] = torch.as_tensor(columns)
    return found


@pytest.mark.parametrize(
    ("boxes", "queries", "counts"), [(1, 1, [1, 0]), (5, 9, [5, 0, 3]), (6, 6, [6, 5]), (4, 33, [4]), (9, 7, [7])]
)
@pytest.mark.parametrize("name", COSTS)
def test_assignments_are_those_of_the_host(name: str, boxes: int, queries: int, counts: list[int]) -> None:
    source = torch.Generator().manual_seed(boxes)
    costs = COSTS[name](torch.rand(2, len(counts), boxes, queries, generator=source))
    of_images = torch.tensor(counts, dtype=torch.int32)
    found = assign(costs.contiguous().to(DEVICE), of_images.to(DEVICE)).cpu()
    assert torch.equal(found, by_the_host(costs, of_images))


def test_equal_costs_still_give_every_box_a_query_of_its_own() -> None:
    found = assign(torch.zeros(1, 2, 4, 6, device=DEVICE), torch.tensor([4, 2], dtype=torch.int32, device=DEVICE))
    assert [sorted(image.tolist()) for image in found[0]] == [[-1, -1, 0, 1, 2, 3], [-1, -1, -1, -1, 0, 1]]


def test_a_machine_without_triton_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assignment.not_supported_reason() == ""
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert assignment.not_supported_reason() == "boxes are matched without the host by triton >= 3.3, found 3.2.0"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert assignment.not_supported_reason().startswith("boxes are matched without the host by Triton: ")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from yolo_flash.graphs.assignment import _WARPS
from yolo_flash.graphs.assignment_triton import assign
numbers = dict.fromkeys(("images", "boxes", "queries"), "i32")
signature = {"costs": "*fp32", "counts": "*i32", "found": "*i64", **numbers, "WIDTH": "constexpr"}
for width, sm in ((2, 80), (512, 80), (512, 90), (512, 120)):
    source = ASTSource(assign, signature, {"WIDTH": width})
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": _WARPS})
    print(width, sm, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton compiles on Linux")
def test_it_compiles(tmp_path: Path) -> None:
    """In a process of its own: in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 80 True", "512 80 True", "512 90 True", "512 120 True"]
