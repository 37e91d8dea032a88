"""Every derivative is that of the stock block: of gradients, forward-mode, `torch.func`, with checkpoints and LoRA."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from ultralytics.nn.modules.transformer import AIFI, TransformerLayer

from tests.counting import AttentionCalls
from tests.patching.test_blocks import LAYOUTS, channels, error, make, patched
from tests.patching.test_multihead import randomise
from yolo_flash import FlashConfig
from yolo_flash.patching.multihead import denoising_mask
from yolo_flash.patching.patch import patch_modules, targets

KINDS = ["area1", "area4", "psa", "psa 36/72"]


class Masked(nn.Module):
    """RT-DETR's attention in training: every query has keys that it does not see."""

    def __init__(self) -> None:
        super().__init__()
        layer: Any = TransformerLayer(64, 8)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        mask = denoising_mask(x.shape[0], 6, 2, x.device)
        out: Tensor = self.layer.ma(x, x, x, attn_mask=mask)[0]
        return out


def case(kind: str, layout: str = "nchw") -> tuple[nn.Module, Tensor]:
    """A block in evaluation, and an input of two odd images or sequences."""
    if kind == "masked":
        return randomise(Masked()), torch.randn(13, 2, 64)
    if kind == "AIFI":
        return randomise(AIFI(64, 96, 8)).eval(), torch.randn(2, 64, 5, 3)
    block = make(kind, train=False).to(memory_format=LAYOUTS[layout])
    return block, torch.randn(2, channels(block), 7, 4).to(memory_format=LAYOUTS[layout])


def derivatives(module: nn.Module, x: Tensor, order: int = 2) -> list[Tensor]:
    """Of the squares of the gradient (of the squares of the gradient ...) of the input, by all that they depend on."""
    x = x.detach().requires_grad_()
    value = module(x).sin().square().sum()  # of which a norm at the end makes no constant
    for _ in range(order - 1):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.square().sum() / 10
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True)
    ]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    largest = max(wanted[1:], key=lambda t: float(t.norm()), default=wanted[0])
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert error(a, b, largest if i else b) < tolerance, i


# A gradient of a gradient ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, "masked", "AIFI"])
@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_math"])
def test_a_gradient_penalty_is_that_of_the_stock_block(kind: str, layout: str, backend: str) -> None:
    """It once was another number, without a word: the gradient of the gradient went round attention."""
    module, x = case(kind, layout)
    ours = patched(module, backend)
    truth = derivatives(copy.deepcopy(module).double(), x.double())
    with AttentionCalls() as calls:
        same(derivatives(ours, x), truth, 1e-4)
    assert calls.forward == ({"sdpa_flash": 1} if backend == "sdpa_flash" else {})
    same(derivatives(copy.deepcopy(ours).double(), x.double()), truth, 1e-9)


def test_under_auto_it_is_right_too() -> None:
    module = make("area1", train=False)
    x = torch.randn(4, 64, 16, 16)  # so large that the rules choose sdpa_flash
    with AttentionCalls() as calls:
        found = derivatives(patched(module, "auto"), x)
    assert calls.forward == {"sdpa_flash": 1}
    same(found, derivatives(module, x), 1e-4)


@pytest.mark.parametrize("kind", ["area4", "psa", "masked"])
def test_the_third_order_too(kind: str) -> None:
    module, x = case(kind)
    module, x = module.double(), x.double()
    same(derivatives(patched(module), x, 3), derivatives(module, x, 3), 1e-9)


@pytest.mark.parametrize("kind", ["area4", "masked"])
def test_a_batch_of_one_in_training(kind: str) -> None:
    """Against the batch doubled, as torch 2.14.1 has wrong gradients at batch 1; batch statistics are the same."""
    module, x = case(kind)
    module, one = module.double().train(), x.double()[:1] if kind == "area4" else x.double()[:, :1]
    (found, *_), (wanted, *_) = (
        derivatives(m, t)
        for m, t in ((patched(module), one), (module, torch.cat([one, one], dim=0 if kind == "area4" else 1)))
    )
    same([found], [wanted[:1] if kind == "area4" else wanted[:, :1]], 1e-9)


@pytest.mark.parametrize("kind", ["area4", "masked"])
def test_a_retained_graph_gives_it_twice_and_the_plain_gradient_stays_fused(kind: str) -> None:
    module, x = case(kind)
    results = []
    for block in (patched(module), module):
        leaf = x.clone().requires_grad_()
        out = block(leaf).square().sum()
        with AttentionCalls() as calls:
            (plain,) = torch.autograd.grad(out, leaf, retain_graph=True)
        assert calls.backward == ({"sdpa_flash": 1} if block is not module else {})
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        twice = [torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*twice)
        results.append([plain, grad.detach(), twice[0]])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["area4", "psa", "masked"])
def test_in_half_precision_it_is_as_exact_as_stock(kind: str, dtype: torch.dtype) -> None:
    module, x = case(kind)
    truth = derivatives(copy.deepcopy(module).double(), x.double())[0]
    with torch.autocast("cpu", dtype=dtype):
        ours, stock = (derivatives(m, x)[0] for m in (patched(module), module))
    assert error(ours, truth, truth) <= 2 * error(stock, truth, truth) + torch.finfo(dtype).eps


def test_a_compiled_graph_says_that_it_has_none() -> None:
    x = torch.randn(2, 64, 8, 8)
    torch._dynamo.reset()
    compiled: Any = torch.compile(patched(make("area4", train=False)), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="not currently support double backward"):
        derivatives(compiled, x)


# Transforms -----------------------------------------------------------------------------------------------------------
def forward_mode(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))).tangent


def batched_gradients(module: nn.Module, x: Tensor) -> Tensor:
    """Several gradients in one backward, which `vmap` looks on."""
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    many = torch.stack([torch.ones_like(out), out.detach()])
    return torch.autograd.grad(out, leaf, many, is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "forward mode": forward_mode,
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (x.cos(),))[1],
    "grad": lambda module, x: torch.func.grad(lambda t: module(t).square().sum())(x),
    "vmap": lambda module, x: torch.func.vmap(module)(torch.stack([x, 2 * x, x + 1])),
    "vjp": lambda module, x: torch.func.vjp(module, x)[1](x)[0],
    "jacrev": lambda module, x: torch.func.jacrev(lambda t: module(t).mean((-1, -2)))(x),
    "grad of weights": lambda module, x: torch.func.grad(
        lambda w: torch.func.functional_call(module, w, (x,)).square().sum()
    )({name: p.detach() for name, p in module.named_parameters()})[next(n for n, _ in module.named_parameters())],
    "batched gradients": batched_gradients,
    "hessian vector product": lambda module, x: torch.autograd.functional.hvp(lambda t: module(t).sum(), x, x.cos())[1],
}


@pytest.mark.parametrize("kind", ["area4", "psa", "masked"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_stock_and_nothing_is_taken_for_failed(name: str, kind: str) -> None:
    module, x = case(kind)
    for backend in ("sdpa_flash", "sdpa_math", "auto"):
        ours: Any = patched(module, backend)
        torch.testing.assert_close(
            TRANSFORMS[name](ours, x), TRANSFORMS[name](module, x), rtol=1e-3, atol=1e-4, msg=backend
        )
        block: Any = next(iter(targets(ours if kind == "masked" else nn.Sequential(ours)).values()))
        assert not block._flash_dispatcher.failed
        with AttentionCalls() as calls, torch.no_grad():
            ours(x)
        assert calls.forward == ({"sdpa_flash": 1} if backend == "sdpa_flash" else {})


# What wraps a block ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["area4", "psa", "masked"])
def test_checkpoints_give_the_gradients_of_stock(kind: str, reentrant: bool) -> None:
    module, x = case(kind)
    run = functools.partial(checkpoint, use_reentrant=reentrant)
    found: list[list[Tensor]] = []
    for block, call in ((patched(module), run), (module, lambda m, t: m(t))):
        leaf = x.clone().requires_grad_()
        weights = list(block.parameters())
        for weight in weights:
            weight.grad = None
        call(block, leaf).square().sum().backward()
        found.append([leaf.grad, *(w.grad for w in weights if w.grad is not None)])  # type: ignore[list-item]
    same(found[0], found[1], 1e-4)


def test_a_gradient_penalty_through_a_checkpoint() -> None:
    module, x = case("area4")

    class Again(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, t: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, t, use_reentrant=False)
            return out

    same(derivatives(Again(patched(module)), x), derivatives(module, x), 1e-4)


class LowRank(nn.Module):
    """LoRA: a weight plus a product of two thin matrices, which alone are trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()) * 0.1)
        self.up = nn.Parameter(torch.randn(weight.shape[0], 2) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["area4", "psa"])
def test_lora_by_parametrization(kind: str, when: str) -> None:
    module, x = case(kind)
    ours: Any = patched(module)
    stock: Any = copy.deepcopy(module)
    for block in (stock, ours):
        torch.manual_seed(1)
        parametrize.register_parametrization(block.qkv.conv, "weight", LowRank(block.qkv.conv.weight))
        block.requires_grad_(False)
        block.qkv.conv.parametrizations.requires_grad_(True)
    if when == "before":
        patch_modules(ours, FlashConfig(backend="sdpa_flash"))
    with AttentionCalls() as calls:
        found = derivatives(ours, x, 1)
    assert calls.forward == calls.backward == {"sdpa_flash": 1}
    wanted = derivatives(stock, x, 1)
    assert len(found) == 4  # of the input, the original weight, and two thin matrices
    same(found, wanted, 1e-4)
