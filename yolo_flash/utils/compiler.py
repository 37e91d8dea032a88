"""What compilers need: a mark for torch.compile without importing torch._dynamo, and the least version of Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

LEAST_TRITON = (3, 3)  # before it the compiler aborts the process on Hopper

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(function: F) -> F:
    """Do all that `torch.compiler.assume_constant_result` does, but for importing torch._dynamo (1 to 2 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
