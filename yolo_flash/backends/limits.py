"""What each backend cannot do, in sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels import area
from ..machine import PACKAGES, Machine, cudnn_release, dotted, release
from ..utils.compiler import TRITON
from .installed import HOW
from .spec import AttentionSpec, dtype_name


def packed_mask(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """No mask on packed tensors."""
    if spec.mask and spec.layout != "separate":
        yield "takes a mask with separate queries, keys and values only, the tensors are packed"


def _fused(spec: AttentionSpec, machine: Machine, dtypes: tuple[torch.dtype, ...], head_dim_max: int) -> Iterator[str]:
    yield from packed_mask(spec, machine)
    if spec.dtype not in dtypes:
        yield f"needs {' or '.join(map(dtype_name, dtypes))}, the tensors are {dtype_name(spec.dtype)}"
    if (largest := max(spec.head_dim, spec.head_dim_v)) > head_dim_max:
        yield f"needs head_dim <= {head_dim_max}, the layer has {largest}"


def _capability(machine: Machine, lowest: tuple[int, int]) -> Iterator[str]:
    if machine.capability is not None and machine.capability < lowest:
        yield f"needs compute capability >= {dotted(lowest)}, {machine.name} has {dotted(machine.capability)}"


def flash(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention of torch: on NVIDIA cards from Ampere on, AMD's and the CPU."""
    if machine.kind == "cpu":
        yield from _fused(spec, machine, (torch.float32, torch.float64, torch.bfloat16, torch.float16), 1024)
        return
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA, ROCm and the CPU, the device is {machine}"
        return
    if not machine.flash_built:
        yield f"torch {machine.torch} was built without the flash kernels"
    yield from _capability(machine, (8, 0))
    yield from _aotriton(machine)
    yield from _activated(machine)
    replaced = machine.flash_impl == "FA4" and machine.capability is not None and machine.capability >= (10, 0)
    yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 128 if replaced else 256)
    if spec.mask:
        yield f"takes no mask, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked"
    largest = max(spec.head_dim, spec.head_dim_v)
    if spec.training and 192 < largest <= 224 and machine.capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        yield f"no backward for head_dim {largest} at compute capability {dotted(machine.capability)}"


def efficient(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """Memory-efficient attention of torch: on NVIDIA and AMD cards."""
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA and ROCm, the device is {machine}"
        return
    yield from _capability(machine, (5, 0))
    yield from _aotriton(machine)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    if machine.capability is None or machine.capability >= (8, 0):
        dtypes += (torch.bfloat16,)
    elif spec.dtype is torch.bfloat16:
        yield f"bfloat16 needs compute capability >= 8.0, {machine.name} has {dotted(machine.capability)}"
        dtypes += (torch.bfloat16,)
    yield from _fused(spec, machine, dtypes, 1024 if machine.kind == "cuda" else 256)


def cudnn(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """Attention of cuDNN: on NVIDIA cards from Ampere on."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from _capability(machine, (8, 0))
    if machine.capability is not None and machine.capability[0] == 10:
        yield f"gave wrong results at compute capability {dotted(machine.capability)} (pytorch issue 193893, open)"
    yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 128)
    if machine.release < (2, 6):
        yield f"needs torch >= 2.6, found {machine.torch}: gradients were NaN before (pytorch issue 138649)"
    if machine.cudnn is None:
        yield "needs cuDNN, torch reports none"
    elif machine.cudnn <= 91500 and spec.seq_len_k % 128:  # torch itself avoids it: pytorch issue 169849
        yield (
            f"needs cuDNN >= 9.15.1 for a sequence length that is no multiple of 128, found "
            f"{cudnn_release(machine.cudnn)} and {spec.seq_len_k} tokens"
        )
    if spec.mask:
        yield (
            f"takes no mask here, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked: its gradients were NaN "
            f"where 64 tokens were left over by tiles of 128 (pytorch issue 196678)"
        )
    if spec.training and spec.seq_len_k % 128 == 64:
        yield (
            f"its gradients were NaN for scores below -22 or so where 64 tokens are left over by tiles of 128 "
            f"(cudnn-frontend issue 1072), found {spec.seq_len_k} tokens"
        )
    if spec.seq_len_k < 2:
        yield f"needs at least 2 key tokens, the layer has {spec.seq_len_k}"
    if spec.batch > 65535:
        yield f"needs batch x area <= 65535, found {spec.batch}"


def triton_area(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """Our own kernel: on NVIDIA cards from Ampere on."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from _capability(machine, (8, 0))
    found = machine.packages.get("triton", "none")
    if not found[:1].isdigit():
        yield f"needs triton >= {dotted(TRITON)}, its import gave {found}"
    elif release(found) < TRITON:
        yield f"needs triton >= {dotted(TRITON)}, found {found}"
    yield from _fused(spec, machine, (torch.float16, torch.bfloat16), area.HEAD_DIM_MAX)
    if spec.layout == "separate":
        yield "takes the packed output of one convolution, the 3 tensors are separate"


def sparse_window(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlexAttention of torch on NVIDIA's cards from Ampere on and on AMD's, and plain operators on the CPU."""
    if spec.layout == "separate":
        yield "needs an image, and the queries of nn.MultiheadAttention have no place in one"
    elif spec.window is None:
        yield "needs the height and width of the image, which a graph of torch.compile leaves open: compile=False"
    if machine.kind == "cpu":
        return
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA, ROCm and the CPU, the device is {machine}"
        return
    yield from _capability(machine, (8, 0))  # torch itself tests FlexAttention from there on
    if machine.release < (2, 6):
        yield f"needs torch >= 2.6, found {machine.torch}: block masks of before know no sequence length"
    found = machine.packages.get("triton", "none")
    if not found[:1].isdigit():
        yield f"needs triton, which torch.compile generates code for: its import gave {found}"
    yield from _fused(spec, machine, (torch.float32, torch.float16, torch.bfloat16), 256)
    if spec.batch * spec.num_heads > 65535:
        yield f"needs batch x area x heads <= 65535, found {spec.batch * spec.num_heads}"


def _aotriton(machine: Machine) -> Iterator[str]:
    """AMD's kernels are built ahead for a few architectures; torch calls all others experimental."""
    if machine.kind == "rocm" and not (machine.gcn or "").startswith(("gfx90a", "gfx942", "gfx950")):
        yield f"torch ships AMD kernels for gfx90a, gfx942 and gfx950, the device is {machine.gcn}"


def _activated(machine: Machine) -> Iterator[str]:
    """What torch's replacements of its flash kernels refuse, see `Machine.flash_impl`."""
    majors = {"FA3": (9,), "FA4": (9, 10)}.get(machine.flash_impl or "")
    if majors and machine.capability is not None and machine.capability[0] not in majors:
        needed = " or ".join(f"{major}.0" for major in majors)
        yield (
            f"runs {machine.flash_impl}, which this process has activated and which needs compute capability {needed}, "
            f"{machine.name} has {dotted(machine.capability)}"
        )


# Packages that a user may have installed ------------------------------------------------------------------------------
def flash_attn_2(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 2 of the package flash-attn: on NVIDIA cards from Ampere on."""
    if machine.kind == "cuda":
        yield from _capability(machine, (8, 0))
        yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 256)
    yield from _package("flash_attn_2", spec, machine)
    found = machine.packages.get("flash_attn_2", "")
    if machine.kind == "cuda" and found and release(found) < (2, 7):
        yield f"needs flash-attn >= 2.7, found {found}"


def flash_attn_3(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 3 of the hopper build: on Hopper."""
    if machine.kind == "cuda":
        if machine.capability is not None and machine.capability[0] != 9:
            yield f"needs compute capability 9.0, {machine.name} has {dotted(machine.capability)}"
        yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 256)
    yield from _package("flash_attn_3", spec, machine)


def flash_attn_4(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention 4 of the package flash-attn-4: on Hopper and Blackwell."""
    if machine.kind == "cuda":
        yield from _capability(machine, (9, 0))
        hopper = machine.capability is None or machine.capability < (10, 0)
        yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 256 if hopper else 128)
        if spec.training and spec.deterministic and machine.capability is not None and machine.capability[0] == 12:
            yield f"has no deterministic backward at compute capability {dotted(machine.capability)}"
    yield from _package("flash_attn_4", spec, machine)


def xformers(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """What xformers chooses: torch's CUTLASS kernels up to Hopper, and FlashAttention 2 or 3."""
    if machine.kind == "cuda" and machine.capability is not None:
        yield from _capability(machine, (5, 0))
        card = f"at compute capability {dotted(machine.capability)}"
        if machine.capability <= (9, 0):
            dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
            yield from _fused(spec, machine, dtypes if machine.capability >= (8, 0) else dtypes[:2], 1024)
        else:  # it has nothing but FlashAttention 2 there, which it takes for not deterministic
            yield from _fused(spec, machine, (torch.float16, torch.bfloat16), 256)
            if spec.head_dim != spec.head_dim_v:
                yield f"needs equal head dims {card}, the layer has {spec.head_dim} and {spec.head_dim_v}"
            if spec.deterministic:
                yield f"has nothing deterministic {card}, and torch asks for it"
    yield from _package("xformers", spec, machine)


def _package(name: str, spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """What is common to all packages; whether they can be imported, `Backend.importable` finds out."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    if spec.mask and spec.layout == "separate":
        yield f"takes no mask here, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked"
    if name not in machine.packages:
        yield f"needs the package {PACKAGES[name]}, which is not installed: {HOW[name]}"
