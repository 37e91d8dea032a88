"""Blocks of YOLOv12's authors: the same outputs in Ultralytics' layout, the same bits when they come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn
from ultralytics.nn.modules.conv import Conv

from tests.checkpoints.forks import Fork, as_fork, randomise
from yolo_flash import CheckpointError
from yolo_flash.checkpoints.authors import is_authors, to_authors, to_ultralytics


def fork_block(dim: int = 96, heads: int = 3, area: int = 1) -> Any:
    block = AAttn(dim, heads, area)
    as_fork(block)
    randomise(block)
    return block.eval()


def stored(block: Any) -> Any:
    """The block as a checkpoint holds it."""
    block = copy.deepcopy(block)
    block.__class__ = AAttn
    return block


def state(block: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in block.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, t in one.items():
        assert t.dtype == other[name].dtype, name
        assert t.shape == other[name].shape, name
        assert torch.equal(t.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 32), (3, 32), (5, 20)])
@pytest.mark.parametrize(("area", "height", "width"), [(1, 5, 7), (1, 1, 3), (4, 4, 7), (4, 3, 8), (4, 6, 10)])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_computes_the_same(
    heads: int, head_dim: int, area: int, height: int, width: int, training: bool
) -> None:
    fork = fork_block(heads * head_dim, heads, area).double()
    ours = stored(fork)
    assert is_authors(ours)
    assert to_ultralytics(ours, "attn")
    assert not is_authors(ours)
    fork.train(training)
    ours.train(training)
    x = torch.randn(3, heads * head_dim, height, width, dtype=torch.float64)
    wanted, found = fork(x), ours(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert wanted.std() > 0.1


def test_attention_heads_and_positions_are_seen() -> None:
    """Outputs that did not depend on a part would agree however it were converted."""
    fork = fork_block().double()
    x = torch.randn(2, 96, 5, 7, dtype=torch.float64)
    wanted = fork(x)
    for name, t in fork.state_dict().items():
        if t.ndim:
            kept = t.clone()
            t[0] += 0.5  # the first row: queries of the first head
            assert (fork(x) - wanted).abs().max() > 1e-6, name
            t.copy_(kept)
    swapped = stored(fork)
    to_ultralytics(swapped, "attn")
    rows = swapped.qkv.conv.weight.data
    rows[:96] = rows[:96].flip(0)  # heads are told apart
    assert (swapped(x) - wanted).abs().max() > 1e-3


def test_rows_are_those_of_each_head() -> None:
    fork = fork_block(12, 3)
    ours = stored(fork)
    to_ultralytics(ours, "attn")
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        qk, v, qkv = (block.state_dict()[name] for block in (fork.qk, fork.v, ours.qkv))
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            expected = torch.cat([qk[:12][own], qk[12:][own], v[own]])
            assert torch.equal(qkv[12 * head : 12 * head + 12], expected), name
    assert (ours.qkv.conv.out_channels, ours.qkv.bn.num_features) == (36, 36)
    assert (ours.pe.conv.kernel_size, ours.pe.conv.padding) == ((7, 7), (3, 3))
    assert list(ours._modules) == ["qkv", "proj", "pe"]
    assert list(ours.state_dict()) == list(AAttn(12, 3).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_there_and_back_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    fork = stored(fork_block().to(dtype)).requires_grad_(False)
    fork.pe.conv.weight.requires_grad_(True)
    before = state(fork)
    ours = copy.deepcopy(fork)
    assert to_ultralytics(ours, "attn")
    assert {t.dtype for t in ours.state_dict().values()} == {dtype, torch.int64}
    assert [name for name, t in ours.named_parameters() if t.requires_grad] == ["pe.conv.weight"]
    assert (ours.qkv.bn.eps, ours.qkv.bn.momentum) == (1e-3, 0.03)
    there = state(ours)
    assert to_authors(ours, "attn")
    assert_same_bits(state(ours), before)
    assert vars(ours).keys() == vars(fork).keys() - {"all_head_dim"}  # which copying adds, and the fork has not
    assert repr(ours) == repr(fork)
    assert to_ultralytics(ours, "attn")
    assert_same_bits(state(ours), there)


def test_a_converted_block_is_built_like_a_stock_one() -> None:
    ours = stored(fork_block())
    to_ultralytics(ours, "attn")
    fresh = AAttn(96, 3)
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    assert repr(ours) == repr(fresh)
    assert vars(ours).keys() - {"all_head_dim"} == vars(fresh).keys() - {"all_head_dim"}  # a cache of newer releases
    fresh.load_state_dict(ours.state_dict())
    x = torch.randn(1, 96, 4, 5)
    torch.testing.assert_close(ours(x), fresh.eval()(x))
    for mine, theirs in zip(ours.modules(), fresh.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()


def test_nothing_to_do() -> None:
    assert not to_ultralytics(AAttn(64, 2), "attn")
    assert not to_authors(stored(fork_block()), "attn")


# v1.0 ----------------------------------------------------------------------------------------------------------------
def first_release(dim: int = 96, heads: int = 3) -> Any:
    block: Any = AAttn(dim, heads)
    block.pe.conv.bias = nn.Parameter(torch.zeros(dim))
    randomise(block)
    return block.eval()


@pytest.mark.parametrize("training", [False, True])
def test_the_bias_of_the_first_release_moves_into_batchnorm(training: bool) -> None:
    block = first_release().double().train(training)
    ours = copy.deepcopy(block)
    assert to_ultralytics(ours, "attn")
    assert ours.state_dict().keys() == AAttn(96, 3).state_dict().keys()
    x = torch.randn(2, 96, 5, 3, dtype=torch.float64)
    wanted = block(x)
    torch.testing.assert_close(ours(x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), block.eval()(x), rtol=0, atol=1e-12)  # after an update of the statistics
    block.pe.conv.bias.data += 1
    assert (block(x) - wanted).abs().max() > 1e-3
    assert not to_ultralytics(ours, "attn")  # once


def test_the_bias_in_half_precision_is_rounded_once() -> None:
    block = first_release().half()
    bias, mean = block.pe.conv.bias.detach().double(), block.pe.bn.running_mean.double()
    to_ultralytics(block, "attn")
    assert torch.equal(block.pe.bn.running_mean, (mean - bias).half())


# Refusals ------------------------------------------------------------------------------------------------------------
def refusal(convert: Callable[[Any, str], bool], block: Any) -> str:
    before = state(block)
    with pytest.raises(CheckpointError) as error:
        convert(block, "model.6.m.0.0.attn")
    assert_same_bits(state(block), before)
    assert str(error.value).startswith("model.6.m.0.0.attn")
    return str(error.value)


def changed(**parts: nn.Module) -> Any:
    block = stored(fork_block())
    for name, part in parts.items():
        setattr(block, name, part)
    return block


def test_other_attention_of_the_same_name_is_named() -> None:
    assert "has qk, v, proj, pe, gate" in refusal(to_ultralytics, changed(gate=nn.Identity()))
    assert "has qk, v, proj, pe, gate" in refusal(to_authors, changed(gate=nn.Identity()))
    block = stored(fork_block())
    del block.pe
    assert "has qk, v, proj: neither qk, v, proj and pe nor qkv, proj and pe" in refusal(to_ultralytics, block)


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"pe": Conv(96, 96, 9, 1, 4, g=96, act=False)}, "pe has weights of 96x1x9x9"),
        ({"pe": Conv(96, 96, 7, 1, 3, g=96, act=False)}, "pe has weights of 96x1x7x7"),
        ({"pe": Conv(96, 96, 5, 1, 4, g=96, d=2, act=False)}, "pe has stride, padding, dilation, groups"),
        ({"pe": nn.Conv2d(96, 96, 5)}, "pe is not a convolution with its BatchNorm"),
        (
            {"qk": Conv(96, 96, 1, act=False)},
            "qk has weights of 96x96x1x1 where 3 heads of 32 channels have 192x96x1x1",
        ),
        ({"qk": Conv(96, 192, 1)}, "qk is Conv2d, BatchNorm2d, SiLU"),
        ({"v": Conv(96, 96, 1, g=3, act=False)}, "v has weights of 96x32x1x1"),
    ],
)
def test_other_convolutions_are_refused(parts: dict[str, nn.Module], found: str) -> None:
    assert found in refusal(to_ultralytics, changed(**parts))


def test_two_batchnorms_that_do_not_fit_into_one_are_refused() -> None:
    for name, value in (("eps", 1e-5), ("momentum", 0.1), ("num_batches_tracked", torch.tensor(3))):
        block = stored(fork_block())
        setattr(block.v.bn, name, value)
        assert f"{name}=" in refusal(to_ultralytics, block)


def test_a_bias_of_a_projection_is_refused() -> None:
    block = stored(fork_block())
    block.qk.conv.bias = nn.Parameter(torch.zeros(192))
    assert "qk: a bias" in refusal(to_ultralytics, block)


def test_a_ring_that_is_used_does_not_go_back() -> None:
    block = stored(fork_block())
    to_ultralytics(block, "attn")
    block.pe.conv.weight.data[3, 0, 6, 2] = -0.25
    assert "outer ring is used (largest value 0.25)" in refusal(to_authors, block)
    block.pe.conv.weight.data[3, 0, 6, 2] = float("nan")
    assert "outer ring is used" in refusal(to_authors, block)
    assert "pe has a bias" in refusal(to_authors, first_release())


def test_a_subclass_is_not_ours() -> None:
    assert not is_authors(fork_block())
    assert type(fork_block()) is Fork
