"""What tests need that the oldest supported releases lack; docs/compatibility.md has the same in words."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import ultralytics

from yolo_flash.machine import dotted, release
from yolo_flash.utils.compiler import LEAST_TRITON

TORCH, ULTRALYTICS = release(torch.__version__), release(ultralytics.__version__)

loss_in_graphs = pytest.mark.skipif(
    ULTRALYTICS < (8, 4, 180), reason="the loss fits into graphs from ultralytics 8.4.180 on"
)
few_queries = pytest.mark.skipif(
    ULTRALYTICS < (8, 4, 150), reason="this RT-DETR cannot run images with fewer tokens than queries, stock or not"
)


def needs_triton() -> None:
    """Skip a module where our kernels cannot run, not even in Triton's interpreter.

    Raises:
        pytest.skip.Exception: There is no Triton, or an older one.
    """
    try:
        found = version("triton")
    except PackageNotFoundError:
        pytest.skip("Triton has no wheel for this platform", allow_module_level=True)
    if release(found) < LEAST_TRITON:
        pytest.skip(f"our kernels need triton >= {dotted(LEAST_TRITON)}, found {found}", allow_module_level=True)
