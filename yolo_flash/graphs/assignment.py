"""Which query gets which box, without the host: SciPy's `linear_sum_assignment` of many small matrices at once."""

from __future__ import annotations

import torch
from packaging.version import Version
from torch import Tensor

from ..utils.compiler import LEAST_TRITON
from ..utils.errors import first_line

_LEAST = ".".join(map(str, LEAST_TRITON))
_WARPS = 4  # of a program, which has the queries of one image in registers


def not_supported_reason() -> str:
    """Why there is no kernel on this machine; empty if there is."""
    try:
        import triton

        found = Version(triton.__version__)
    except Exception as error:  # no Triton, or a broken one
        return f"boxes are matched without the host by Triton: {first_line(error)}"
    if found < Version(_LEAST):
        return f"boxes are matched without the host by triton >= {_LEAST}, found {found}"
    return ""


def assign(costs: Tensor, counts: Tensor) -> Tensor:
    """The assignments of least cost, computed in float64.

    Where several assignments cost the least, another one than SciPy's may be found.

    Args:
        costs: `[layers, images, boxes, queries]` float32, finite, contiguous; on a CUDA device.
        counts: `[images]` int32: boxes that an image has, the first ones of its room. No more than queries.

    Returns:
        The box of each query `[layers, images, queries]` int64, -1 for a query without a box.
    """
    from .assignment_triton import assign as kernel

    layers, images, boxes, queries = costs.shape
    found = torch.empty(layers, images, queries, dtype=torch.int64, device=costs.device)
    width = 1 << max(queries - 1, 1).bit_length()
    kernel[(layers * images,)](costs, counts, found, images, boxes, queries, WIDTH=width, num_warps=_WARPS)
    return found
