"""Call the operators `yolo_flash::NAME` that the modules beside this one define."""

from __future__ import annotations

from typing import Any

import torch


def call(name: str, *args: Any) -> Any:
    """Call an operator; in no_grad mode it skips the registered autograd formula, which is slow Python."""
    operator = getattr(torch.ops.yolo_flash, name).default  # kept by torch as an attribute, once it was asked for
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
