"""Backends of torch's own attention, called as the aten operators behind `scaled_dot_product_attention`.

`sdpa_kernel()` would flip switches of the whole process, for other threads too. The price is that torch's own checks,
in `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, do not run: the limits restate them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..machine import Machine, cudnn_release, dotted
from .backend import Backend, always, on_cpu
from .calls import Inputs, bias_of, call_packed, call_separate, multiple_of_8, packed_gradient
from .conditions import HALF, capability, fa4_gradient, fits, packed_mask
from .spec import AttentionSpec

aten = torch.ops.aten


# Unfused --------------------------------------------------------------------------------------------------------------
def math(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Torch's unfused attention."""
    return call_packed(packed, spec, spec.head_dim, spec.head_dim_v, aten._scaled_dot_product_attention_math.default)


def separate_math(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Torch's unfused attention."""
    return call_separate(inputs, spec, 1, aten._scaled_dot_product_attention_math, bias_of(inputs[3], spec))


MATH = Backend(
    "sdpa_math",
    packed_mask,
    math,
    always,
    ("aten::_scaled_dot_product_attention_math",),
    separate=separate_math,
    fused=False,
    color="#606060",
)


# FlashAttention -------------------------------------------------------------------------------------------------------
def flash_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """FlashAttention of torch: on NVIDIA cards from Ampere on, AMD's and the CPU."""
    if machine.kind == "cpu":
        yield from fits(spec, machine, (torch.float32, torch.float64, torch.bfloat16, torch.float16), 1024)
        return
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA, ROCm and the CPU, the device is {machine}"
        return
    if not machine.flash_built:
        yield f"torch {machine.torch} was built without the flash kernels"
    yield from capability(machine, (8, 0))
    yield from _aotriton(machine)
    yield from _activated(spec, machine)
    replaced = machine.flash_impl == "FA4" and machine.capability is not None and machine.capability >= (10, 0)
    yield from fits(spec, machine, HALF, 128 if replaced else 256)
    if spec.mask:
        yield f"takes no mask, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked"
    largest = max(spec.head_dim, spec.head_dim_v)
    if spec.training and 192 < largest <= 224 and machine.capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        yield f"no backward for head_dim {largest} at compute capability {dotted(machine.capability)}"


def _activated(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """What torch's replacements of its flash kernels refuse, see `Machine.flash_impl`."""
    majors = {"FA3": (9,), "FA4": (9, 10)}.get(machine.flash_impl or "")
    if majors and machine.capability is not None and machine.capability[0] not in majors:
        needed = " or ".join(f"{major}.0" for major in majors)
        yield (
            f"runs {machine.flash_impl}, which this process has activated and which needs compute capability {needed}, "
            f"{machine.name} has {dotted(machine.capability)}"
        )
    if machine.flash_impl == "FA4":
        yield from fa4_gradient(max(spec.head_dim, spec.head_dim_v), spec, machine)


def flash(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """FlashAttention."""
    dim = max(spec.head_dim, spec.head_dim_v)  # the kernels know one head_dim for all three
    if packed.device.type == "cpu":
        return call_packed(packed, spec, dim, dim, flash_for_cpu)
    dim = multiple_of_8(dim)
    return call_packed(packed, spec, dim, dim, aten._scaled_dot_product_flash_attention.default)


def flash_for_cpu(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The CPU's flash operator, with NaN for scores of NaN over fewer than 16 keys, where torch 2.14 gives 0.

    It takes tensors `[batch, num_heads, seq_len, head_dim]` and the keywords `scale` and `attn_mask`, as the operator
    does, and returns attention and the logarithm of the sum of the weights.
    """
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, **keywords)
    if not torch.compiler.is_compiling() and k.shape[-2] < 16:
        out = out + ((q - q).sum(-1, keepdim=True) + (k - k).sum((-2, -1), keepdim=True))  # 0, or NaN
    return out, lse


def flash_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `flash`."""
    out, lse, *rest = kept[3:]
    if packed.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return packed_gradient(kept, dout, dv, spec, op, out, lse, 0.0, False)
    op = aten._scaled_dot_product_flash_attention_backward.default
    starts_q, starts_k, seed, offset, _ = rest
    sizes = spec.seq_len_q, spec.seq_len_k
    return packed_gradient(kept, dout, dv, spec, op, out, lse, starts_q, starts_k, *sizes, 0.0, False, seed, offset)


def separate_flash(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """FlashAttention."""
    if inputs[0].device.type == "cpu":
        return call_separate(inputs, spec, 1, flash_for_cpu, attn_mask=bias_of(inputs[3], spec))
    return call_separate(inputs, spec, 8, aten._scaled_dot_product_flash_attention)


FLASH = Backend(
    "sdpa_flash",
    flash_limits,
    flash,
    on_cpu,
    ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    flash_backward,
    separate=separate_flash,
    color="#56b4e9",
)


# Memory-efficient -----------------------------------------------------------------------------------------------------
def efficient_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """Memory-efficient attention of torch: on NVIDIA and AMD cards."""
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA and ROCm, the device is {machine}"
        return
    yield from capability(machine, (5, 0))
    yield from _aotriton(machine)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    if machine.capability is None or machine.capability >= (8, 0):
        dtypes += (torch.bfloat16,)
    elif spec.dtype is torch.bfloat16:
        yield f"bfloat16 needs compute capability >= 8.0, {machine.name} has {dotted(machine.capability)}"
        dtypes += (torch.bfloat16,)
    yield from fits(spec, machine, dtypes, 1024 if machine.kind == "cuda" else 256)


def _aotriton(machine: Machine) -> Iterator[str]:
    """AMD's kernels are built ahead for a few architectures; torch calls all others experimental."""
    if machine.kind == "rocm" and not (machine.gcn or "").startswith(("gfx90a", "gfx942", "gfx950")):
        yield f"torch ships AMD kernels for gfx90a, gfx942 and gfx950, the device is {machine.gcn}"


def efficient(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Memory-efficient attention."""
    dims = multiple_of_8(spec.head_dim), multiple_of_8(spec.head_dim_v)
    return call_packed(packed, spec, *dims, aten._scaled_dot_product_efficient_attention.default, None, spec.training)


def efficient_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `efficient`."""
    out, lse, seed, offset = kept[3:]
    op = aten._scaled_dot_product_efficient_attention_backward.default
    wanted = [True, True, True, False]  # there is no bias
    return packed_gradient(kept, dout, dv, spec, op, None, out, lse, seed, offset, 0.0, wanted)


def separate_efficient(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Memory-efficient attention."""
    operator = aten._scaled_dot_product_efficient_attention
    return call_separate(inputs, spec, 8, operator, bias_of(inputs[3], spec), spec.training)


EFFICIENT = Backend(
    "sdpa_efficient",
    efficient_limits,
    efficient,
    on_cpu,
    ("aten::_scaled_dot_product_efficient_attention",),
    efficient_backward,
    separate=separate_efficient,
    color="#cc79a7",
)


# cuDNN ----------------------------------------------------------------------------------------------------------------
def cudnn_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """Attention of cuDNN: on NVIDIA cards from Ampere on."""
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from capability(machine, (8, 0))
    if machine.capability is not None and machine.capability[0] == 10:
        yield f"gave wrong results at compute capability {dotted(machine.capability)} (pytorch issue 193893, open)"
    yield from fits(spec, machine, HALF, 128)
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


def cudnn(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    """Attention of cuDNN."""
    dims = multiple_of_8(spec.head_dim), multiple_of_8(spec.head_dim_v)
    return call_packed(packed, spec, *dims, aten._scaled_dot_product_cudnn_attention.default, None, spec.training)


def cudnn_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    """The gradient of `cudnn`."""
    out, lse, starts_q, starts_k, seed, offset, _ = kept[3:]
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    sizes = spec.seq_len_q, spec.seq_len_k
    rest = starts_q, starts_k, *sizes, 0.0, False
    return packed_gradient(kept, dout, dv, spec, op, out, lse, seed, offset, None, *rest)


def separate_cudnn(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """Attention of cuDNN."""
    return call_separate(inputs, spec, 8, aten._scaled_dot_product_cudnn_attention, None, spec.training)


CUDNN = Backend(
    "sdpa_cudnn",
    cudnn_limits,
    cudnn,
    on_cpu,
    ("aten::_scaled_dot_product_cudnn_attention",),
    cudnn_backward,
    separate=separate_cudnn,
    color="#0072b2",
)
