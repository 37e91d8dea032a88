"""Gradients that ranks average by themselves are those of DistributedDataParallel, on two CPU ranks with gloo."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yolo_flash.graphs.ddp import RankAverage

CASES = (
    "plain",
    "complete",  # on rank 1, where every trained parameter has a gradient
    "accumulated",
    "second step",
    "taken over in between",
    "given back",
    "frozen and woken",
    "frozen in between",
)
WORLD = 2


class Net(nn.Module):
    """Some parameters take part on rank 1 alone, or on none."""

    def __init__(self, never: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.seldom = nn.Linear(8, 4)
        self.always = nn.Linear(8, 4)
        self.never = nn.Linear(8, 4).requires_grad_(never)
        self.frozen = nn.Linear(8, 4).requires_grad_(False)

    def forward(self, images: Tensor, seldom: bool) -> Tensor:
        x = self.norm(self.conv(images)).mean((2, 3))
        y: Tensor = self.always(x) + self.frozen(x)
        return y + self.seldom(x) if seldom else y


def a_network(never: bool = True) -> DistributedDataParallel:
    torch.manual_seed(0)
    net = Net(never).to(memory_format=torch.channels_last)
    return DistributedDataParallel(net, find_unused_parameters=True)


def backward(model: nn.Module, batch: int, seldom: bool | None = None) -> None:
    source = torch.Generator().manual_seed(10 * batch + dist.get_rank())
    images = torch.rand(2, 3, 8, 8, generator=source)
    seldom = dist.get_rank() == 1 if seldom is None else seldom
    (model(images, seldom=seldom).square().sum() * WORLD).backward()


def step_of(case: str, ours: bool) -> dict[str, Any]:
    """Gradients that an optimizer would see, and whether DDP averages them."""
    model = a_network(never=case != "complete")
    always = model.module.always
    if case == "frozen and woken":
        always.requires_grad_(False)
    if case in ("frozen and woken", "taken over in between"):
        backward(model, 0)
    ranks = RankAverage(model) if ours else None
    if case == "frozen and woken":
        if ranks is not None:
            ranks.average()
        model.zero_grad()
        always.requires_grad_(True)
    if case == "second step":
        backward(model, 0, seldom=True)
        if ranks is not None:
            ranks.average()
        model.zero_grad()
    backward(model, 1)
    if case == "frozen in between":
        always.requires_grad_(False)
    if case in ("accumulated", "frozen in between"):
        backward(model, 2)
    if ranks is not None:
        ranks.average()
        assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)
    if case == "given back":
        if ranks is not None:
            ranks.close()
        backward(model, 2)
    return {
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.module.named_parameters()},
        "synchronises": model.require_backward_grad_sync,
    }


def second_step_has_buffers_of_rank_0() -> bool:
    """DDP sends them before a forward, unless it was told not to."""
    model = a_network()
    ranks = RankAverage(model)
    backward(model, 1)
    ranks.average()
    with torch.no_grad():
        mean = model.module.norm.running_mean.clone()
        dist.broadcast(mean, 0)
    model.eval()
    backward(model, 2)
    return torch.equal(model.module.norm.running_mean, mean)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {(case, ours): step_of(case, ours) for case in CASES for ours in (False, True)}
    torch.save({"steps": found, "buffers": second_step_has_buffers_of_rank_0()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload(["yolo_flash.graphs.ddp"])  # imported once for all ranks
    mp.start_processes(work, (str(folder),), nprocs=WORLD, start_method=method)
    return [torch.load(Path(folder, f"rank{rank}.pt")) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_ddp(found: list[dict[str, Any]], case: str) -> None:
    for rank in range(WORLD):
        wanted, ours = (found[rank]["steps"][case, who]["gradients"] for who in (False, True))
        assert {name for name, gradient in wanted.items() if gradient is None} == {
            "never.weight", "never.bias", "frozen.weight", "frozen.bias",
        }  # fmt: skip
        for name, gradient in wanted.items():
            if gradient is None:
                assert ours[name] is None, name
            else:
                torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same(found: list[dict[str, Any]], case: str) -> None:
    first, second = (found[rank]["steps"][case, True]["gradients"] for rank in range(WORLD))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_model_averages_by_itself_again_when_it_is_given_back(found: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        steps = found[rank]["steps"]
        assert steps["given back", True]["synchronises"]
        assert not steps["plain", True]["synchronises"]


def test_buffers_are_sent_as_often_as_gradients(found: list[dict[str, Any]]) -> None:
    assert [found[rank]["buffers"] for rank in range(WORLD)] == [True, True]
