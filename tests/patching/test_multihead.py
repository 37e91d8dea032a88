"""nn.MultiheadAttention of RT-DETR and C3TR: equal to float64, RT-DETR's mask included; stock to the world."""

from __future__ import annotations

import copy
import dataclasses
import io
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.models.utils.ops import get_cdn_group
from ultralytics.nn.modules.block import C3TR
from ultralytics.nn.modules.transformer import (
    AIFI,
    DeformableTransformerDecoderLayer,
    TransformerEncoderLayer,
    TransformerLayer,
)

from tests.counting import AttentionCalls
from tests.versions import TORCH
from yolo_flash import AttentionSpec, BackendNotSupportedError, FlashConfig, FlashKernelError
from yolo_flash.backends import sdpa
from yolo_flash.backends.calls import Inputs
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.patching.multihead import FlashMultiheadAttention, denoising_mask
from yolo_flash.patching.patch import patch_modules, targets, unpatch_modules

Case = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]


def randomise(module: nn.Module) -> nn.Module:
    """Biases of attention are born zero, and its first weights small: they would hide an error."""
    for name, parameter in module.named_parameters():
        if "in_proj" in name or "out_proj" in name:
            parameter.data.normal_(std=1.0 if "in_proj_weight" in name else 0.5).div_(parameter.shape[-1] ** 0.5)
    return module


def decoder(
    queries: int, denoising: int = 0, group: int = 4
) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A decoder layer with a call that has everything but the queries ready."""
    shapes = [(4, 4), (2, 2)]
    layer = DeformableTransformerDecoderLayer(64, 8, 96, n_levels=2, n_points=2)
    feats, boxes = torch.randn(1, 20, 64), torch.rand(1, queries, 4)
    mask = denoising_mask(queries, denoising, group) if denoising else None
    position = torch.randn(1, queries, 64)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        many = len(x)
        return module(
            x,
            boxes.to(x.dtype).expand(many, -1, -1),
            feats.to(x.dtype).expand(many, -1, -1),
            shapes,
            attn_mask=mask,
            query_pos=position.to(x.dtype).expand(many, -1, -1),
        )

    return layer, call


class Nothing(nn.Module):
    """In the place of the attention to the image."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return torch.zeros_like(x)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def case(kind: str, batch: int) -> Case:
    """A block with its call, and the size of its input."""
    if kind == "AIFI":
        return AIFI(64, 96, 8), plain, (batch, 64, 5, 7)
    if kind == "AIFI before norm":
        return AIFI(48, 96, 4, normalize_before=True), plain, (batch, 48, 4, 3)
    if kind == "encoder without positions":
        return TransformerEncoderLayer(64, 96, 8), plain, (batch, 13, 64)
    if kind == "decoder":
        return *decoder(13), (batch, 13, 64)
    if kind == "decoder with denoising":
        return *decoder(21, 8), (batch, 21, 64)
    if kind == "TransformerLayer":
        return TransformerLayer(64, 4), plain, (11, batch, 64)
    assert kind == "one token"
    return TransformerLayer(64, 4), plain, (1, batch, 64)


KINDS = [
    "AIFI",
    "AIFI before norm",
    "encoder without positions",
    "decoder",
    "decoder with denoising",
    "TransformerLayer",
    "one token",
]


def patched(module: nn.Module, backend: str = "sdpa_flash") -> Any:
    module = copy.deepcopy(module)
    patch_modules(module, FlashConfig(backend=backend))
    return module


def run(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `sum(output * weight)`."""
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_()
    out = call(module, x)
    (out * weight).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "grad x": x.grad, **grads}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; of the bias of the keys, whose gradient is zero but for rounding, against the largest."""
    assert found.keys() == truth.keys()
    largest = max(float(t.norm()) for name, t in truth.items() if name.startswith("grad "))
    return {
        name: float((value.double() - truth[name]).norm())
        / (float(truth[name].norm()) if name in ("out", "grad x") else largest)
        for name, value in found.items()
    }


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_with_all_gradients(kind: str, batch: int, train: bool) -> None:
    module, call, size = case(kind, batch)
    randomise(module).train(train)
    x, weight = torch.randn(size), torch.randn(size)
    truth = run(copy.deepcopy(module).double(), call, x.double(), weight.double())
    assert any("in_proj_weight" in name for name in truth)
    assert any("out_proj.bias" in name for name in truth)
    for backend in ("sdpa_flash", "sdpa_math"):
        with AttentionCalls() as calls:
            ours = run(patched(module, backend), call, x, weight)
        if backend == "sdpa_flash":
            assert calls.forward == calls.backward == {"sdpa_flash": 1}
        for name, found in errors(ours, truth).items():
            assert found < 1e-5, f"{backend} {name}"


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_exact_as_stock_in_half_precision(kind: str, dtype: torch.dtype, how: str) -> None:
    module, call, size = case(kind, 2)
    randomise(module)
    x, weight = torch.randn(size), torch.randn(size)
    if kind.startswith("decoder"):  # whose sampling points jump over the borders of pixels, and its ReLU over zero
        module.cross_attn, module.act = Nothing(), nn.GELU()
    truth = run(copy.deepcopy(module).double(), call, x.double(), weight.double())
    if how == "weights":
        module, x, weight = module.to(dtype), x.to(dtype), weight.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"), AttentionCalls() as calls:
        ours = run(patched(module), call, x, weight)
        stock = run(module, call, x, weight)
    assert calls.forward == calls.backward == {"sdpa_flash": 1}
    assert ours["out"].dtype is stock["out"].dtype
    limits = errors(stock, truth)
    for name, found in errors(ours, truth).items():
        assert found <= 2 * limits[name] + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("batch_first", [True, False])
def test_either_order_of_dimensions_in_any_memory(batch_first: bool) -> None:
    owner: Any = TransformerLayer(64, 8)
    owner.ma = randomise(nn.MultiheadAttention(64, 8, batch_first=batch_first))
    ours = patched(owner)
    mask = denoising_mask(9, 4, 2)
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        memory = [(3, 9) if batch_first else (9, 3), 64]
        size = (*memory[0], 64)  # type: ignore[misc]
        back = tuple(order.index(i) for i in range(3))
        q, k, v = (torch.randn([size[i] for i in order]).permute(back) for _ in range(3))
        assert q.shape == size
        want = owner.ma(q, k, v, attn_mask=mask)[0]
        out, weights = ours.ma(q, k, v, attn_mask=mask)
        assert weights is None
        assert out.shape == want.shape
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_no_bias() -> None:
    owner: Any = TransformerLayer(64, 8)
    owner.ma = nn.MultiheadAttention(64, 8, bias=False)
    x = torch.randn(7, 2, 64)
    torch.testing.assert_close(patched(owner)(x), owner(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patched(owner).ma(x, x, x)[0], owner.ma(x, x, x)[0], rtol=1e-5, atol=1e-5)


# Masks ----------------------------------------------------------------------------------------------------------------
def test_the_mask_is_that_of_rtdetr() -> None:
    batch = {
        "cls": torch.arange(5),
        "bboxes": torch.rand(5, 4),
        "batch_idx": torch.tensor([0, 0, 0, 1, 1]),
        "gt_groups": [3, 2],
    }
    embed = torch.randn(80, 16)
    _, _, mask, meta = get_cdn_group(batch, 80, 30, embed, 20, 0.5, 1.0, True)
    assert mask is not None
    assert meta is not None
    denoising, queries = meta["dn_num_split"]
    assert torch.equal(mask, denoising_mask(denoising + queries, denoising, denoising // meta["dn_num_group"]))


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_math"])
def test_a_masked_key_is_not_seen_and_another_is(backend: str) -> None:
    module = randomise(TransformerLayer(64, 8))
    attention = patched(module, backend).ma
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2, 7] = True
    x = torch.randn(10, 2, 64)
    moved = x.clone()
    moved[7] += 1
    before, after = attention(x, x, x, attn_mask=mask)[0], attention(x, moved, moved, attn_mask=mask)[0]
    changed = (after - before).abs().amax(dim=(1, 2))
    assert changed[2] == 0
    assert (changed[torch.arange(10) != 2] > 1e-3).all()


def test_a_row_without_keys_is_never_worse_than_stock() -> None:
    module: Any = randomise(TransformerLayer(64, 8))
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[3] = True
    x = torch.randn(10, 2, 64)
    want = module.ma(x, x, x, attn_mask=mask)[0]
    for backend in ("sdpa_flash", "sdpa_math"):
        out = patched(module, backend).ma(x, x, x, attn_mask=mask)[0]
        assert want[3].isnan().all()  # stock divides by zero
        rest = torch.arange(10) != 3
        torch.testing.assert_close(out[rest], want[rest], rtol=1e-5, atol=1e-5)


# Whose attention it is ------------------------------------------------------------------------------------------------
def test_the_layers_of_ultralytics_are_found() -> None:
    model = nn.ModuleDict({"a": AIFI(64, 96, 8), "b": C3TR(32, 64, 2), "c": decoder(3)[0]})
    assert list(targets(model)) == ["a.ma", "b.m.tr.0.ma", "b.m.tr.1.ma", "c.self_attn"]
    patch_modules(model, FlashConfig())
    assert all(type(block) is FlashMultiheadAttention for block in targets(model).values())


class Reads(TransformerLayer):
    """A user's layer, which may read the weights."""


class Subclass(nn.MultiheadAttention):
    """A user's attention."""


def test_what_may_read_the_weights_is_left_alone() -> None:
    owner: Any = TransformerLayer(64, 8)
    owner.ma = Subclass(64, 8)
    shared: Any = TransformerLayer(64, 8)
    elsewhere = nn.ModuleDict({"layer": shared, "reader": nn.Sequential(shared.ma)})
    for module in (nn.MultiheadAttention(64, 8), nn.TransformerEncoderLayer(64, 8), Reads(64, 8), owner, elsewhere):
        assert not targets(module)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ({}, {"need_weights": True}),
        ({}, {"average_attn_weights": False}),
        ({}, {"key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)}),
        ({}, {"attn_mask": torch.zeros(9, 9)}),
        ({}, {"attn_mask": torch.zeros(16, 9, 9, dtype=torch.bool)}),
        ({}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1), "is_causal": True}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
        ({"dropout": 0.5}, {}),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_other_calls_run_stock(make: dict[str, Any], arguments: dict[str, Any]) -> None:
    owner: Any = TransformerLayer(64, 8)
    owner.ma = nn.MultiheadAttention(64, 8, **make)
    ours = patched(owner).ma
    assert type(ours) is FlashMultiheadAttention
    x = torch.randn(9, 2, 64)
    torch.manual_seed(1)
    want = owner.ma(x, x, x, **arguments)
    torch.manual_seed(1)
    with AttentionCalls() as calls:
        found = ours(x, x, x, **arguments)
    assert not calls.forward
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])


def test_dropout_is_nothing_in_evaluation() -> None:
    owner: Any = TransformerLayer(64, 8)
    owner.ma = nn.MultiheadAttention(64, 8, dropout=0.5)
    with AttentionCalls() as calls:
        patched(owner).eval()(torch.randn(9, 2, 64))
    assert calls.forward == {"sdpa_flash": 1}


def test_other_widths_lengths_and_unbatched_tokens_run_stock() -> None:
    owner: Any = TransformerLayer(64, 8)
    x, short = torch.randn(9, 2, 64), torch.randn(5, 2, 64)
    ours = patched(owner).ma
    for tensors in ((x, short, short), (x[:, 0],) * 3):
        with AttentionCalls() as calls:
            out, weights = ours(*tensors)
        assert not calls.forward
        assert torch.equal(out, owner.ma(*tensors)[0])
        assert weights is not None
    with pytest.raises(AssertionError, match="embedding dimension"):
        ours(x[..., :32], x[..., :32], x[..., :32])
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        ours(x, x, x, attn_mask=torch.zeros(8, 8, dtype=torch.bool))
    owner.ma = nn.MultiheadAttention(64, 8, kdim=32, vdim=16)
    other = patched(owner).ma
    assert torch.equal(other(x, x[..., :32], x[..., :16])[0], owner.ma(x, x[..., :32], x[..., :16])[0])


def test_a_hook_of_a_user_sees_the_weights() -> None:
    layer = patched(TransformerLayer(64, 8))
    seen: list[Any] = []
    handle = layer.ma.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    layer(torch.randn(9, 2, 64))
    assert seen[0].shape == (2, 9, 9)
    handle.remove()
    with AttentionCalls() as calls:
        layer(torch.randn(9, 2, 64))
    assert calls.forward == {"sdpa_flash": 1}


# Stock to the world ---------------------------------------------------------------------------------------------------
def test_pickles_as_stock_copies_as_ours_and_is_undone() -> None:
    stock = nn.Sequential(AIFI(64, 96, 8), AIFI(64, 96, 8))
    x = torch.randn(2, 64, 4, 4)
    want = stock(x)
    ours = copy.deepcopy(stock)
    patch_modules(ours, FlashConfig(backend="sdpa_flash"))
    assert list(ours.state_dict()) == list(stock.state_dict())
    saved = []
    for module in (ours, stock):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        saved.append(zipfile.ZipFile(buffer).read("archive/data.pkl"))
    assert saved[0] == saved[1]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded[0].ma) is nn.MultiheadAttention
    assert torch.equal(loaded(x), want)
    for twin in (copy.deepcopy(ours), copy.copy(ours)):
        assert all(type(block) is FlashMultiheadAttention for block in targets(twin).values())
        with AttentionCalls() as calls:
            twin(x)
        assert calls.forward == {"sdpa_flash": 2}
    unpatch_modules(ours)
    assert all(type(block) is nn.MultiheadAttention for block in targets(ours).values())
    assert not any("flash" in name for block in targets(ours).values() for name in vars(block))
    assert torch.equal(ours(x), want)


def test_tracers_get_stock_operators() -> None:
    layer = patched(TransformerLayer(64, 8)).eval()
    traced = torch.jit.trace(layer, torch.randn(9, 2, 64))
    assert "scaled_dot_product" not in str(traced.inlined_graph)


@pytest.mark.skipif(TORCH < (2, 6), reason="this torch takes the numbers of a layer for symbols under dynamic=True")
def test_compiles_without_a_break_for_any_number_of_queries() -> None:
    layer = patched(TransformerLayer(64, 8))
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (9, 12):
        x = torch.randn(tokens, 2, 64)
        torch.testing.assert_close(compiled(x), layer(x))


# Failures and refusals ------------------------------------------------------------------------------------------------
def failing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Break the flash backend, in its forward or in its backward."""

    def broken(grad: Tensor) -> Tensor:
        raise RuntimeError("no engine")

    def spy(inputs: Inputs, spec: AttentionSpec) -> Tensor:
        if where == "forward":
            raise RuntimeError("no engine")
        out = sdpa.separate_flash(inputs, spec)
        if out.requires_grad:
            out.register_hook(broken)
        return out

    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], separate=spy))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_is_answered_in_the_same_step(where: str, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    module, call = decoder(360, 8)
    randomise(module)
    x, weight = torch.randn(1, 360, 64), torch.randn(1, 360, 64)
    truth = run(copy.deepcopy(module).double(), call, x.double(), weight.double())
    failing(monkeypatch, where)
    ours = patched(module, "auto")
    found = run(ours, call, x, weight)
    assert max(errors(found, truth).values()) < 1e-5
    assert list(ours.self_attn._flash_dispatcher.failed) == ["sdpa_flash"]
    assert sum("sdpa_flash failed" in line for line in log) == 1
    with pytest.raises(FlashKernelError, match="no engine"):
        run(patched(module, "sdpa_flash"), call, x, weight)


def test_a_backend_that_cannot_says_why() -> None:
    with pytest.raises(BackendNotSupportedError, match="runs on NVIDIA cards"):
        patched(TransformerLayer(64, 8), "sdpa_cudnn")(torch.randn(9, 2, 64))


def test_small_problems_stay_stock_under_auto_and_large_ones_do_not() -> None:
    layer = patched(TransformerLayer(64, 8), "auto").eval()
    for tokens, expected in ((9, {}), (300, {"sdpa_flash": 1})):
        with AttentionCalls() as calls, torch.no_grad():
            layer(torch.randn(tokens, 1, 64))
        assert calls.forward == expected
