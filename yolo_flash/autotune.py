"""How far a result may lie from the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over the norm of `wanted`, in float64.

    Args:
        found: Of any dtype and shape.
        wanted: Of the same shape.

    Returns:
        NaN if there is one in `found`; the norm of `found` if `wanted` is all zero.
    """
    found, wanted = found.double(), wanted.double()
    scale = wanted.norm()
    return ((found - wanted).norm() / torch.where(scale > 0, scale, 1.0)).item()


def allowed_error(stock_error: float, dtype: torch.dtype) -> float:
    """Twice the stock block's own error, plus the rounding of the dtype."""
    return 2 * stock_error + torch.finfo(dtype).eps
