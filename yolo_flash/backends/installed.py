"""Backends of packages that a user may have installed: calls, limits, and what a failed import means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import installed, operators
from ..machine import PACKAGES, Machine, dotted, release
from ..utils.errors import first_line
from .backend import Backend, on_cpu
from .calls import Inputs, call_packed, call_separate, multiple_of_8, narrow, widen
from .conditions import HALF, capability, fa4_gradient, fits
from .spec import AttentionSpec

HOW = {  # to get the package of a backend
    "flash_attn_2": "pip install --no-build-isolation flash-attn",
    "flash_attn_3": "pip install --no-build-isolation . in the folder hopper of github.com/Dao-AILab/flash-attention",
    "flash_attn_4": "pip install --pre flash-attn-4, with CUDA 13 'flash-attn-4[cu13]'",
    "xformers": "pip install xformers",
}
_ONE_HEAD_DIM = ("flash_attn_2", "flash_attn_3")  # of queries, keys and values


def _operator(name: str, spec: AttentionSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    """The package's attention as an aten operator would be called: on views `[batch, num_heads, seq_len, dim]`."""

    def op(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = operators.call(name, *(t.transpose(1, 2) for t in (q, k, v)), scale, spec.deterministic)
        return out.transpose(1, 2), lse

    return op


def forward(name: str, packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """`Backend.forward` by a package."""
    dims = multiple_of_8(spec.head_dim), multiple_of_8(spec.head_dim_v)
    if name in _ONE_HEAD_DIM:
        dims = max(dims), max(dims)
    return call_packed(packed, spec, *dims, _operator(name, spec))


def backward(name: str, packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """`Backend.backward` by a package, which writes its gradients into the packed one where no channel was padded."""
    *views, lse = kept
    q, k, v, out = (t.transpose(1, 2) for t in views)
    widths, dims = [t.shape[-1] for t in (q, k, v)], [spec.head_dim, spec.head_dim, spec.head_dim_v]
    grad = packed.new_empty((*packed.shape[:3], sum(widths)))
    parts = grad.split(widths, dim=-1)
    dout = widen(dout, out.shape[-1])
    operators.call(f"{name}_backward", dout, q, k, v, out, lse, *parts, spec.head_dim**-0.5, spec.deterministic)
    if widths == dims:
        parts[2].add_(dv)
        return grad
    dq, dk, through_scores = (narrow(t.transpose(1, 2), dim) for t, dim in zip(parts, dims, strict=True))
    return torch.cat((dq, dk, through_scores + dv), dim=-1)


def separate(name: str, inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """`Backend.separate` by a package."""
    return call_separate(inputs, spec, 8, _operator(name, spec))


# Limits ---------------------------------------------------------------------------------------------------------------
def _flash_attn_2(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 2 of the package flash-attn: on NVIDIA cards from Ampere on."""
    if machine.kind == "cuda":
        yield from capability(machine, (8, 0))
        yield from fits(spec, machine, HALF, 256)
    yield from _limits("flash_attn_2", spec, machine)
    found = machine.packages.get("flash_attn_2", "")
    if machine.kind == "cuda" and found and release(found) < (2, 7):
        yield f"needs flash-attn >= 2.7, found {found}"


def _flash_attn_3(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 3 of the hopper build: on Hopper."""
    if machine.kind == "cuda":
        if machine.capability is not None and machine.capability[0] != 9:
            yield f"needs compute capability 9.0, {machine.name} has {dotted(machine.capability)}"
        yield from fits(spec, machine, HALF, 256)
    yield from _limits("flash_attn_3", spec, machine)


def _flash_attn_4(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 4 of the package flash-attn-4: on Hopper and Blackwell."""
    if machine.kind == "cuda":
        yield from capability(machine, (9, 0))
        hopper = machine.capability is None or machine.capability < (10, 0)
        yield from fits(spec, machine, HALF, 256 if hopper else 128)
        yield from fa4_gradient(spec.head_dim, spec, machine)
        if spec.training and spec.deterministic and machine.capability is not None and machine.capability[0] == 12:
            yield f"has no deterministic backward at compute capability {dotted(machine.capability)}"
    yield from _limits("flash_attn_4", spec, machine)


def _xformers(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """What xformers chooses: torch's CUTLASS kernels up to Hopper, and FlashAttention 2 or 3."""
    if machine.kind == "cuda" and machine.capability is not None:
        yield from capability(machine, (5, 0))
        card = f"at compute capability {dotted(machine.capability)}"
        if machine.capability <= (9, 0):
            dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
            yield from fits(spec, machine, dtypes if machine.capability >= (8, 0) else dtypes[:2], 1024)
        else:  # it has nothing but FlashAttention 2 there, which it takes for not deterministic
            yield from fits(spec, machine, HALF, 256)
            if spec.head_dim != spec.head_dim_v:
                yield f"needs equal head dims {card}, the layer has {spec.head_dim} and {spec.head_dim_v}"
            if spec.deterministic:
                yield f"has nothing deterministic {card}, and torch asks for it"
    yield from _limits("xformers", spec, machine)


def _limits(name: str, spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """What is common to all packages; whether they can be imported, `Backend.importable` finds out."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    if spec.mask and spec.layout == "separate":
        yield f"takes no mask here, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked"
    if name not in machine.packages:
        yield f"needs the package {PACKAGES[name]}, which is not installed: {HOW[name]}"


# Imports --------------------------------------------------------------------------------------------------------------
@cache
def import_problem(name: str) -> str:
    """Why a package cannot be imported, with the fix where the cause is known; empty where it can. Imports it."""
    try:
        installed.load(name)
    except Exception as error:  # a broken installation raises anything, and its text is what the user needs
        return f"its import gave {first_line(error)}{explanation(name, str(error))}"
    return ""


def explanation(name: str, text: str) -> str:
    """What the text of a failed import means and what to do, as the end of a sentence; empty if nobody knows."""
    package, how = PACKAGES[name], HOW[name]
    cuda = f"brings CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for the CPU"
    if found := re.search(r"lib(?:cudart|cublas|cublasLt|nvrtc)\.so\.(\d+)", text):
        return (
            f": this {package} was built for CUDA {found[1]}, and torch {torch.__version__} {cuda}. "
            f"Install one for that CUDA, or build it here: {how}"
        )
    if found := re.search(r"was built for: PyTorch (\S+)", text):
        return (
            f": this {package} was built for torch {found[1]}, its kernels do not load in torch {torch.__version__}. "
            f"Install one for that torch, or build it here: {how} --no-build-isolation --no-binary {package}"
        )
    if re.search(r"undefined symbol|lib(?:torch|c10)\S*\.so|DLL load failed", text):
        return (
            f": this {package} was built for another torch than {torch.__version__}. Build it for this one: "
            f"pip uninstall {package}, then {how}"
        )
    if re.search(r"GLIBC(?:XX)?_[\d.]+' not found", text):
        return f": this {package} was built on a newer Linux. Build it here: {how}"
    if name == "xformers" and "flash_attn.flash_attn_interface" in text:
        return (
            ": xformers takes the folder flash_attn of flash-attn-4 for flash-attn 2, which is not there. "
            "Uninstall flash-attn-4 or xformers, or install flash-attn 2 as well"
        )
    if "Requires Flash-Attention version" in text:
        return ": install a flash-attn of those versions, or set XFORMERS_IGNORE_FLASH_VERSION_CHECK=1"
    if "has no " in text:
        return f": another version of {package} is needed: {how}"
    if found := re.search(r"No module named '([\w.]+)'", text):
        return f": {package} needs {found[1]}, which is not installed. Install it with what it needs: {how}"
    return ""


# The backends ---------------------------------------------------------------------------------------------------------
def _if_asked(spec: AttentionSpec, machine: Machine) -> bool:
    """The package has a slower backward with the same bits every time, and is told when torch asks for it."""
    return spec.deterministic


def _package(
    name: str, limits: Callable[[AttentionSpec, Machine], Iterator[str]], color: str, **differently: Any
) -> Backend:
    facts: dict[str, Any] = {
        "reproducible": _if_asked,
        "operators": (f"yolo_flash::{name}",),
        "backward": partial(backward, name),
        "separate": partial(separate, name),
        "importable": partial(import_problem, name),
    }
    return Backend(name, limits, partial(forward, name), color=color, **(facts | differently))


INSTALLED = (
    _package("flash_attn_2", _flash_attn_2, "#f0e442"),
    _package("flash_attn_3", _flash_attn_3, "#ddcc77"),
    _package("flash_attn_4", _flash_attn_4, "#009e73"),
    _package("xformers", _xformers, "#aa4499", reproducible=on_cpu, by_name="kernels of other backends"),
)
