"""What a user changes on a patched block, or on its class, is run: as ours where it is the same, else as stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.modules.transformer import TransformerLayer

from tests.counting import AttentionCalls
from tests.patching.test_blocks import channels, make
from tests.patching.test_multihead import randomise
from tests.patching.test_patch import data_pkl, saved
from yolo_flash import BackendNotSupportedError, patch_model, unpatch_model
from yolo_flash.patching import equivalence
from yolo_flash.patching.patch import _warn_once, targets

Edit = Callable[[Any], object]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    equivalence._answers.clear()
    _warn_once.cache_clear()


def model(kind: str) -> tuple[nn.Sequential, Tensor]:
    """A model of one block, in evaluation, and an input."""
    if kind == "multihead":
        return nn.Sequential(randomise(TransformerLayer(64, 8))).eval(), torch.randn(7, 2, 64)
    block = make(kind, train=False)
    return nn.Sequential(block), torch.randn(2, channels(block), 5, 4)


def block_of(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, (AAttn, Attention, nn.MultiheadAttention)))


def fused(module: nn.Module, x: Tensor) -> bool:
    with AttentionCalls() as calls, torch.no_grad():
        module(x)
    return bool(calls.forward)


# Edits ----------------------------------------------------------------------------------------------------------------
def attributes(**values: Any) -> Edit:
    def edit(block: Any) -> None:
        for name, value in values.items():
            setattr(block, name, value)

    return edit


def prune_area(block: Any) -> None:
    """One head of two is left."""
    block.num_heads, block.all_head_dim = 1, 32
    block.qkv = Conv(64, 96, 1, act=False).eval()
    block.pe, block.proj = Conv(32, 32, 7, 1, 3, g=32, act=False).eval(), Conv(32, 64, 1, act=False).eval()


def prune_psa(block: Any) -> None:
    """One wide head of two is left, with narrow keys, whose scale is their own."""
    block.num_heads, block.head_dim, block.key_dim, block.scale = 1, 128, 16, 0.25
    block.qkv = Conv(128, 160, 1, act=False).eval()


def prune_keys_alone(block: Any) -> None:
    prune_psa(block)
    block.scale = 32**-0.5


def double_scale(block: Any) -> None:
    block.scale *= 2


def a_little(block: Any) -> None:
    block.scale *= 1.001


EDITS: dict[str, tuple[str, Edit, bool]] = {  # what is edited, how, and whether ours computes that too
    "scale": ("psa", double_scale, False),
    "scale, a little": ("psa", a_little, False),
    "narrower keys, the scale of the others": ("psa", prune_keys_alone, False),
    "heads of PSA": ("psa", prune_psa, True),
    "heads of an area": ("area4", prune_area, True),
    "areas": ("area4", attributes(area=2), True),
    "positions": ("area1", lambda b: setattr(b, "pe", nn.Conv2d(64, 64, 3, padding=1)), True),
    "projection": ("psa", lambda b: setattr(b, "proj", nn.Identity()), True),
    "packing": ("area1", lambda b: setattr(b, "qkv", nn.Conv2d(64, 192, 1)), True),
    "nothing that is read": ("area1", attributes(note="hello"), True),
    "heads of multihead": ("multihead", attributes(num_heads=4), False),
    "heads and width of multihead": ("multihead", attributes(num_heads=4, head_dim=16), True),
    "order of multihead": ("multihead", attributes(batch_first=True), True),
    "forward of the instance": ("area1", lambda b: setattr(b, "forward", lambda x: x + 1), False),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("after", ["one forward", "none"])
def test_an_edit_counts(name: str, after: str, log: list[str]) -> None:
    kind, edit, still = EDITS[name]
    stock, x = model(kind)
    ours = patch_model(copy.deepcopy(stock), backend="auto", layers={"*": "auto"})
    block_of(ours)._flash_dispatcher.select = select_flash(block_of(ours)._flash_dispatcher)
    if after == "one forward":
        assert fused(ours, x)
    for each in (stock, ours):
        torch.manual_seed(3)
        edit(block_of(each))
    for _ in range(2):
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
        assert fused(ours, x) is still
    told = [line for line in log if "no longer the one that was patched" in line]
    assert len(told) == (not still and "instance" not in name)
    again = patch_model(ours)
    torch.testing.assert_close(again(x), stock(x), rtol=1e-4, atol=1e-5)
    assert (type(block_of(again)) in (AAttn, Attention, nn.MultiheadAttention)) is not still


def select_flash(dispatcher: Any) -> Callable[..., Any]:
    """The decisions of `sdpa_flash` for `auto`, whose rules leave small inputs stock."""
    select = dispatcher.select
    return lambda spec, choice, machine: select(spec, "sdpa_flash" if choice == "auto" else choice, machine)


def test_an_edit_that_is_undone_is_forgotten() -> None:
    ours, x = model("psa")
    patch_model(ours, backend="sdpa_flash")
    block = block_of(ours)
    scale = block.scale
    for _ in range(2):
        block.scale = 2 * scale
        with pytest.raises(BackendNotSupportedError, match=r"sdpa_flash cannot run in 0: .*% off ours.*0:stock"):
            ours(x)
        block.scale = scale
        assert fused(ours, x)
    del block.scale
    with pytest.raises(BackendNotSupportedError, match="AttributeError"):
        ours(x)


def test_a_backend_asked_for_by_name_is_an_error_when_patched_again_and_the_stock_one_is_none(log: list[str]) -> None:
    ours, x = model("psa")
    stock = copy.deepcopy(ours)
    patch_model(ours, backend="stock")
    for each in (stock, ours):
        double_scale(block_of(each))
    assert torch.equal(ours(x), stock(x))
    assert not log
    with pytest.raises(BackendNotSupportedError, match="sdpa_math cannot run in 0: this Attention is not the one"):
        patch_model(ours, backend="sdpa_math")
    unpatch_model(ours)
    assert torch.equal(ours(x), stock(x))


def test_one_line_for_all_blocks_that_are_edited_alike(log: list[str]) -> None:
    blocks = nn.Sequential(*(make("psa", train=False) for _ in range(3)))
    patch_model(blocks)
    for block in blocks:
        double_scale(block)
    blocks(torch.randn(1, 128, 4, 4))
    assert len([line for line in log if "stock attention runs in 0 from now on, and in all" in line]) == 1
    assert len(log) == 1


def test_what_torch_does_to_a_module_is_no_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = model("area4")
    patch_model(ours, backend="sdpa_flash")
    ours.train().eval().half().float().requires_grad_(False).to(memory_format=torch.channels_last)
    block = block_of(ours)
    block.register_forward_hook(lambda *_: None)
    block.register_full_backward_hook(lambda *_: None)
    ours.load_state_dict(ours.state_dict())
    torch.func.functional_call(ours, dict(ours.named_parameters()), (x,))
    assert block._flash_edits == ""
    compared: list[object] = []

    def compare(*given: object) -> str:
        compared.append(given)
        return ""

    monkeypatch.setattr(equivalence, "_compare", compare)
    for t in (1.0, 2.0, 1.0):
        block.something = torch.full((2,), t)  # as hooks of weight norm do in every forward
        ours(x)
    assert len(compared) == 1


def test_copies_and_pickles_of_an_edited_block(log: list[str]) -> None:
    stock, x = model("psa")
    ours = patch_model(copy.deepcopy(stock))
    for each in (stock, ours):
        double_scale(block_of(each))
    twin = copy.deepcopy(ours)
    for each in (ours, twin, copy.deepcopy(ours)):
        assert torch.equal(each(x), stock(x))
    assert len(log) == 1
    assert data_pkl(saved(ours)) == data_pkl(saved(stock))
    unpatch_model(ours)
    assert vars(block_of(ours)).keys() == vars(block_of(stock)).keys()


def test_a_compiled_block_sees_edits_before_and_after() -> None:
    ours, x = model("psa")
    patch_model(ours, layers={"*": "auto"})
    block = block_of(ours)
    block._flash_dispatcher.select = select_flash(block._flash_dispatcher)
    stock = copy.deepcopy(ours)
    unpatch_model(stock)
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(module.graph))
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    with torch.no_grad():
        for factor, expected in ((1.0, True), (2.0, False), (0.5, True), (3.0, False)):
            for each in (stock, ours):
                block_of(each).scale *= factor
            torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-5)
            assert ("scaled_dot_product_flash" in graphs[-1]) is expected
        assert len(graphs) == 4
        compiled(x)
        assert len(graphs) == 4
        torch._dynamo.reset()
        for each in (stock, ours):
            double_scale(block_of(each))
        torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), stock(x))
    patch_model(ours.train(), backend="stock")
    block.scale /= 6
    patch_model(ours, backend="sdpa_flash")
    block.scale *= 2
    with pytest.raises(Exception, match=r"BackendNotSupportedError: .*off ours"):  # dynamo wraps it
        torch.compile(ours, backend="eager", fullgraph=True)(x)


# A class --------------------------------------------------------------------------------------------------------------
CLASSES = {"area4": AAttn, "psa": Attention, "multihead": nn.MultiheadAttention}


@pytest.fixture(params=[*CLASSES, "function of torch"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any, list[Any]]:
    """A kind of block, how a user puts a forward of his own on its class, and the calls of that."""
    calls: list[Any] = []
    kind = "multihead" if request.param == "function of torch" else request.param
    owner: Any = torch.nn.functional if request.param == "function of torch" else CLASSES[kind]
    name = "multi_head_attention_forward" if request.param == "function of torch" else "forward"
    original = getattr(owner, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    return kind, lambda: monkeypatch.setattr(owner, name, recording), calls


def test_a_forward_put_on_the_class_before_stays_with_one_line(recorded: Any, log: list[str]) -> None:
    kind, put_on, calls = recorded
    ours, x = model(kind)
    wanted = ours(x)
    put_on()
    patch_model(patch_model(ours))
    assert not calls  # by the comparison
    assert not targets(ours)
    assert torch.equal(ours(x), wanted)
    assert len(calls) == 1
    assert len(log) == 1
    assert "is not the one of the installed release but somebody else's" in log[0]
    with pytest.raises(BackendNotSupportedError, match="somebody else's"):
        patch_model(ours, backend="sdpa_math")


def test_a_forward_put_on_the_class_after_runs_with_one_line(
    recorded: Any, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    kind, put_on, calls = recorded
    stock, x = model(kind)
    ours = patch_model(nn.Sequential(stock, copy.deepcopy(stock)), layers={"*": "auto"})
    dispatcher = block_of(ours)._flash_dispatcher
    dispatcher.select = select_flash(dispatcher)
    assert fused(ours, x)
    put_on()
    log.clear()
    for _ in range(2):
        assert not fused(ours, x)
    assert len(calls) == 4
    assert len(log) == 1
    assert "from now on" in log[0]
    monkeypatch.undo()
    assert fused(ours, x)
    patch_model(ours, backend="sdpa_flash")
    put_on()
    with pytest.raises(BackendNotSupportedError, match="somebody else's"):
        ours(x)


# Torch's own tools ----------------------------------------------------------------------------------------------------
class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrized_multihead_attention_is_stock_and_leaves_nothing_behind() -> None:
    stock, x = model("multihead")
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    for each in (stock, ours):
        parametrize.register_parametrization(block_of(each), "in_proj_weight", Doubled())
    assert torch.equal(ours(x), stock(x))
    for each in (stock, ours):
        parametrize.remove_parametrizations(block_of(each), "in_proj_weight")
    assert data_pkl(saved(ours)) == data_pkl(saved(stock))
    patch_model(ours, backend="sdpa_flash")
    assert fused(ours, x)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", ["area1", "area4", "psa", "multihead"])
def test_a_script_is_that_of_stock(kind: str, alone: bool, log: list[str]) -> None:
    stock, x = model(kind)
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    inputs = (x, x, x) if kind == "multihead" and alone else (x,)
    stock_part, ours_part = (block_of(each) if alone else each for each in (stock, ours))
    try:
        wanted = torch.jit.script(stock_part)(*inputs)
    except RuntimeError:
        with pytest.raises(RuntimeError) as error:  # torch says something else the second time
            torch.jit.script(stock_part)
        with pytest.raises(RuntimeError) as caught:
            torch.jit.script(ours_part)
        assert str(caught.value)[:80] == str(error.value)[:80]
    else:
        torch.testing.assert_close(torch.jit.script(ours_part)(*inputs), wanted, rtol=0, atol=0)
    assert len([line for line in log if "torch.jit.script" in line]) == 1
    assert fused(patch_model(ours, backend="sdpa_flash"), x)


@pytest.mark.parametrize("kind", ["area4", "psa"])
def test_a_trace_of_a_trace(kind: str) -> None:
    stock, x = model(kind)
    ours = patch_model(copy.deepcopy(stock), backend="sdpa_flash")
    for _ in range(2):
        assert torch.equal(torch.jit.trace(ours, x)(x), torch.jit.trace(stock, x)(x))
    assert fused(ours, x)


@pytest.mark.parametrize("backend", ["auto", "sdpa_flash", "sdpa_math", "stock"])
@pytest.mark.parametrize("kind", ["area1", "area4", "psa", "multihead"])
def test_no_images_give_no_images(kind: str, backend: str) -> None:
    stock, x = model(kind)
    ours = patch_model(copy.deepcopy(stock), backend=backend)
    nothing = x[:, :0] if kind == "multihead" else x[:0]
    for grad in (True, False):
        leaf = nothing.clone().requires_grad_(grad)
        out, wanted = ours(leaf), stock(leaf)
        assert out.shape == wanted.shape
        assert out.dtype == wanted.dtype
        if grad:
            out.sum().backward()
            assert leaf.grad is not None
    assert fused(ours, x) is (backend == "sdpa_flash")
