"""Relative errors, attention in high precision as the reference, and torch's switches of matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .memory import free_bytes

Results = tuple[Tensor, ...]

_BACKENDS: Any = torch.backends  # torch's stubs lack the newer switches
_SCORES_AT_ONCE = 2**26  # half a GiB in float64
_BYTES_A_SCORE = 128  # four matrices in float64, in a quarter of the free memory


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; NaN if `found` has one.

    Where `wanted` is zero, the norm of `found`.
    """
    wanted = wanted.double()
    norm = wanted.norm()
    return float((found.double() - wanted).norm() / (norm if norm > 0 else 1))


def allowed_error(stock_error: float, dtype: torch.dtype) -> float:
    """The relative error that a backend may have: twice that of the stock block in the same dtype, plus rounding."""
    return 2 * stock_error + torch.finfo(dtype).eps


@torch.no_grad()
def reference(
    packed: Tensor,
    dout: Tensor,
    dimage: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain attention in high precision, a slice of queries of one group at a time: 0.5 GiB a matrix at most.

    Args:
        packed: Queries, keys and values `[groups, tokens, heads, 2*head_dim + head_dim_v]`.
        dout: Upstream gradient of attention `[groups, tokens, heads, head_dim_v]`.
        dimage: Upstream gradient of the copy of v, of the same shape.
        head_dim: Channels of a query and of a key.
        dtype: What to compute in.
        mask: Bool `[tokens, tokens]`, True where a key is not seen.

    Returns:
        Attention, and the gradient of `packed`, both in `dtype`.
    """
    sizes = (head_dim, head_dim, dout.shape[-1])
    out, dpacked = torch.zeros_like(dout, dtype=dtype), torch.zeros_like(packed, dtype=dtype)
    groups, tokens, heads, _ = packed.shape
    at_once = min(_SCORES_AT_ONCE, free_bytes(packed.device) // _BYTES_A_SCORE)
    step, scale = max(1, at_once // (heads * tokens)), head_dim**-0.5
    for group in range(groups):
        q, k, v = packed[group].to(dtype).transpose(0, 1).split(sizes, dim=-1)  # [heads, tokens, channels]
        dq, dk, dv = dpacked[group].transpose(0, 1).split(sizes, dim=-1)  # views, written in place
        dv += dimage[group].to(dtype).transpose(0, 1)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            do = dout[group, part].to(dtype).transpose(0, 1)
            scores = scale * q[:, part] @ k.mT
            p = torch.softmax(scores if mask is None else scores.masked_fill_(mask[part], -math.inf), dim=-1)
            dv += p.mT @ do
            ds = do @ v.mT
            ds = p * (ds - (p * ds).sum(-1, keepdim=True))
            dq[:, part] = scale * ds @ k
            dk += scale * ds.mT @ q[:, part]
            out[group, part] = (p @ v).transpose(0, 1)
    return out, dpacked


def arithmetic() -> Iterator[tuple[str, str]]:
    """Name and value of every switch of the process that changes how torch multiplies.

    Torch 2.9 has new switches. Once a new one is set, torch refuses to read the old one.
    """
    gpu, cudnn, cpu = _BACKENDS.cuda.matmul, _BACKENDS.cudnn, _BACKENDS.mkldnn
    switches: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "float32": (torch.get_float32_matmul_precision, lambda: (gpu.fp32_precision, cpu.matmul.fp32_precision)),
        "tf32": (lambda: gpu.allow_tf32, lambda: gpu.fp32_precision),
        "cudnn tf32": (lambda: cudnn.allow_tf32, lambda: (cudnn.fp32_precision, cudnn.conv.fp32_precision)),
        "float16 sums": (lambda: gpu.allow_fp16_reduced_precision_reduction, lambda: ""),
        "bfloat16 sums": (lambda: gpu.allow_bf16_reduced_precision_reduction, lambda: ""),
    }
    for name, (old, new) in switches.items():
        try:
            yield name, str(old())
        except RuntimeError:  # only where there are new ones
            yield name, str(new())
