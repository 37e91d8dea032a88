"""Words about exceptions."""

from __future__ import annotations

import torch


def first_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch would help: such errors are the trainer's to answer."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower() or "ALLOC_FAILED" in text
