"""On a card: gradients of gradients, transforms, edits and empty batches are those of the stock block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn

from tests.counting import AttentionCalls
from tests.patching.test_blocks import channels, error, make, patched
from tests.patching.test_derivatives import Masked, derivatives
from tests.patching.test_edits import double_scale
from tests.patching.test_multihead import randomise
from yolo_flash import BackendNotSupportedError, patch_model
from yolo_flash.patching.blocks import FlashBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


HALF = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "triton_area")


def case(kind: str) -> tuple[nn.Module, Tensor]:
    """A block in evaluation, and an input of two odd images or sequences, on the card."""
    if kind == "masked":
        return randomise(Masked()).cuda(), torch.randn(13, 2, 64, device="cuda")
    block = make(kind, train=False).cuda()
    x = torch.randn(2, channels(block), 12, 10, device="cuda")
    return block.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["area1", "area4", "psa", "masked"])
def test_a_gradient_penalty_in_float32(kind: str) -> None:
    module, x = case(kind)
    truth = derivatives(copy.deepcopy(module).double(), x.double())
    with AttentionCalls() as calls:
        found = derivatives(patched(module, "sdpa_efficient"), x)
    assert calls.forward == {"sdpa_efficient": 1}
    for a, b in zip(found, truth, strict=True):
        assert error(a, b, truth[0] if b.norm() < 1e-3 * truth[0].norm() else b) < 2e-3


@pytest.mark.parametrize("backend", HALF)
@pytest.mark.parametrize("kind", ["area4", "psa"])
def test_a_gradient_penalty_in_half_precision(kind: str, backend: str) -> None:
    """As near to float64 as stock is, twice its error and a little allowed."""
    module, x = case(kind)
    truth = derivatives(copy.deepcopy(module).double(), x.double())[0]
    with torch.autocast("cuda", torch.float16):
        stock = derivatives(module, x)[0]
        with AttentionCalls() as calls:
            found = derivatives(patched(module, backend), x)[0]
    assert calls.forward == {backend: 1}
    assert error(found, truth, truth) <= 2 * error(stock, truth, truth) + 5e-3


def test_a_class_level_forward_and_an_edit_run_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    module, x = case("area4")
    ours = patch_model(nn.Sequential(copy.deepcopy(module)))
    own = AAttn.forward

    def mine(self: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return own(self, x)

    monkeypatch.setattr(AAttn, "forward", mine)
    ours(x)
    assert calls == [1]
    monkeypatch.undo()
    psa, x = case("psa")
    ours = patch_model(nn.Sequential(copy.deepcopy(psa)))
    for block in (psa, ours[0]):
        double_scale(block)
    with torch.no_grad():
        assert error(ours(x), psa(x), psa(x)) < 1e-5
    named = patch_model(nn.Sequential(copy.deepcopy(make("psa").cuda())), backend="sdpa_efficient")
    double_scale(named[0])
    with pytest.raises(BackendNotSupportedError):
        named(x)


@pytest.mark.parametrize("kind", ["area4", "psa", "masked"])
def test_transforms_leave_every_backend_in_force(kind: str) -> None:
    module, x = case(kind)
    ours = patched(module, "auto")
    given = (x, torch.randn_like(x))
    for a, b in zip(*(torch.func.jvp(m, (given[0],), (given[1],)) for m in (ours, module)), strict=True):
        assert error(a, b, b) < 1e-5
    assert all(not block._flash_dispatcher.failed for block in ours.modules() if isinstance(block, FlashBlock))


@pytest.mark.parametrize("backend", ["auto", *HALF])
def test_no_images_give_no_images(backend: str) -> None:
    for kind in ("area4", "psa"):
        module, x = case(kind)
        with torch.autocast("cuda", torch.float16):
            out = patched(module, backend)(x[:0])
        assert out.shape == x[:0].shape
