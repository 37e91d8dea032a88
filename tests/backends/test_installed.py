"""Kernels of packages that a user may have installed, by stand-ins for them: layouts, gradients, refusals, imports."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO

from tests.machines import MACHINES
from tests.packages import NAMES, Calls, forget, installed_package
from tests.patching.test_blocks import LAYOUTS, channels, error, make, patched, reference, run
from yolo_flash import AttentionSpec, BackendNotSupportedError, checks, patch_model, plan
from yolo_flash.backends import installed
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.cli import checks as report
from yolo_flash.cli import main
from yolo_flash.config import FlashConfig
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial, select
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.kernels import installed as kernels
from yolo_flash.kernels import operators
from yolo_flash.machine import PACKAGES, Machine, detect, flash_impl
from yolo_flash.planning import autotune
from yolo_flash.planning.plan import PlanRow, describe
from yolo_flash.verification.executed import observe

CPU = torch.device("cpu")
ALL = {"flash_attn_2": "2.8.3", "flash_attn_3": "3.0.0", "flash_attn_4": "4.0.0b36", "xformers": "0.0.35"}
AREA = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float16, "nhwc")
LONG = AttentionSpec(4, 4, 4096, 4096, 32, 32, torch.float16, "nhwc")
SMALL = {
    "area": AttentionSpec(3, 2, 33, 33, 32, 32, torch.float32, "nhwc"),
    "psa": AttentionSpec(3, 2, 33, 33, 32, 64, torch.float32, "nhwc"),
    "psa 36/72": AttentionSpec(3, 2, 33, 33, 36, 72, torch.float32, "nhwc"),
    "area nchw": AttentionSpec(8, 2, 20, 20, 32, 32, torch.float32, "nchw", area=4),
    "separate": AttentionSpec(3, 4, 33, 33, 32, 32, torch.float32, "separate"),
    "separate 36": AttentionSpec(3, 4, 33, 33, 36, 36, torch.float32, "separate"),
    "predict": AttentionSpec(3, 2, 33, 33, 32, 64, torch.float32, "nchw", training=False),
    "bfloat16": AttentionSpec(3, 2, 33, 33, 32, 64, torch.bfloat16, "nhwc"),
}


def with_packages(machine: str, **changes: Any) -> Machine:
    """A card of tests/machines.py with all packages installed."""
    card = MACHINES[machine]
    return dataclasses.replace(card, packages={**card.packages, **ALL, **changes})


@pytest.fixture(params=NAMES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Each package as if it were installed, on a CPU."""
    name = request.param
    nothing = dataclasses.replace(BACKENDS[name], limits=lambda spec, machine: iter(()))
    monkeypatch.setitem(BACKENDS, name, nothing)
    with installed_package(name, monkeypatch) as calls:
        yield calls


@pytest.fixture
def none_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is imported of the packages, none of which is there."""
    asked: list[str] = []

    def fail(name: str) -> Any:
        asked.append(name)
        raise ImportError("libcudart.so.12: cannot open shared object file: No such file or directory")

    forget(monkeypatch)
    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    yield asked
    forget(monkeypatch)


# Results --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SMALL)
def test_results_and_gradients_are_exact_for_random_and_hard_inputs(kind: str, package: Calls) -> None:
    trials = autotune.judge(SMALL[kind], CPU, ["stock", package.name])
    assert trials[package.name].why_not == ""
    assert trials[package.name].ms is not None
    assert bool(package.backward) == SMALL[kind].training


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["area4", "psa", "psa 36/72"])
def test_patched_blocks_equal_float64_with_all_gradients(kind: str, layout: str, package: Calls) -> None:
    block = make(kind)
    x = torch.randn(2, channels(block), 8, 6)
    weight = torch.randn_like(x)
    truth = reference(block, x, weight)
    results = run(patched(block, package.name), x, LAYOUTS[layout], weight)
    for name, value in results.items():
        if float(truth[name].norm()) > 1e-6:  # that of the bias before a BatchNorm is zero
            assert error(value, truth[name], truth[name]) < 1e-4, name
    assert len(package.forward) == len(package.backward) == 1


def packed_of(spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    packed = torch.randn(spec.batch, spec.seq_len_q, spec.num_heads, 2 * spec.head_dim + spec.head_dim_v)
    return packed, *torch.randn(2, spec.batch, spec.seq_len_q, spec.num_heads, spec.head_dim_v)


@pytest.mark.parametrize("kind", ["area", "psa"])
def test_the_kernel_reads_slices_of_the_packed_tensor_and_writes_slices_of_its_gradient(
    kind: str, package: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SMALL[kind]
    if spec.head_dim != spec.head_dim_v and package.name in ("flash_attn_2", "flash_attn_3"):
        pytest.skip("knows one head_dim only")
    given: list[tuple[Tensor, ...]] = []
    inner = operators.call

    def spy(name: str, *args: Any) -> Any:
        given.append(args)
        return inner(name, *args)

    monkeypatch.setattr(operators, "call", spy)
    packed, dout, dimage = packed_of(spec)
    backend: Any = BACKENDS[package.name]
    with torch.no_grad():
        out, image, *kept = backend.forward(packed, spec)
        grad = backend.backward(packed, kept, dout, dimage, spec)
    (call,) = package.forward
    for tensor in (call["q"], call["k"], call["v"]):
        assert tensor.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert call["q"].stride() == packed.stride()
    assert {t.untyped_storage().data_ptr() for t in given[1][6:9]} == {grad.untyped_storage().data_ptr()}
    assert out.is_contiguous()
    assert image.is_contiguous()
    assert grad.shape == packed.shape


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["area", "psa 36/72", "separate 36"])
def test_the_scale_is_that_of_the_true_head_dim_and_the_backward_knows_whether_to_be_deterministic(
    kind: str, deterministic: bool, package: Calls
) -> None:
    spec = SMALL[kind]._replace(deterministic=deterministic)
    autotune.judge(spec, CPU, [package.name])
    calls = package.forward + package.backward
    assert {call["scale"] for call in calls} == {spec.head_dim**-0.5}
    assert {call["deterministic"] for call in package.backward} == {deterministic}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["area", "psa 36/72"])
def test_autograd_differentiates_the_forward_once(kind: str, package: Calls) -> None:
    spec = SMALL[kind]
    packed, *upstream = packed_of(spec)
    grads = []
    for name in (package.name, "sdpa_math"):
        leaf = packed.clone().requires_grad_()
        results = BACKENDS[name].run(leaf, spec)
        grads.append(torch.autograd.grad(results, leaf, upstream, retain_graph=True)[0])
    torch.testing.assert_close(*grads)
    leaf = packed.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"has no gradient of its gradient \(create_graph=True\)"):
        torch.autograd.grad(BACKENDS[package.name].run(leaf, spec)[0].sum(), leaf, create_graph=True)


def test_the_operators_tell_torch_the_truth_about_themselves(package: Calls) -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 16).unbind()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    operator = getattr(torch.ops.yolo_flash, package.name).default
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(operator, (*leaves, 0.3, False), test_utils=tests)
    out, lse = operator(q, k, v, 0.3, False)
    given = (torch.randn_like(out), q, k, v, out, lse, *torch.zeros(3, 2, 9, 2, 16).unbind(), 0.3, False)
    torch.library.opcheck(
        getattr(torch.ops.yolo_flash, f"{package.name}_backward").default, given, test_utils=("test_schema",)
    )


@pytest.mark.parametrize("kind", ["area4", "psa 36/72"])
def test_a_block_compiles_for_training(kind: str, package: Calls) -> None:
    block = patched(make(kind), package.name)
    x = torch.randn(2, channels(block), 8, 6)
    weight = torch.randn_like(x)
    found = []
    for compiled in (False, True):
        mine = copy.deepcopy(block)
        leaf = x.clone().requires_grad_()
        call = torch.compile(mine, backend="aot_eager", fullgraph=True) if compiled else mine
        out = call(leaf)
        (out * weight).sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in mine.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(package.backward) == 2


def test_a_profile_proves_what_ran(package: Calls) -> None:
    block = patched(make("area4"), package.name)
    assert observe(lambda: block(torch.randn(2, 64, 8, 6)).sum().backward())[1] == frozenset([package.name])


def test_a_kernel_that_raises_in_its_backward_is_no_candidate(package: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SMALL["area"]
    monkeypatch.setattr(Calls, "differentiate", lambda *args: 1 / 0)
    trial = autotune.judge(spec, CPU, ["stock", package.name])[package.name]
    assert f"{package.name} raised in the backward of the block" in trial.why_not


def test_a_training_with_validation_runs_by_name(package: Calls, tiny_model: str, tiny_args: dict[str, Any]) -> None:
    """Its EMA is a deep copy of the model, and its checkpoint is plain Ultralytics'."""
    if package.name != "flash_attn_4":
        pytest.skip("one is enough")
    model = patch_model(YOLO(tiny_model), backend=package.name, log=False)
    model.train(**tiny_args)
    assert {row.decision.backend for row in model.trainer.flash_plan} == {package.name}
    assert package.backward
    assert len(package.forward) > len(package.backward)
    network = torch.load(model.trainer.last, weights_only=False)["model"]
    assert not any("yolo_flash" in type(module).__module__ for module in network.modules())


@pytest.mark.measures
def test_a_package_asked_for_by_name_that_is_wrong_is_an_error_before_the_first_step(
    package: Calls, tiny_model: str, tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels may be newer than all that we have tried: only a trial tells."""
    if package.name == "xformers":
        pytest.skip("runs kernels of other backends, and has no trials")
    right = Calls.differentiate

    def wrong(self: Calls, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = right(self, *args)
        return 1.1 * dq, dk, dv

    monkeypatch.setattr(Calls, "differentiate", wrong)
    model = patch_model(YOLO(tiny_model), backend=package.name, autotune=True)
    reason = rf"backend={package.name} cannot run .*: wrong: .* is off by 0\.\d+, .* is allowed\. These can: auto, "
    with pytest.raises(BackendNotSupportedError, match=reason):
        model.train(**tiny_args)
    trials = len(package.backward)
    assert trials > 0
    rows = plan(patch_model(YOLO(tiny_model), backend=package.name, autotune=False), imgsz=64, batch=2, device="cpu")
    assert {row.decision.backend for row in rows} == {package.name}
    assert len(package.backward) == trials


# Refusals -------------------------------------------------------------------------------------------------------------
def refusals(name: str, machine: str, spec: AttentionSpec = AREA, **packages: str) -> str:
    return "; ".join(BACKENDS[name].not_supported_reasons(spec, with_packages(machine, **packages)))


def test_without_the_package_the_reason_says_how_to_get_it() -> None:
    for name, how in installed.HOW.items():
        (reason,) = BACKENDS[name].not_supported_reasons(AREA, MACHINES["H100"])
        assert reason == f"needs the package {PACKAGES[name]}, which is not installed: {how}"
        assert BACKENDS[name].not_supported_reasons(AREA, with_packages("H100")) == ()
        for machine in ("CPU", "MPS", "MI300"):
            assert refusals(name, machine) == f"runs on NVIDIA cards, the device is {MACHINES[machine]}"


@pytest.mark.parametrize(
    ("name", "machine", "reason"),
    [
        ("flash_attn_2", "T4", "needs compute capability >= 8.0, Tesla T4 has 7.5"),
        ("flash_attn_2", "A100", ""),
        ("flash_attn_2", "B200", ""),
        ("flash_attn_3", "T4", "needs compute capability 9.0, Tesla T4 has 7.5"),
        ("flash_attn_3", "A100", "needs compute capability 9.0, NVIDIA A100-SXM4-40GB has 8.0"),
        ("flash_attn_3", "B200", "needs compute capability 9.0, NVIDIA B200 has 10.0"),
        ("flash_attn_4", "T4", "needs compute capability >= 9.0, Tesla T4 has 7.5"),
        ("flash_attn_4", "A100", "needs compute capability >= 9.0, NVIDIA A100-SXM4-40GB has 8.0"),
        ("flash_attn_4", "B200", ""),
        ("flash_attn_4", "RTX 5090", ""),
        ("xformers", "T4", ""),
        ("xformers", "P100", ""),
        ("xformers", "B200", ""),
    ],
)
def test_the_cards(name: str, machine: str, reason: str) -> None:
    assert refusals(name, machine) == reason


def test_dtypes_head_dims_masks_and_versions() -> None:
    single = AREA._replace(dtype=torch.float32)
    wide = AREA._replace(head_dim=136, head_dim_v=136)
    for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
        assert refusals(name, "H100", single) == "needs float16 or bfloat16, the tensors are float32"
        assert refusals(name, "H100", AREA._replace(head_dim_v=264)) == "needs head_dim <= 256, the layer has 264"
        assert refusals(name, "H100", AREA._replace(head_dim=36, head_dim_v=72, training=False)) == ""
    assert (
        refusals("flash_attn_4", "H100", AREA._replace(head_dim_v=72)) == refusals("flash_attn_4", "H100", wide) == ""
    )
    assert refusals("flash_attn_4", "B200", wide) == "needs head_dim <= 128, the layer has 136"
    same_bits = AREA._replace(deterministic=True)
    assert refusals("flash_attn_4", "B200", same_bits) == ""
    assert refusals("flash_attn_4", "RTX 5090", same_bits) == "has no deterministic backward at compute capability 12.0"
    assert refusals("flash_attn_4", "RTX 5090", same_bits._replace(training=False)) == ""
    assert refusals("xformers", "H100", single) == ""
    assert refusals("xformers", "B200", single) == "needs float16 or bfloat16, the tensors are float32"
    assert refusals("xformers", "T4", AREA._replace(dtype=torch.bfloat16)) == (
        "needs float32 or float16, the tensors are bfloat16"
    )
    assert refusals("xformers", "B200", AREA._replace(head_dim_v=64)) == (
        "needs equal head dims at compute capability 10.0, the layer has 32 and 64"
    )
    assert refusals("xformers", "B200", same_bits) == (
        "has nothing deterministic at compute capability 10.0, and torch asks for it"
    )
    assert refusals("flash_attn_2", "A100", flash_attn_2="2.6.3") == "needs flash-attn >= 2.7, found 2.6.3"
    for name in NAMES:
        masked = AREA._replace(layout="separate", mask=True)
        assert refusals(name, "H100", masked) == "takes no mask here, 400 queries x 400 keys are masked"
        packed = refusals(name, "H100", AREA._replace(mask=True))
        assert packed == "takes a mask with separate queries, keys and values only, the tensors are packed"


def test_strict_takes_them_where_torch_asks_for_what_they_can_do() -> None:
    machine = with_packages("H100")
    for deterministic in (True, False):
        decision = select(AREA._replace(deterministic=deterministic), machine, deterministic="strict")
        for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
            assert (name in decision.refused) != deterministic
        assert "xformers" in decision.refused


# Imports --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "meaning"),
    [
        (
            "flash_attn_2",
            "libcudart.so.12: cannot open shared object file: No such file or directory",
            "this flash-attn was built for CUDA 12, and torch 2.11.0+cu130 brings CUDA 13.0. Install one for that CUDA",
        ),
        (
            "flash_attn_2",
            "/site/flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab",
            "built for another torch than 2.11.0+cu130. Build it for this one: pip uninstall flash-attn, then pip",
        ),
        ("flash_attn_3", "libc10_cuda.so: cannot open shared object file", "this flash-attn-3 was built for another"),
        ("flash_attn_3", "/lib/libc.so.6: version `GLIBC_2.32' not found (required by ...)", "on a newer Linux"),
        ("flash_attn_4", "No module named 'cutlass'", "flash-attn-4 needs cutlass, which is not installed. Install it"),
        (
            "flash_attn_4",
            "flash_attn.cute.interface has no _flash_attn_fwd",
            "another version of flash-attn-4 is needed",
        ),
        ("xformers", "No module named 'flash_attn.flash_attn_interface'", "Uninstall flash-attn-4 or xformers"),
        (
            "xformers",
            "Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.9.0.",
            "install a flash-attn of those versions",
        ),
        (
            "xformers",
            "xFormers can't load C++/CUDA extensions. xFormers was built for: PyTorch 2.10.0+cu128 with CUDA 1208",
            "this xformers was built for torch 2.10.0+cu128, its kernels do not load in torch 2.11.0+cu130. Install",
        ),
    ],
)
def test_what_an_import_gave_is_told_with_the_fix(
    name: str, text: str, meaning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str) -> Any:
        assert module == kernels.PACKAGES[name].module
        raise ImportError(text)

    forget(monkeypatch)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib, "import_module", fail)
    problem = installed.import_problem(name)
    assert problem.startswith(f"its import gave ImportError: {text}: ")
    assert meaning in problem


def test_an_extension_that_xformers_could_not_load_is_a_failed_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers keeps that error, and its functions say later that it was not built with CUDA."""
    library = ModuleType("xformers._cpp_lib")
    error = OSError("xFormers can't load C++/CUDA extensions.\n    xFormers was built for:\n    PyTorch 2.10.0+cu128")
    library._cpp_library_load_exception = error  # type: ignore[attr-defined]
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", library)
    monkeypatch.setattr(importlib, "import_module", lambda module: ModuleType(module))
    assert "was built for torch 2.10.0+cu128, its kernels do not load" in installed.import_problem("xformers")
    forget(monkeypatch)


def test_an_error_that_nobody_knows_stands_alone() -> None:
    assert installed.explanation("flash_attn_2", "the moon is full") == ""


def test_a_package_without_the_functions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed_package("flash_attn_4", monkeypatch):
        del sys.modules["flash_attn.cute.interface"]._flash_attn_bwd
        assert installed.import_problem("flash_attn_4").startswith(
            "its import gave ImportError: flash_attn.cute.interface has no _flash_attn_bwd: another version of"
        )


def test_nothing_is_imported_for_a_problem_that_is_refused_or_decided_by_the_rules(none_imported: list[str]) -> None:
    machine = with_packages("H100")
    select(AREA, machine)
    select(AREA._replace(dtype=torch.float32), machine)
    autotune.candidates(AREA._replace(dtype=torch.float32), machine)
    autotune.candidates(AREA, with_packages("T4"))
    autotune.candidates(AREA, MACHINES["H100"])
    assert none_imported == []


def test_packages_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch, none_imported: list[str]) -> None:
    found = {"flash-attn-4": "4.0.0b36", "xformers": "0.0.35"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    from yolo_flash import machine

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert machine._installed() == {"flash_attn_4": "4.0.0b36", "xformers": "0.0.35"}
    assert none_imported == []


def test_a_broken_package_is_no_candidate_and_the_plan_says_why(
    none_imported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = with_packages("H100")
    found = autotune.candidates(AREA, machine)
    assert found == ["stock", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "triton_area"]
    assert len(none_imported) == 3  # once each; xformers only by name
    broken = autotune._not_importable(AREA, machine, found)
    decision = select(AREA, machine, trials={"triton_area": Trial(ms=1.0), **broken})
    assert decision.backend == "triton_area"
    assert "libcudart.so.12" in decision.fate("flash_attn_4")
    assert len(none_imported) == 3


def test_candidates_are_what_can_be_imported_but_never_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    for name in ("flash_attn_4", "xformers"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], importable=lambda: ""))
    found = autotune.candidates(AREA, with_packages("H100"))
    assert "flash_attn_4" in found
    assert "xformers" not in found
    why = "kernels of other backends: runs only where it is asked for by name"
    assert select(AREA, with_packages("H100")).fate("xformers") == why
    asked = select(AREA, with_packages("H100"), "xformers")
    assert (asked.backend, asked.why) == ("xformers", "asked for")


def test_what_an_earlier_run_has_measured_is_not_imported(none_imported: list[str]) -> None:
    assert "flash_attn_4" in autotune.candidates(AREA, with_packages("H100"), known=NAMES)
    assert autotune._not_importable(AREA, with_packages("H100"), known=NAMES) == {}
    assert none_imported == []


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_refuses_what_cannot_run(name: str) -> None:
    with pytest.raises(SystemExit, match=f"backend={name} cannot run .*: runs on NVIDIA cards, the device is"):
        main.main(["plan", "imgsz=64", "device=cpu", f"flash.backend={name}"])


def test_a_broken_package_that_is_asked_for_is_an_error_with_the_fix(none_imported: list[str]) -> None:
    for name in NAMES:
        with pytest.raises(BackendNotSupportedError, match=f"backend={name} cannot run .* its import gave ImportError"):
            select(AREA, with_packages("H100"), name)


def test_checks_shows_what_the_import_gave(
    none_imported: list[str], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    monkeypatch.setattr(report, "detect", lambda device: with_packages("H100"))
    facts = checks("cpu")
    for kind, names in {"YOLO12, area attention": NAMES, "RT-DETR, decoder": ()}.items():
        for name in names:
            (reason,) = facts["backends"][kind][name]
            assert reason.startswith("its import gave ImportError: libcudart.so.12: cannot open")
    assert "flash_attn_4 4.0.0b36" in log[0].splitlines()[2]
    assert "  flash_attn_4   its import gave ImportError: libcudart.so.12" in log[0]


# By the rules ---------------------------------------------------------------------------------------------------------
def test_flash_attn_4_trains_long_problems_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = with_packages("H100")
    with installed_package("flash_attn_4", monkeypatch):
        assert select(LONG, machine).backend == "flash_attn_4"
        assert select(LONG, machine, trials={"triton_area": Trial(ms=1.0)}).backend == "triton_area"
    for other in (AREA, LONG._replace(deterministic=True), LONG._replace(training=False)):
        assert select(other, machine).backend == "triton_area"
    assert select(LONG, with_packages("B200")).backend == "sdpa_flash"
    assert select(LONG, MACHINES["H100"]).backend == "triton_area"


def test_the_rules_go_on_where_its_import_fails(none_imported: list[str]) -> None:
    decision = select(LONG, with_packages("H100"))
    assert decision.backend == "triton_area"
    assert "libcudart.so.12" in decision.fate("flash_attn_4")


# torch's own switch ---------------------------------------------------------------------------------------------------
@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.nn.attention.activate_flash_attention_impl("FA4")` leaves this process, without the kernels."""
    attention = pytest.importorskip("torch.nn.attention")
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA4", raising=False)


def test_torchs_switch_is_seen_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("torch.nn.attention._registry")
    if not hasattr(torch.nn.attention, "current_flash_attention_impl"):
        pytest.skip("torch >= 2.11")
    assert flash_impl() is None
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", object()))
    assert flash_impl() == "FA4"


def test_a_machine_says_what_sdpa_flash_runs(activated: None) -> None:
    card = dataclasses.replace(MACHINES["H100"], flash_impl="FA4")
    assert card.with_versions.endswith("cuDNN 9.19.0, flash FA4")
    assert trial_cache._key(AREA, card) != trial_cache._key(AREA, MACHINES["H100"])
    assert detect(CPU).flash_impl is None  # the CPU's kernel stays
    decision = select(AREA, card, "sdpa_flash")
    rows = [PlanRow("model.6", "AAttn", "train", decision)]
    line = "sdpa_flash runs FA4: torch.nn.attention.activate_flash_attention_impl was called in this process"
    assert line in describe(rows, card)
    assert line not in describe(rows, MACHINES["H100"])


def test_checks_says_what_sdpa_flash_runs(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    card = dataclasses.replace(MACHINES["H100"], flash_impl="FA4")
    monkeypatch.setattr(report, "detect", lambda device: card)
    facts = checks("cpu")
    assert facts["machine"]["flash_impl"] == "FA4"
    assert "  sdpa_flash     ready; runs FA4: torch.nn.attention.activate_flash_attention_impl was called" in log[0]


def test_decisions_are_taken_anew_when_the_switch_is_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention")
    dispatcher = Dispatcher(FlashConfig())
    spec = SMALL["area"]
    first = dispatcher.decide(spec, "auto", CPU)
    assert dispatcher.decide(spec, "auto", CPU) is first
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    second = dispatcher.decide(spec, "auto", CPU)
    assert second is not first
    assert dispatcher.decide(spec, "auto", CPU) is second


def test_the_replaced_kernels_have_limits_of_their_own() -> None:
    def told(machine: str, impl: str, spec: AttentionSpec = AREA) -> str:
        card = dataclasses.replace(MACHINES[machine], flash_impl=impl)
        return "; ".join(BACKENDS["sdpa_flash"].not_supported_reasons(spec, card))

    assert told("H100", "FA4") == told("H100", "FA3") == told("B200", "FA4") == ""
    assert told("A100", "FA4") == (
        "runs FA4, which this process has activated and which needs compute capability 9.0 or 10.0, "
        "NVIDIA A100-SXM4-40GB has 8.0"
    )
    assert "FA3, which this process has activated and which needs compute capability 9.0, " in told("B200", "FA3")
    assert told("B200", "FA4", AREA._replace(head_dim_v=136)) == "needs head_dim <= 128, the layer has 136"
    assert told("A100", "mine") == ""  # somebody's own: nothing is known of it


def test_flash_attn_4_trains_no_head_dim_whose_gradient_is_wrong_on_hopper() -> None:
    """float16 on an H200: off by 1.1 of the gradient of 36 channels, and no error."""
    card = dataclasses.replace(MACHINES["H100"], flash_impl="FA4")
    for head_dim in (9, 16, 36, 40, 48, 72, 80, 100, 112):
        reason = (
            f"its gradient of queries is wrong on Hopper for head_dim {head_dim}, without an error (flash-attention "
            f"pull request 2896, open)"
        )
        spec = AREA._replace(head_dim=head_dim, head_dim_v=head_dim)
        for layout in ("nhwc", "separate"):
            assert refusals("flash_attn_4", "H100", spec._replace(layout=layout)) == reason
        assert "; ".join(BACKENDS["sdpa_flash"].not_supported_reasons(spec, card)) == reason
        assert list(BACKENDS["sdpa_flash"].not_supported_reasons(spec, MACHINES["H100"])) == []
        assert refusals("flash_attn_4", "B200", spec) == ""
        assert refusals("flash_attn_4", "H100", spec._replace(training=False)) == ""
    for head_dim in (17, 32, 64, 96, 120, 128, 136):
        assert refusals("flash_attn_4", "H100", AREA._replace(head_dim=head_dim, head_dim_v=64)) == ""
