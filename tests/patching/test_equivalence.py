"""A block is taken over only if it computes what ours computes; others stay stock, with one line; no trace is left."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics import YOLO
from ultralytics.nn.modules import block as stock_blocks
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.nn.modules.transformer import AIFI

from tests.patching.test_patch import patched_layers
from yolo_flash import BackendNotSupportedError, FlashConfig, patch_model, plan
from yolo_flash.patching import equivalence
from yolo_flash.patching.equivalence import why_not_equal
from yolo_flash.patching.patch import BLOCKS, _warn_once, patch_modules, targets, unpatch_modules

MAKE: dict[str, Callable[[], nn.Module]] = {
    "area1": lambda: AAttn(64, 2, 1),
    "area4": lambda: AAttn(64, 2, 4),
    "odd heads": lambda: AAttn(100, 3, 1),  # 99 channels within
    "psa": lambda: Attention(128, 2),
    "psa 36/72": lambda: Attention(144, 2),
    "multihead": lambda: nn.MultiheadAttention(64, 4, batch_first=True),
    "multihead, dropout": lambda: nn.MultiheadAttention(64, 4, dropout=0.5),
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    equivalence._answers.clear()
    _warn_once.cache_clear()


def different(block: nn.Module) -> str:
    return why_not_equal(block, BLOCKS[type(block)])


def change(monkeypatch: pytest.MonkeyPatch, cls: type, old: str, new: str) -> None:
    """Give a stock class a forward whose source reads a little differently, as another release of Ultralytics may."""
    source = textwrap.dedent(inspect.getsource(cls.forward))  # type: ignore[attr-defined]
    assert old in source
    names = dict(vars(stock_blocks))
    exec(compile(source.replace(old, new), str(stock_blocks.__file__), "exec"), names)
    names["forward"].__qualname__ = f"{cls.__name__}.forward"
    monkeypatch.setattr(cls, "forward", names["forward"])


# Same or different ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MAKE)
def test_the_blocks_that_we_know_are_the_same(kind: str) -> None:
    assert different(MAKE[kind]()) == ""


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [
        (AAttn, "(self.head_dim**-0.5)", "(1.05 * self.head_dim**-0.5)"),
        (AAttn, "(self.head_dim**-0.5)", "(1.001 * self.head_dim**-0.5)"),
        (AAttn, "q, k, v =", "k, v, q ="),
        (AAttn, "self.pe(v)", "self.pe(x)"),
        (AAttn, "self.proj(x)", "self.proj(x) + 0.05"),
        (AAttn, "self.proj(x)", "self.proj(nn.functional.dropout(x, 0.1, self.training))"),
        (AAttn, "self.area > 1", "self.area > 99"),
        (Attention, "self.scale)", "self.scale * 1.05)"),
        (Attention, "q, k, v =", "k, q, v ="),
        (Attention, "v.reshape(B, C, H, W)", "x.reshape(B, C, H, W)"),
        (Attention, "softmax(dim=-1)", "softmax(dim=-2)"),
    ],
    ids=str,
)
def test_a_changed_block_is_seen(cls: type, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = AAttn(64, 2, 4) if cls is AAttn else Attention(128, 2)
    assert different(block) == ""
    change(monkeypatch, cls, old, new)
    assert "off ours on a test input, 0.001% is allowed" in different(block)


def test_weights_that_hide_attention_hide_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    block = AAttn(64, 2, 4)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    change(monkeypatch, AAttn, "(self.head_dim**-0.5)", "(2 * self.head_dim**-0.5)")
    assert "off ours" in different(block)


def test_an_output_of_another_shape_or_none_at_all_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, AAttn, "self.proj(x)", "self.proj(x).flatten(2)")
    assert different(AAttn(64, 2)) == "its output is [2, 64, 6], ours [2, 64, 3, 2]"
    change(monkeypatch, Attention, "self.proj(x)", "self.project(x)")
    assert "could not be compared with ours (AttributeError: " in different(Attention(128, 2))
    block: Any = AAttn(64, 4)
    del block.pe
    assert "could not be compared with ours (AttributeError" in different(block)


def test_not_a_number_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, AAttn, "self.proj(x)", "self.proj(x) * float('nan')")
    assert "nan% off ours" in different(AAttn(64, 2))


def test_an_instance_with_a_forward_of_its_own_is_different() -> None:
    block: Any = AAttn(64, 2)
    block.forward = functools.partial(AAttn.forward, block)
    assert different(block) == "its forward was replaced on the instance"
    assert patched_layers(patch_model(nn.Sequential(block, AAttn(64, 2)))) == 1


def test_what_a_block_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device, in any precision, fused, hooked, compiled; patched while anything is switched on or off."""
    makers = [AAttn(64, 2, 4), Attention(128, 2)]
    for block in makers:
        assert different(block.half()) == different(block.to("meta")) == ""
    model: Any = YOLO("yolo12n.yaml").model.eval().fuse(verbose=False)
    assert len(targets(model)) == 8
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        equivalence._answers.clear()
        with context:
            assert different(AAttn(64, 2)) == ""
    equivalence._answers.clear()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        assert different(AAttn(64, 2)) == ""
    finally:
        torch.set_default_dtype(torch.float32)


# No trace -------------------------------------------------------------------------------------------------------------
class Touched(TorchDispatchMode):
    """The operators that were given a tensor of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(id(arg) in self.tensors for arg in args):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("grad", [True, False])
def test_no_trace(kind: str, grad: bool) -> None:
    block = MAKE[kind]()
    called: list[str] = []
    for module in block.modules():
        module.register_forward_hook(lambda *_: called.append("hook"))
        module.register_forward_pre_hook(lambda *_: called.append("pre"))
        module.register_state_dict_pre_hook(lambda *_: called.append("state"))
    for training, module in enumerate(block.modules()):
        module.training = bool(training % 2)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append("everywhere"))

    def state() -> Any:
        values = [(t.clone(), t.grad, t._version) for t in (*block.parameters(), *block.buffers())]
        modules = [(m, set(vars(m)), m.training, type(m)) for m in block.modules()]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        return values, modules, modes, torch.get_rng_state()

    with torch.set_grad_enabled(grad):
        values, modules, modes, rng = state()
        with Touched(block) as touched:
            assert different(block) == ""
        after = state()
    everywhere.remove()
    assert not touched.names
    assert not called
    assert (modules, modes) == after[1:3]
    assert torch.equal(rng, after[3])
    for (value, grad_before, version), (now, grad_now, version_now) in zip(values, after[0], strict=True):
        assert torch.equal(value, now)
        assert grad_before is grad_now is None
        assert version == version_now


def test_what_hooks_hold_is_not_copied() -> None:
    class Holder:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def hook(self, *args: Any) -> None:
            raise AssertionError("called")

    block = AAttn(64, 2)
    block.register_forward_hook(Holder().hook)
    block.qkv.register_forward_hook(Holder().hook)
    assert different(block) == ""


# At what cost ---------------------------------------------------------------------------------------------------------
def test_equal_blocks_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[nn.Module] = []
    compare = equivalence._compare

    def count(block: nn.Module, cls: Any) -> str:
        compared.append(block)
        return compare(block, cls)

    monkeypatch.setattr(equivalence, "_compare", count)
    model = nn.Sequential(*(AAttn(64, 2, area) for area in (4, 1) for _ in range(8)))
    patch_model(model)
    assert patched_layers(model) == 16
    assert [block.area for block in compared] == [4, 1]
    unpatch_modules(model)
    patch_model(model)
    assert len(compared) == 2
    patch_model(nn.Sequential(AAttn(64, 4, 4), AAttn(64, 2, 4).half(), AAttn(64, 2, 4).eval()))
    assert len(compared) == 3  # other heads; the precision and the mode of a block change nothing
    change(monkeypatch, AAttn, "self.pe(v)", "self.pe(x)")
    patch_model(nn.Sequential(AAttn(64, 2, 4)))
    assert len(compared) == 4
    odd: Any = AAttn(64, 2, 4)
    odd.something = object()  # nobody knows what it does: compared every time
    different(odd)
    different(odd)
    assert len(compared) == 6


def test_a_comparison_is_a_few_small_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels: list[int] = []
    run = equivalence._run

    def spy(cls: Any, twin: nn.Module, given: dict[str, Tensor]) -> Tensor:
        pixels.append(given["x"].shape[0] * given["x"].shape[2] * given["x"].shape[3])
        return run(cls, twin, given)

    monkeypatch.setattr(equivalence, "_run", spy)
    different(AAttn(64, 2, 4))
    assert pixels == [48] * 4  # stock and ours, in training and in prediction


# Left stock -----------------------------------------------------------------------------------------------------------
def test_left_stock_with_one_line(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    change(monkeypatch, AAttn, "(self.head_dim**-0.5)", "(2 * self.head_dim**-0.5)")
    module = nn.Sequential(AAttn(64, 2), Attention(128, 2), AAttn(64, 2, 4))
    patch_model(module)
    patch_model(module)  # a run patches its model several times
    assert [type(block) for block in module][::2] == [AAttn, AAttn]
    assert patched_layers(module) == 1
    assert len(log) == 1
    assert "yolo-flash: stock attention stays in 0 and 1 more: this AAttn (ultralytics " in log[0]
    assert "off ours on a test input, 0.001% is allowed. All else works; a newer yolo-flash may know it." in log[0]
    assert list(targets(module)) == ["1"]


def test_a_model_all_of_whose_layers_stay_stock_trains(
    monkeypatch: pytest.MonkeyPatch, log: list[str], tiny_args: dict[str, Any]
) -> None:
    change(monkeypatch, AAttn, "(self.head_dim**-0.5)", "(2 * self.head_dim**-0.5)")
    model = patch_model(YOLO("yolo12n.yaml"), layers={"model.6.*": "stock"})
    model.train(**tiny_args)
    assert patched_layers(model.model) == 0
    ours = [line for line in log if "yolo-flash" in line]
    assert "stock attention stays in model.6.m.0.0.attn and 7 more: this AAttn" in ours[0]
    assert not any("attention layer" in line or "stock attention" in line for line in ours[1:])
    assert model.trainer.flash_plan == []


def test_a_backend_asked_for_by_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, AAttn, "(self.head_dim**-0.5)", "(2 * self.head_dim**-0.5)")
    model = YOLO("yolo12n.yaml")
    for settings in ({"backend": "sdpa_flash"}, {"layers": {"model.8.*": "sdpa_math"}}):
        with pytest.raises(BackendNotSupportedError, match=r"cannot run in model\.[68]\.m\.0\.0\.attn: .*off ours"):
            patch_model(model, **settings)
        assert type(model) is YOLO
        assert patched_layers(model.model) == 0
    module = nn.Sequential(AAttn(64, 2), Attention(128, 2))
    patch_modules(module, FlashConfig(layers={"1": "sdpa_flash", "0": "stock"}))
    assert patched_layers(module) == 1


def test_the_plan_has_no_rows_for_what_stays_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, Attention, "self.scale)", "self.scale * 2)")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 8, 8)
            self.area, self.psa = AAttn(64, 2), Attention(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.psa(self.area(self.stem(x)))

    assert {row.layer for row in plan(patch_model(Net()), imgsz=64, batch=1, device="cpu")} == {"area"}


def test_blocks_that_were_patched_before_a_change_are_still_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = patch_model(nn.Sequential(AAttn(64, 2)))
    change(monkeypatch, AAttn, "(self.head_dim**-0.5)", "(2 * self.head_dim**-0.5)")
    unpatch_modules(module)
    assert type(module[0]) is AAttn


def test_multihead_attention_of_a_changed_torch_stays_stock(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    forward = nn.MultiheadAttention.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = forward(self, *args, **kwargs)
        return out * 2, weights

    monkeypatch.setattr(nn.MultiheadAttention, "forward", doubled)
    module = patch_model(nn.Sequential(AIFI(64, 128, 4)))
    assert patched_layers(module) == 0
    assert len([line for line in log if "stays in 0.ma: " in line]) == 1
