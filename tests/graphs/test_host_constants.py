"""Tensors of the host that a network takes to the device: once, and only if they are always the same."""

from __future__ import annotations

import pytest
import torch

from yolo_flash.graphs.host_constants import HostConstants

THERE = torch.device("meta")  # any device that is not the host


def test_each_tensor_of_the_host_is_copied_once() -> None:
    constants = HostConstants()
    image = torch.zeros(4, 5, device=THERE)
    copies = []
    for _ in range(2):
        with constants:
            rows = torch.arange(3)
            moved = rows.to(THERE)
            alike = torch.arange(2).type_as(image)
            picked = image[rows, torch.arange(3)]
            stays = rows.to(torch.float32), rows[1:], image[0]
        copies.append((moved, [copy for _, copy in constants._kept]))
        assert (alike.device, alike.dtype, picked.shape) == (THERE, image.dtype, (3,))
        assert [value.device.type for value in stays] == ["cpu", "cpu", "meta"]
    assert len(constants._kept) == 4
    assert copies[0][0] is copies[1][0]
    assert all(a is b for a, b in zip(copies[0][1], copies[1][1], strict=True))
    assert torch.arange(3).to(THERE) is not copies[0][0]  # outside of it


@pytest.mark.parametrize("other", [torch.tensor([0, 1, 3]), torch.arange(4), torch.arange(3.0)])
def test_another_tensor_in_its_place_is_an_error(other: torch.Tensor) -> None:
    constants = HostConstants()
    for numbers in (torch.arange(3), torch.arange(3)):
        with constants:
            numbers.to(THERE)
    with constants, pytest.raises(RuntimeError, match="other tensors in every call"):
        other.to(THERE)
