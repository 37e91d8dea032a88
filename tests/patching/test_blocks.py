"""The patched blocks compute what the stock blocks compute, forward and backward, in every layout and precision."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.nn.modules.block import AAttn, Attention

from tests.counting import AttentionCalls, in_threads, randomise
from yolo_flash import BackendNotSupportedError, FlashConfig, FlashKernelError
from yolo_flash.backends import registry as backends_module
from yolo_flash.backends import spec
from yolo_flash.patching.patch import patch_modules, unpatch_modules

MAKE: dict[str, Callable[[], nn.Module]] = {
    "area1": lambda: AAttn(64, 2, 1),
    "area4": lambda: AAttn(64, 2, 4),
    "wide heads": lambda: AAttn(96, 2, 1),
    "psa": lambda: Attention(128, 2),
    "psa 36/72": lambda: Attention(144, 2),
}
SIZES = [(2, 8, 6), (1, 5, 4), (3, 7, 8), (1, 1, 4), (2, 13, 4)]  # odd, not square, batch 1; area 4 divides all
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def make(kind: str, train: bool = True) -> nn.Module:
    return randomise(MAKE[kind]()).train(train)


def patched(block: nn.Module, backend: str = "sdpa_flash") -> nn.Module:
    block = copy.deepcopy(block)
    patch_modules(block, FlashConfig(backend=backend))
    return block


def channels(block: nn.Module) -> int:
    return block.proj.conv.out_channels  # type: ignore[union-attr, return-value]


def run(block: nn.Module, x: Tensor, layout: torch.memory_format, weight: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `sum(output * weight)`."""
    block = copy.deepcopy(block).to(memory_format=layout)
    x = x.detach().clone(memory_format=layout).requires_grad_()
    out = block(x)
    (out * weight).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "grad x": x.grad, **grads}


def reference(block: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Float64, on the batch doubled: batch statistics are the same, and torch 2.14.1 is wrong at batch 1."""
    double = copy.deepcopy(block).double()
    results = run(double, torch.cat([x, x]).double(), torch.contiguous_format, torch.cat([weight, weight]).double())
    return {name: value.chunk(2)[0] if name in ("out", "grad x") else value / 2 for name, value in results.items()}


def error(value: Tensor, truth: Tensor, scale: Tensor) -> float:
    """Distance to the truth, relative to the size of `scale`."""
    return float((value.double() - truth).norm() / scale.norm().clamp_min(1e-12))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", MAKE)
def test_equals_float64_with_all_gradients(kind: str, size: tuple[int, int, int], layout: str, train: bool) -> None:
    block = make(kind, train)
    x = torch.randn(size[0], channels(block), *size[1:])
    weight = torch.randn_like(x)
    truth = reference(block, x, weight)
    for backend in ("sdpa_flash", "sdpa_math"):
        with AttentionCalls() as calls:
            ours = run(patched(block, backend), x, LAYOUTS[layout], weight)
        if backend == "sdpa_flash":
            assert calls.forward == calls.backward == {"sdpa_flash": 1}
        for name, value in ours.items():
            # A bias before BatchNorm has a true gradient near 0: measure against the largest gradient of its kind.
            scale = truth[name] if name in ("out", "grad x") else max(truth.values(), key=lambda t: float(t.norm()))
            assert error(value, truth[name], scale) < 2e-5, f"{backend} {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kind", MAKE)
def test_is_as_exact_as_stock_under_autocast(kind: str, dtype: torch.dtype, layout: str) -> None:
    block = make(kind)
    x = torch.randn(2, channels(block), 8, 6)
    weight = torch.randn_like(x)
    truth = reference(block, x, weight)
    with torch.autocast("cpu", dtype=dtype):
        stock = run(block, x, LAYOUTS[layout], weight)
        with AttentionCalls() as calls:
            ours = run(patched(block), x, LAYOUTS[layout], weight)
    assert calls.forward == {"sdpa_flash": 1}
    assert ours["out"].dtype == stock["out"].dtype == dtype
    rounding = torch.finfo(dtype).eps
    for name, value in ours.items():
        scale = truth[name] if name in ("out", "grad x") else max(truth.values(), key=lambda t: float(t.norm()))
        assert error(value, truth[name], scale) <= 2 * error(stock[name], truth[name], scale) + rounding, name


@pytest.mark.parametrize("kind", MAKE)
def test_a_perturbation_is_seen(kind: str) -> None:
    """The comparisons above would pass for a block that ignores its attention if attention did not matter here."""
    block = make(kind, train=False)
    x = torch.randn(2, channels(block), 8, 6)
    before = patched(block)(x)
    with torch.no_grad():
        block.qkv.conv.weight[:16] *= 2  # type: ignore[union-attr, index, operator]
    assert (patched(block)(x) - before).norm() > 0.01 * before.norm()


def test_no_copy_of_q_k_and_v_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = patched(make("area4")).to(memory_format=torch.channels_last)
    storages = []
    run_flash = backends_module.BACKENDS["sdpa_flash"].run

    def spy(packed: Tensor, spec: spec.AttentionSpec) -> tuple[Tensor, Tensor]:
        storages.append(packed.untyped_storage().data_ptr())
        return run_flash(packed, spec)

    backend = backends_module.Backend("sdpa_flash", lambda spec, machine: iter(()), spy, lambda spec, machine: True)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", backend)
    block.qkv.register_forward_hook(lambda module, args, out: storages.append(out.untyped_storage().data_ptr()))
    copies: list[tuple[int, ...]] = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() in ("aten::clone", "aten::copy_", "aten::_to_copy"):
                copies.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 64, 8, 6).to(memory_format=torch.channels_last)
    with Clones():
        block(x)
    assert storages[0] == storages[1]
    assert copies == [(8, 12, 2, 32)]  # the values, once, as the image that the positional convolution reads


def test_the_layout_of_a_slice_of_channels_is_seen() -> None:
    """PSA hands its attention half of the channels of a convolution's output."""
    block: Any = patched(make("psa"))
    for layout, name in ((torch.channels_last, "nhwc"), (torch.contiguous_format, "nchw")):
        x = torch.randn(2, 256, 5, 6).to(memory_format=layout)[:, 128:]
        spec = block._attention_call(x).spec
        assert spec.layout == name
        with torch.no_grad():
            assert block.qkv(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAKE)
def test_gradients_arrive_in_the_layout_that_each_neighbour_needs(
    kind: str, layout: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash backward reads garbage, and BatchNorm's may, from a gradient that lies otherwise."""
    block: Any = patched(make(kind)).to(memory_format=LAYOUTS[layout])
    flash = backends_module.BACKENDS["sdpa_flash"]
    contiguous: list[bool] = []
    in_layout: list[bool] = []

    def spy(packed: Tensor, kept: Any, dout: Tensor, dv: Tensor, spec: spec.AttentionSpec) -> Tensor:
        assert flash.backward is not None
        contiguous.extend((dout.is_contiguous(), dv.is_contiguous()))
        return flash.backward(packed, kept, dout, dv, spec)

    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", dataclasses.replace(flash, backward=spy))
    for convolution in (block.qkv, block.pe):
        convolution.register_forward_hook(
            lambda module, args, out: (
                out.register_hook(lambda grad: in_layout.append(grad.is_contiguous(memory_format=LAYOUTS[layout])))
                and None
            )
        )
    x = torch.randn(batch, channels(block), 8, 6).to(memory_format=LAYOUTS[layout])
    block(x).square().sum().backward()
    assert contiguous == [True, True]
    assert in_layout == [True, True]


def test_a_failure_under_auto_leaves_explicit_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.ModuleList([make("area1"), make("area1")])
    patch_modules(module, FlashConfig(layers={"1": "sdpa_flash"}))
    flash = backends_module.BACKENDS["sdpa_flash"]
    x = torch.randn(4, 64, 16, 16)
    with monkeypatch.context() as patch:
        patch.setitem(backends_module.BACKENDS, "sdpa_flash", broken("one shape is bad"))
        module[0](x)
    assert backends_module.BACKENDS["sdpa_flash"] is flash
    with AttentionCalls() as calls:
        module[0](x)
        module[1](x)
        copy.deepcopy(module)[0](x)  # copies share what failed
    assert calls.forward == {"sdpa_flash": 1}


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_a_lack_of_memory_by_any_name_is_left_to_the_trainer(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = patched(make("area1"), "auto")
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", broken(message))
    with pytest.raises(RuntimeError, match=message):
        ours(torch.randn(4, 64, 16, 16))


def test_the_determinism_that_torch_is_asked_for_reaches_the_spec() -> None:
    block: Any = patched(make("area1"))
    x = torch.randn(2, 64, 8, 8)
    assert block._attention_call(x).spec.deterministic is False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert block._attention_call(x).spec.deterministic is True
        with torch.no_grad():
            assert block._attention_call(x).spec.deterministic is False  # it matters to the backward alone
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_replaced_projection_still_runs() -> None:
    """Pruned, quantised or low-rank layers have no `conv` inside."""
    block: Any = make("area1")
    block.qkv = nn.Conv2d(64, 192, 1)
    x = torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(patched(block)(x), block(x), rtol=1e-4, atol=1e-5)


def test_a_size_that_the_stock_block_refuses_is_refused_alike() -> None:
    block = make("area4")
    x = torch.randn(1, 64, 3, 3)
    with pytest.raises(RuntimeError) as stock:
        block(x)
    with pytest.raises(RuntimeError) as ours:
        patched(block)(x)
    assert str(ours.value) == str(stock.value)


def test_stock_as_backend_is_the_stock_forward_to_the_bit() -> None:
    block = make("psa")
    x = torch.randn(2, 128, 5, 7)
    for name, value in run(patched(block, "stock"), x, torch.contiguous_format, torch.ones_like(x)).items():
        assert torch.equal(value, run(block, x, torch.contiguous_format, torch.ones_like(x))[name])


def test_batchnorm_statistics_and_buffers_move_as_in_stock() -> None:
    stock, ours = make("psa"), patched(make("psa"))
    x = torch.randn(2, 128, 6, 6)
    stock(x)
    ours(x)
    for (name, a), (_, b) in zip(stock.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_inference_mode_caches_nothing_on_the_block() -> None:
    block = patched(make("area4", train=False))
    with torch.inference_mode():
        block(torch.randn(1, 64, 8, 8))
    assert not any(isinstance(value, Tensor) for value in vars(block).values())
    block.train()(torch.randn(2, 64, 8, 8)).sum().backward()  # would fail on an inference tensor


def test_an_explicit_backend_that_cannot_run_raises_with_reasons_and_alternatives() -> None:
    with pytest.raises(
        BackendNotSupportedError, match=r"sdpa_cudnn cannot run .*NVIDIA.*These can: auto, stock, sdpa_"
    ):
        patched(make("psa"), "sdpa_cudnn")(torch.randn(1, 128, 4, 4))


def broken(message: str) -> backends_module.Backend:
    def run(packed: Tensor, spec: spec.AttentionSpec) -> tuple[Tensor, Tensor]:
        raise RuntimeError(message)

    return backends_module.Backend("sdpa_flash", lambda spec, machine: iter(()), run, lambda spec, machine: True)


def test_auto_survives_a_kernel_that_raises_and_says_so_once(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """Ultralytics' trainer takes cuDNN's words for out of memory and halves the batch: it must never see them."""
    stock = make("area1")
    ours = patched(stock, "auto")
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", broken("unable to find an engine"))
    x = torch.randn(4, 64, 16, 16)  # so large that the rules choose sdpa_flash
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    warnings = [message for message in log if "sdpa_flash failed" in message]
    assert len(warnings) == 1
    assert "unable to find an engine" in warnings[0]


def test_an_explicit_backend_that_raises_is_no_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = patched(make("area1"), "sdpa_flash")
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", broken("no such kernel image"))
    with pytest.raises(FlashKernelError, match=r"sdpa_flash raised in .*flash\.backend=auto") as caught:
        ours(torch.randn(2, 64, 8, 8))
    assert not isinstance(caught.value, RuntimeError)


def test_out_of_memory_is_left_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(packed: Tensor, spec: spec.AttentionSpec) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend = backends_module.Backend("sdpa_flash", lambda spec, machine: iter(()), run, lambda spec, machine: True)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", backend)
    with pytest.raises(torch.OutOfMemoryError):
        patched(make("area1"), "sdpa_flash")(torch.randn(2, 64, 8, 8))


def test_undo_is_bit_identical() -> None:
    block = make("area4")
    before = {name: value.clone() for name, value in block.state_dict().items()}
    attributes = list(vars(block))
    x = torch.randn(2, 64, 8, 8)
    patch_modules(block, FlashConfig(backend="sdpa_math"))
    patch_modules(block, FlashConfig(backend="sdpa_flash"))
    unpatch_modules(block)
    assert type(block) is AAttn
    assert list(vars(block)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert torch.equal(block.eval()(x), make("area4", train=False)(x))


@pytest.mark.parametrize("kind", ["area4", "psa"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(module.graph))
        return module.forward

    block = patched(make(kind, train=False))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for side in (8, 12, 16):
        x = torch.randn(2, channels(block), side, side)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2  # a fixed size, then symbols for good, as the stock block compiles
    assert all("_scaled_dot_product_flash_attention_for_cpu" in graph for graph in graphs)


def test_compiles_fused_where_torch_takes_every_compilation_for_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 does, where compiled models therefore ran stock attention."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    block = patched(make("area4", train=False))
    torch._dynamo.reset()
    with torch.no_grad(), AttentionCalls() as calls:
        torch.compile(block, backend="eager", fullgraph=True)(torch.randn(2, 64, 8, 8))
    assert calls.forward == {"sdpa_flash": 1}


def test_compiles_for_training() -> None:
    block = patched(make("area4"))
    x = torch.randn(2, 64, 8, 8)
    weight = torch.randn_like(x)
    truth = run(block, x, torch.contiguous_format, weight)
    torch._dynamo.reset()
    compiled = copy.deepcopy(block)
    leaf = x.clone().requires_grad_()
    (torch.compile(compiled, backend="aot_eager", fullgraph=True)(leaf) * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, truth["grad x"], rtol=1e-4, atol=1e-4)


def test_tracers_and_exporters_get_the_stock_operators() -> None:
    block = patched(make("area4", train=False))
    x = torch.randn(1, 64, 8, 8)
    graph = str(torch.jit.trace(block, x).inlined_graph)
    assert "softmax" in graph
    assert "scaled_dot_product" not in graph
    if hasattr(torch.compiler, "is_exporting"):  # torch >= 2.7; before, torch.export records the fused operator
        assert "scaled_dot_product" not in str(torch.export.export(block, (x,)).graph)
    with AttentionCalls() as calls:
        block(x)
    assert calls.forward == {"sdpa_flash": 1}


def test_coreml_format_still_reaches_the_stock_block() -> None:
    block = patched(make("psa", train=False))
    block.format = "coreml"  # type: ignore[assignment]
    x = torch.randn(1, 128, 4, 4)
    unpatched = copy.deepcopy(block)
    unpatch_modules(unpatched)
    assert torch.equal(block(x), unpatched(x))


# Behind the other compiled ones: dynamo of torch 2.5 does not compile a function again that once failed to.
def test_a_kernel_that_raises_while_it_is_compiled_ends_in_one_error_or_a_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = patched(make("area1", train=False), "auto")
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", broken("unable to find an engine"))
    torch._dynamo.reset()
    x = torch.randn(4, 64, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, backend="eager")(x), make("area1", train=False)(x))


# Behind the compiled ones too: after dispatch modes in threads, torch 2.5 compiles nothing any more.
def test_two_threads_with_different_backends_do_not_see_each_other() -> None:
    block = make("area4", train=False)
    x = torch.randn(1, 64, 8, 8)
    models = {name: patched(block, name) for name in ("sdpa_flash", "sdpa_math", "stock")}
    counts = in_threads({name: functools.partial(model, x) for name, model in models.items()}, repeats=50)
    assert counts["sdpa_flash"].forward == {"sdpa_flash": 50}
    assert not counts["sdpa_math"].forward
    assert not counts["stock"].forward
