"""The backends of attention: what each computes with, and, in sentences with numbers, what it cannot do.

Torch's fused kernels are called as the aten operators behind `scaled_dot_product_attention`: `sdpa_kernel()` would flip
switches of the whole process, and two threads would see each other's. The price is that torch's own checks, in
`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, do not run: the limits below restate them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .kernels import area
from .machine import Machine, cudnn_release, dotted, release

aten = torch.ops.aten

Layout = Literal["nhwc", "nchw", "separate"]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention problem: everything that decides which backend can run it and which is fastest.

    Attributes:
        batch: Independent problems; for area attention the batch size times the number of areas.
        num_heads: Heads.
        seq_len_q: Query tokens of one problem.
        seq_len_k: Key tokens of one problem.
        head_dim: Channels of a query and of a key.
        head_dim_v: Channels of a value.
        dtype: Of the queries, keys and values.
        layout: How they lie in memory: `nhwc` and `nchw` are the packed output of one convolution in that memory
            format, `separate` is three tensors.
        mask: Whether the scores are masked.
        training: Whether a backward pass will follow.
        deterministic: Whether torch asks for deterministic algorithms.
        area: Strips that an image is cut into, each a problem of `batch`; it matters to the speed of stock alone.
    """

    batch: int
    num_heads: int
    seq_len_q: int
    seq_len_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    layout: Layout
    mask: bool = False
    training: bool = True
    deterministic: bool = False
    area: int = 1

    @property
    def scores(self) -> int:
        """Elements of the score matrices: what stock attention writes to memory and a fused kernel does not."""
        return self.batch * self.num_heads * self.seq_len_q * self.seq_len_k

    def without_sizes(self) -> tuple[Any, ...]:
        """What a compiled graph knows for certain, where groups and tokens may be symbols."""
        return (
            *(self.num_heads, self.head_dim, self.head_dim_v, self.dtype, self.layout),
            *(self.mask, self.training, self.deterministic, self.area),
        )

    @classmethod
    def with_sizes(cls, parts: tuple[Any, ...], batch: int, seq_len: int) -> AttentionSpec:
        """The self-attention of `batch` groups of `seq_len` tokens, from what `without_sizes` left."""
        num_heads, *rest = parts
        return cls(batch, num_heads, seq_len, seq_len, *rest)

    def __str__(self) -> str:
        """`256 x 2 heads x 400 tokens x 32/64, float16, nhwc, train`."""
        tokens = f"{self.seq_len_q}" + (f"/{self.seq_len_k}" if self.seq_len_k != self.seq_len_q else "")
        dims = f"{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        return (
            f"{self.batch} x {self.num_heads} heads x {tokens} tokens x {dims}, {short(self.dtype)}, {self.layout}, "
            f"{'masked, ' if self.mask else ''}{'train' if self.training else 'predict'}"
        )


@dataclass(frozen=True)
class Backend:
    """A way to compute exact attention.

    Attributes:
        name: As written in YAML and in logs.
        limits: Yields, for a spec and a machine, why the backend cannot run; nothing when it can. Never touches a GPU.
        forward: `(packed, spec) -> (out, v, *kept)` with packed `[batch, seq_len, num_heads, 2*head_dim + head_dim_v]`,
            of any strides but unit last, and out and v both contiguous `[batch, seq_len, num_heads, head_dim_v]`.
            Autograd can differentiate it. None for `stock`, which is the block's own forward. Separate tensors:
            `separate.RUNS`.
        reproducible: Whether the backward gives the same bits every time, on a machine.
        operators: Names of the operators, one of which each forward calls: a profile proves the backend by them.
        backward: `(packed, kept, dout, dv, spec) -> gradient of packed`, contiguous as are dout and dv; kept are the
            tensors among what the forward gave behind v. None: autograd runs the forward again for its gradient.
    """

    name: str
    limits: Callable[[AttentionSpec, Machine], Iterator[str]]
    forward: Callable[[Tensor, AttentionSpec], tuple[Any, ...]] | None
    reproducible: Callable[[Machine], bool]
    operators: tuple[str, ...] = ()
    backward: Callable[[Tensor, Sequence[Any], Tensor, Tensor, AttentionSpec], Tensor] | None = None

    def run(self, packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Attention and v, as `forward` gives them."""
        if self.forward is None:
            raise TypeError(f"{self.name} has no forward of a packed tensor: it is the block's own")
        out, v, *_ = self.forward(packed, spec)
        return out, v

    @property
    def fused(self) -> bool:
        """Whether the score matrices never reach the memory."""
        return self.name not in ("stock", "sdpa_math")

    def not_supported_reasons(self, spec: AttentionSpec, machine: Machine) -> tuple[str, ...]:
        """Why this backend cannot run `spec` on `machine`, one sentence a reason; empty when it can."""
        return tuple(self.limits(spec, machine))


class BackendNotSupportedError(ValueError):
    """A backend asked for by name cannot run. The message has its reasons and what would run instead."""


def short(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")


# Limits ---------------------------------------------------------------------------------------------------------------
def _no_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    return iter(())


def _packed_mask_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    """A mask comes along with separate tensors, see `separate.py`."""
    if spec.mask and spec.layout != "separate":
        yield "takes a mask with separate queries, keys and values only, the tensors are packed"


def _fused_limits(
    spec: AttentionSpec, machine: Machine, *, dtypes: tuple[torch.dtype, ...], head_dim_max: int
) -> Iterator[str]:
    yield from _packed_mask_limits(spec, machine)
    if spec.dtype not in dtypes:
        yield f"needs {' or '.join(map(short, dtypes))}, the tensors are {short(spec.dtype)}"
    if (largest := max(spec.head_dim, spec.head_dim_v)) > head_dim_max:
        yield f"needs head_dim <= {head_dim_max}, the layer has {largest}"


def _capability_limits(machine: Machine, lowest: tuple[int, int]) -> Iterator[str]:
    if machine.capability is not None and machine.capability < lowest:
        yield f"needs compute capability >= {dotted(lowest)}, {machine.name} has {dotted(machine.capability)}"


def _flash_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    if machine.kind == "cpu":
        yield from _fused_limits(
            spec,
            machine,
            dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
            head_dim_max=1024,
        )
        return
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA, ROCm and the CPU, the device is {machine}"
        return
    if not machine.flash_built:
        yield f"torch {machine.torch} was built without the flash kernels"
    yield from _capability_limits(machine, (8, 0))
    yield from _aotriton_limits(machine)
    yield from _fused_limits(spec, machine, dtypes=(torch.float16, torch.bfloat16), head_dim_max=256)
    if spec.mask:
        yield f"takes no mask, {spec.seq_len_q} queries x {spec.seq_len_k} keys are masked"
    largest = max(spec.head_dim, spec.head_dim_v)
    if spec.training and 192 < largest <= 224 and machine.capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        yield f"no backward for head_dim {largest} at compute capability {dotted(machine.capability)}"


def _efficient_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    if machine.kind not in ("cuda", "rocm"):
        yield f"runs on CUDA and ROCm, the device is {machine}"
        return
    yield from _capability_limits(machine, (5, 0))
    yield from _aotriton_limits(machine)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    if machine.capability is None or machine.capability >= (8, 0):
        dtypes += (torch.bfloat16,)
    elif spec.dtype is torch.bfloat16:
        yield f"bfloat16 needs compute capability >= 8.0, {machine.name} has {dotted(machine.capability)}"
        dtypes += (torch.bfloat16,)
    yield from _fused_limits(spec, machine, dtypes=dtypes, head_dim_max=1024 if machine.kind == "cuda" else 256)


def _cudnn_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from _capability_limits(machine, (8, 0))
    if machine.capability is not None and machine.capability[0] == 10:
        yield f"gave wrong results at compute capability {dotted(machine.capability)} (pytorch issue 193893, open)"
    yield from _fused_limits(spec, machine, dtypes=(torch.float16, torch.bfloat16), head_dim_max=128)
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


def _triton_area_limits(spec: AttentionSpec, machine: Machine) -> Iterator[str]:
    if machine.kind != "cuda":
        yield f"runs on NVIDIA cards, the device is {machine}"
        return
    yield from _capability_limits(machine, (8, 0))
    found = machine.packages.get("triton", "none")
    if not found[:1].isdigit():
        yield f"needs triton >= {dotted(area.TRITON)}, its import gave {found}"
    elif release(found) < area.TRITON:
        yield f"needs triton >= {dotted(area.TRITON)}, found {found}"
    yield from _fused_limits(spec, machine, dtypes=(torch.float16, torch.bfloat16), head_dim_max=area.HEAD_DIM_MAX)
    if spec.layout == "separate":
        yield "takes the packed output of one convolution, the 3 tensors are separate"


def _aotriton_limits(machine: Machine) -> Iterator[str]:
    """AMD's kernels are built ahead for a few architectures; torch calls all others experimental."""
    if machine.kind == "rocm" and not (machine.gcn or "").startswith(("gfx90a", "gfx942", "gfx950")):
        yield f"torch ships AMD kernels for gfx90a, gfx942 and gfx950, the device is {machine.gcn}"


# Runs -----------------------------------------------------------------------------------------------------------------
def _attend(
    packed: Tensor, spec: AttentionSpec, dim_qk: int, dim_v: int, op: Callable[..., tuple[Any, ...]], *args: object
) -> tuple[Any, ...]:
    """Call an aten operator on the packed tensor: what `Backend.forward` promises, kept is what `_differentiate` needs.

    The operator gets views `[batch, num_heads, seq_len, dim]` of the packed tensor, or, where it needs other head dims,
    copies with zero channels up to `dim_qk` and `dim_v`: zeros change neither a score nor a channel that is kept. The
    scale is that of the true head_dim.
    """
    if dim_qk > spec.head_dim:
        both, v = packed.split([2 * spec.head_dim, spec.head_dim_v], dim=-1)
        q, k = _widen(both.unflatten(-1, (2, spec.head_dim)), dim_qk).unbind(-2)
    else:
        q, k, v = packed.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)
    image, v = v.contiguous(), _widen(v, dim_v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, *rest = op(q, k, v, *args, scale=spec.head_dim**-0.5)
    return _narrow(out, spec.head_dim_v).contiguous(), image, q, k, v, out, *rest


def _differentiate(
    kept: Sequence[Any],
    dout: Tensor,
    dv: Tensor,
    spec: AttentionSpec,
    op: Callable[..., tuple[Any, ...]],
    *args: object,
) -> Tensor:
    """Call the aten operator that autograd would call, without a graph; the gradient of the packed tensor."""
    q, k, v, out, *_ = kept
    dout = _widen(dout, out.shape[-1])
    grads = op(dout.transpose(1, 2), q, k, v, *args, scale=spec.head_dim**-0.5)
    dq, dk, through_scores = map(_narrow, grads, (spec.head_dim, spec.head_dim, spec.head_dim_v))
    return torch.cat((dq, dk, through_scores + dv), dim=-1)


def _widen(t: Tensor, dim: int) -> Tensor:
    """Zero channels behind those of `t`, up to `dim`."""
    return t if t.shape[-1] == dim else torch.constant_pad_nd(t, (0, dim - t.shape[-1]))


def _narrow(t: Tensor, dim: int) -> Tensor:
    """`[batch, num_heads, seq_len, dim or more]` -> `[batch, seq_len, num_heads, dim]`."""
    t = t.transpose(1, 2)
    return t if t.shape[-1] == dim else t[..., :dim]


def _multiple_of_8(dim: int) -> int:
    return -(-dim // 8) * 8


def _math(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    return _attend(packed, spec, spec.head_dim, spec.head_dim_v, aten._scaled_dot_product_attention_math.default)


def _flash(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    dim = max(spec.head_dim, spec.head_dim_v)  # the kernels know one head_dim for all three
    if packed.device.type == "cpu":
        return _attend(packed, spec, dim, dim, flash_for_cpu)
    dim = _multiple_of_8(dim)
    return _attend(packed, spec, dim, dim, aten._scaled_dot_product_flash_attention.default)


def flash_for_cpu(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The CPU's flash operator, with NaN where torch 2.14 gives 0: a query of fewer than 16 keys whose scores are NaN.

    Args:
        q: `[batch, num_heads, seq_len, head_dim]`.
        k: Of the same shape but for its length.
        v: Of the shape of `k`.
        **keywords: `scale` and `attn_mask`, as the operator takes them.

    Returns:
        Attention of the shape of `q`, and the logarithm of the sum of the weights.
    """
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, **keywords)
    if not torch.compiler.is_compiling() and k.shape[-2] < 16:
        out = out + ((q - q).sum(-1, keepdim=True) + (k - k).sum((-2, -1), keepdim=True))  # 0, or NaN
    return out, lse


def _flash_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    out, lse, *rest = kept[3:]
    if packed.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return _differentiate(kept, dout, dv, spec, op, out, lse, 0.0, False)
    op = aten._scaled_dot_product_flash_attention_backward.default
    starts_q, starts_k, seed, offset, _ = rest
    sizes = spec.seq_len_q, spec.seq_len_k
    return _differentiate(kept, dout, dv, spec, op, out, lse, starts_q, starts_k, *sizes, 0.0, False, seed, offset)


def _efficient(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    dims = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    return _attend(packed, spec, *dims, aten._scaled_dot_product_efficient_attention.default, None, spec.training)


def _efficient_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    out, lse, seed, offset = kept[3:]
    op = aten._scaled_dot_product_efficient_attention_backward.default
    wanted = [True, True, True, False]  # there is no bias
    return _differentiate(kept, dout, dv, spec, op, None, out, lse, seed, offset, 0.0, wanted)


def _cudnn(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    dims = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    return _attend(packed, spec, *dims, aten._scaled_dot_product_cudnn_attention.default, None, spec.training)


def _cudnn_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    out, lse, starts_q, starts_k, seed, offset, _ = kept[3:]
    op = aten._scaled_dot_product_cudnn_attention_backward.default
    sizes = spec.seq_len_q, spec.seq_len_k
    args = (out, lse, seed, offset, None, starts_q, starts_k, *sizes, 0.0, False)
    return _differentiate(kept, dout, dv, spec, op, *args)


def _triton_area(packed: Tensor, spec: AttentionSpec) -> tuple[Any, ...]:
    if spec.training and not torch.compiler.is_compiling():
        area.try_backward(packed, spec.head_dim)
    out, image, lse = area.call("area_attention", packed, spec.head_dim)
    return out, image, out, lse


def _triton_area_backward(packed: Tensor, kept: Sequence[Any], dout: Tensor, dv: Tensor, spec: AttentionSpec) -> Tensor:
    grad: Tensor = area.call("area_attention_backward", packed, *kept, dout, dv, spec.head_dim)
    return grad


def _always(machine: Machine) -> bool:
    return True


def _on_cpu(machine: Machine) -> bool:
    """The CPU's kernel gives each head to one thread; the GPU's backwards add with atomics unless torch forbids it."""
    return machine.kind == "cpu"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("stock", _no_limits, None, _always),
        Backend("sdpa_math", _packed_mask_limits, _math, _always, ("aten::_scaled_dot_product_attention_math",)),
        Backend(
            "sdpa_flash",
            _flash_limits,
            _flash,
            _on_cpu,
            ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
            _flash_backward,
        ),
        Backend(
            "sdpa_efficient",
            _efficient_limits,
            _efficient,
            _on_cpu,
            ("aten::_scaled_dot_product_efficient_attention",),
            _efficient_backward,
        ),
        Backend(
            "sdpa_cudnn",
            _cudnn_limits,
            _cudnn,
            _on_cpu,
            ("aten::_scaled_dot_product_cudnn_attention",),
            _cudnn_backward,
        ),
        Backend(
            "triton_area",
            _triton_area_limits,
            _triton_area,
            _always,
            ("yolo_flash::area_attention",),
            _triton_area_backward,
        ),
    )
}


def check_name(name: str) -> str:
    """Return `name` if it is `auto` or a backend.

    Raises:
        BackendNotSupportedError: It is neither, with the nearest valid name.
    """
    valid = ["auto", *BACKENDS]
    if name not in valid:
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise BackendNotSupportedError(f"there is no backend {name!r}.{hint} Valid: {', '.join(valid)}.")
    return name
