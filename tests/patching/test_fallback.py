"""One node of autograd for attention: the gradients of torch's own graph, and an answer where a backend raises."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.counting import AttentionCalls
from tests.patching.test_blocks import LAYOUTS, channels, make, patched
from tests.versions import TORCH
from yolo_flash import FlashConfig, FlashKernelError
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch.decision import Trial
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.machine import detect
from yolo_flash.patching import blocks, fallback
from yolo_flash.patching.patch import patch_modules

CPU = torch.device("cpu")


def gradients(block: Any, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Of the input and of every parameter."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(leaf) if run is None else run(block, leaf)
    return list(torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()]))


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# The node -------------------------------------------------------------------------------------------------------------
class Backwards(TorchDispatchMode):
    """The calls of torch's backward operators of attention: tensors by their sizes, strides and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_scaled_dot_product" in func.name() and "backward" in func.name():
            plain = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
            named = {name: value for name, value in (kwargs or {}).items() if value is not None}
            self.calls.append((func.name(), plain, named))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", [(32, 32), (32, 64), (36, 72), (20, 20)], ids=str)
@pytest.mark.parametrize(
    ("name", "device"),
    [("sdpa_flash", "cpu"), ("sdpa_flash", "meta"), ("sdpa_efficient", "meta"), ("sdpa_cudnn", "meta")],
)
def test_the_backward_operator_is_called_as_autograd_calls_it(name: str, device: str, dims: tuple[int, int]) -> None:
    """On meta tensors the operators are those of a GPU."""
    if name == "sdpa_cudnn" and TORCH < (2, 6):
        pytest.skip("the backend refuses this torch")
    backend, dtype = BACKENDS[name], torch.float32 if device == "cpu" else torch.float16
    assert backend.forward is not None
    assert backend.backward is not None
    spec = AttentionSpec(4, 2, 50, 50, *dims, dtype, "nhwc")
    packed = torch.randn(4, 50, 2, 2 * dims[0] + dims[1], device=device, dtype=dtype)
    grads = [torch.randn(4, 50, 2, dims[1], device=device, dtype=dtype) for _ in range(2)]
    with Backwards() as theirs:
        leaf = packed.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(backend.run(leaf, spec), leaf, grads)
    with Backwards() as ours, torch.no_grad():
        kept = [t for t in backend.forward(packed, spec)[2:] if not isinstance(t, int)]
        found = backend.backward(packed, kept, grads[0], grads[1], spec)
    assert len(ours.calls) == 1
    assert ours.calls == theirs.calls
    assert (found.shape, found.dtype, found.is_contiguous()) == (wanted.shape, wanted.dtype, True)
    assert device == "meta" or torch.equal(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["area4", "psa", "psa 36/72"])
def test_the_node_gives_what_the_graph_gives(kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; under torch.compile it is the graph that runs."""
    block = patched(make(kind)).to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, channels(block), 8, 6).to(memory_format=LAYOUTS[layout])
    node = gradients(block, x)
    monkeypatch.setattr(blocks, "attend_packed", lambda qkv, job: fallback._run(qkv, job.spec, job.backend))
    for a, b in zip(node, gradients(block, x), strict=True):
        assert torch.equal(a, b)


def test_a_retained_graph_is_differentiated_twice_with_one_forward() -> None:
    block = patched(make("area4"))
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    with AttentionCalls() as calls:
        loss = block(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        second = torch.autograd.grad(loss, x)
    assert torch.equal(first[0], second[0])
    assert (calls.forward, calls.backward) == ({"sdpa_flash": 1}, {"sdpa_flash": 2})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_it_again(reentrant: bool) -> None:
    block = patched(make("psa", train=False))
    x = torch.randn(2, 128, 8, 6)
    with AttentionCalls() as calls:
        leaf = x.clone().requires_grad_()
        checkpoint(block, leaf, use_reentrant=reentrant).square().sum().backward()
    assert (calls.forward, calls.backward) == ({"sdpa_flash": 2}, {"sdpa_flash": 1})
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, gradients(block, x)[0])


def test_an_error_of_a_hook_is_no_error_of_the_backend() -> None:
    """A checkpoint ends its second forward by an exception, when the last tensor that it needs is kept."""
    block: Any = patched(make("area1"), "auto")

    def stop(t: Tensor) -> Tensor:
        if t.ndim == 4 and t.shape[1] == 192:  # the packed image
            raise RuntimeError("enough")
        return t

    x = torch.randn(4, 64, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="enough"), torch.autograd.graph.saved_tensors_hooks(stop, lambda t: t):
        block(x)
    assert not block._flash_dispatcher.failed


def test_kept_tensors_are_freed_with_the_graph() -> None:
    kept: list[int] = []
    block = patched(make("area4"))

    def pack(t: Tensor) -> Tensor:
        kept.append(1)
        return t

    def unpack(t: Tensor) -> Tensor:
        kept.pop()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        block(torch.randn(2, 64, 8, 8)).sum().backward()
    assert not kept  # all go through autograd: what offloads activations or checkpoints them sees every one


# Errors ---------------------------------------------------------------------------------------------------------------
def break_backward(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object) -> Tensor:
        raise error

    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], backward=fail))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backward_that_raises_is_answered_by_unfused_attention(
    layout: str, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    block: Any = patched(make("area1"), "auto").to(memory_format=LAYOUTS[layout])
    x = torch.randn(4, 64, 16, 16).to(memory_format=LAYOUTS[layout])
    wanted = gradients(block, x)
    break_backward(monkeypatch, RuntimeError("unable to find an engine"))
    for _ in range(2):
        close(gradients(block, x), wanted)
    assert list(block._flash_dispatcher.failed) == ["sdpa_flash"]
    assert len([message for message in log if "sdpa_flash failed" in message]) == 1


def test_a_backward_asked_for_by_name_that_raises_ends_in_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    break_backward(monkeypatch, RuntimeError("no kernel image"))
    with pytest.raises(FlashKernelError, match=r"sdpa_flash raised in the backward of .*no kernel image"):
        gradients(patched(make("area1")), torch.randn(2, 64, 8, 8))


@pytest.mark.parametrize("choice", ["auto", "sdpa_flash"])
def test_a_lack_of_memory_in_a_backward_is_left_to_the_trainer(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_backward(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    block: Any = patched(make("area1"), choice)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(block, torch.randn(4, 64, 16, 16))
    assert not block._flash_dispatcher.failed


def test_a_backend_without_a_backward_of_its_own_gets_one_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = patched(make("psa")), torch.randn(2, 128, 8, 6)
    wanted = gradients(block, x)
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], backward=None))
    for a, b in zip(gradients(block, x), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_forward_that_raises_is_answered_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Any:
        raise RuntimeError("unable to find an engine")

    block: Any = patched(make("area1"), "auto")
    x = torch.randn(4, 64, 16, 16)
    wanted = gradients(block, x)
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], forward=fail))
    for _ in range(2):  # in the step of the failure, and after it
        close(gradients(block, x), wanted)


# Decisions ------------------------------------------------------------------------------------------------------------
def test_a_decision_is_found_again_and_never_stale() -> None:
    """Whatever a decision depends on changes it at once: modes of torch, the input, what failed, what was learnt."""
    block: Any = patched(make("area1"), "auto")
    dispatcher, x = block._flash_dispatcher, torch.randn(4, 64, 16, 16)
    spec, backend, *_ = block._attention_call(x)
    assert backend == "sdpa_flash"
    assert spec == AttentionSpec(4, 2, 256, 256, 32, 32, torch.float32, "nchw")
    assert block._attention_call(x).spec is spec

    with torch.no_grad():
        assert not block._attention_call(x).spec.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block._attention_call(x).spec.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert block._attention_call(x).spec.dtype is torch.float16
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert block._attention_call(x).spec.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert block._attention_call(x.double()).spec.dtype is torch.float64
    assert block._attention_call(x.to(memory_format=torch.channels_last)).spec.layout == "nhwc"
    assert block._attention_call(x.repeat(4, 1, 1, 1)).spec.batch == 16
    block.area = 2
    assert block._attention_call(x.repeat(4, 1, 1, 1)).spec.batch == 32
    block.area = 1
    assert block._attention_call(x).spec is spec

    block._flash_choice = "sdpa_math"
    assert block._attention_call(x).backend == "sdpa_math"
    block._flash_choice = "auto"
    dispatcher.learn({spec: {"stock": Trial(ms=1.0), "sdpa_flash": Trial(ms=9.0, ms_low=9.0)}}, detect(CPU))
    assert block._attention_call(x) is None  # the stock forward
    dispatcher.learn({}, detect(CPU))
    assert block._attention_call(x).backend == "sdpa_flash"
    dispatcher.fail("", spec, "sdpa_flash", RuntimeError("boom"))
    assert getattr(block._attention_call(x), "backend", "stock") != "sdpa_flash"


def test_two_models_decide_by_their_own_settings() -> None:
    first, second = patched(make("area1"), "sdpa_flash"), patched(make("area1"), "sdpa_math")
    x = torch.randn(2, 64, 8, 8)
    for _ in range(2):
        assert [block._attention_call(x).backend for block in (first, second)] == ["sdpa_flash", "sdpa_math"]  # type: ignore[operator]


def test_decisions_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_flash.dispatch.dispatcher._MAX_DECISIONS", 3)
    block: Any = patched(make("area1"))
    for height in range(1, 9):
        block._attention_call(torch.empty(1, 64, height, 8))
        assert len(block._flash_dispatcher._decisions) <= 3


def test_blocks_keep_nothing_of_a_call() -> None:
    """Decisions are the Dispatcher's, which a checkpoint leaves out and which copies share."""
    block: Any = make("area1")
    patch_modules(block, FlashConfig(backend="sdpa_flash"), dispatcher := Dispatcher(FlashConfig(backend="sdpa_flash")))
    before = set(vars(block))
    gradients(block, torch.randn(2, 64, 8, 8))
    assert set(vars(block)) == before
    assert b"yolo_flash" not in pickle.dumps(block)
    assert copy.deepcopy(block)._flash_dispatcher is dispatcher
