"""Texts of errors, and which errors mean that memory ran out."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch


def did_you_mean(word: str, valid: Collection[str]) -> str:
    """The end of a message about a word that is not valid: the nearest valid one, then all of them."""
    close = difflib.get_close_matches(word, valid, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Valid: {', '.join(valid)}."


def first_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch would help, so that the trainer has to handle the exception."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower() or "ALLOC_FAILED" in text
