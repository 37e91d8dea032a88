"""What a backend is: one record of data, from which plans, logs, pictures and proofs take all that they need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..machine import Machine
from .calls import Inputs
from .spec import AttentionSpec


@dataclass(frozen=True)
class Backend:
    """A way to compute attention; docs/adding-a-backend.md has an example.

    Attributes:
        name: As written in YAML and in logs.
        limits: Yields each reason why the backend cannot run a spec on a machine. Never touches a GPU.
        forward: `(packed, spec) -> (out, v, *kept)` with packed `[batch, seq_len, num_heads, 2*head_dim + head_dim_v]`,
            of any strides but unit last, and out and v both contiguous `[batch, seq_len, num_heads, head_dim_v]`.
            Autograd can differentiate it. None for `stock`, which is the block's own forward.
        reproducible: Whether the backward of a spec gives the same bits every time, on a machine.
        operators: Names of the operators, one of which each forward calls: in a profile they prove the backend.
        backward: `(packed, kept, dout, dv, spec) -> gradient of packed`, all contiguous; kept are the tensors that the
            forward returned after v. None: autograd differentiates the forward.
        separate: `(inputs, spec) -> out` for three tensors and a mask, see `calls.Inputs`, with out contiguous
            `[batch, seq_len_q, num_heads, head_dim]`. Autograd can differentiate it. None: refused for such tensors.
        fused: Whether the score matrices never reach the memory.
        importable: Imports the package that it runs on; gives why that failed, or nothing where it did not.
        by_name: Why `auto` leaves it out, so that it runs only where it is asked for by name; empty where it does not.
        color: In all pictures, as `#rrggbb`.
    """

    name: str
    limits: Callable[[AttentionSpec, Machine], Iterator[str]]
    forward: Callable[[Tensor, AttentionSpec], tuple[Any, ...]] | None
    reproducible: Callable[[AttentionSpec, Machine], bool]
    operators: tuple[str, ...] = ()
    backward: Callable[[Tensor, Sequence[Any], Tensor, Tensor, AttentionSpec], Tensor] | None = None
    separate: Callable[[Inputs, AttentionSpec], Tensor] | None = None
    fused: bool = True
    importable: Callable[[], str] = lambda: ""
    by_name: Literal["", "approximate", "kernels of other backends"] = ""
    color: str = "#000000"

    @property
    def exact(self) -> bool:
        """Whether it computes what stock computes."""
        return self.by_name != "approximate"

    @property
    def label(self) -> str:
        """The name as every line for people has it: with the word approximate where the backend is that."""
        return self.name if self.exact else f"{self.name} (approximate)"

    def run(self, packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Attention and v, as `forward` gives them."""
        if self.forward is None:
            raise TypeError(f"{self.name} has no forward of a packed tensor: it is the block's own")
        out, v, *_ = self.forward(packed, spec)
        return out, v

    def not_supported_reasons(self, spec: AttentionSpec, machine: Machine) -> tuple[str, ...]:
        """Why this backend cannot run `spec` on `machine`, one sentence a reason; empty when it can."""
        reasons = tuple(self.limits(spec, machine))
        if not reasons and spec.layout == "separate" and self.forward is not None and self.separate is None:
            return ("takes the packed output of one convolution, the 3 tensors are separate",)
        return reasons

    def reasons_here(self, spec: AttentionSpec, machine: Machine) -> tuple[str, ...]:
        """As `not_supported_reasons`, for a machine that is this one: where they are none, the package is imported."""
        reasons = self.not_supported_reasons(spec, machine)
        return reasons or ((problem,) if (problem := self.importable()) else ())


def always(spec: AttentionSpec, machine: Machine) -> bool:
    """`Backend.reproducible` of a backward that never adds with atomics."""
    return True


def on_cpu(spec: AttentionSpec, machine: Machine) -> bool:
    """The CPU's kernel gives each head to one thread; the GPU's backwards add with atomics unless torch forbids it."""
    return machine.kind == "cpu"
