"""The table of attention backends: what each computes with, what it cannot do, and its names in a profile.

Torch's fused kernels are called as the aten operators behind `scaled_dot_product_attention`: `sdpa_kernel()` would flip
switches of the whole process, for other threads too. The price is that torch's own checks, in
`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, do not run: `limits.py` restates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..machine import Machine
from ..utils.errors import did_you_mean
from . import installed, limits, packed, separate, sparse
from .separate import Inputs
from .spec import AttentionSpec


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

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
        separate: `(inputs, spec) -> out` for three tensors and a mask, see `separate.Inputs`, with out contiguous
            `[batch, seq_len_q, num_heads, head_dim]`. Autograd can differentiate it. None: takes packed tensors only.
        fused: Whether the score matrices never reach the memory.
        importable: Imports the package that it runs on; gives why that failed, or nothing where it did not.
        by_name: Whether `auto` leaves it out, since its kernels are those of other backends.
        exact: Whether it computes what stock computes. One that does not runs only where it is asked for by name.
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
    by_name: bool = False
    exact: bool = True

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
        return tuple(self.limits(spec, machine))

    def reasons_here(self, spec: AttentionSpec, machine: Machine) -> tuple[str, ...]:
        """As `not_supported_reasons`, for a machine that is this one: where they are none, the package is imported."""
        reasons = self.not_supported_reasons(spec, machine)
        return reasons or ((problem,) if (problem := self.importable()) else ())


class BackendNotSupportedError(ValueError):
    """A backend asked for by name cannot run. The message has the reasons, and the backends that can.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"), backend="triton_area")
        >>> plan(model, device="cpu")
        Traceback (most recent call last):
        yolo_flash.backends.registry.BackendNotSupportedError: backend=triton_area cannot run ... These can: auto, ...
    """


def _always(spec: AttentionSpec, machine: Machine) -> bool:
    return True


def _on_cpu(spec: AttentionSpec, machine: Machine) -> bool:
    """The CPU's kernel gives each head to one thread; the GPU's backwards add with atomics unless torch forbids it."""
    return machine.kind == "cpu"


def _if_asked(spec: AttentionSpec, machine: Machine) -> bool:
    """The package has a slower backward with the same bits every time, and is told when torch asks for it."""
    return spec.deterministic


def _package(name: str, reproducible: Callable[[AttentionSpec, Machine], bool], by_name: bool = False) -> Backend:
    """The backend of a package that a user may have installed."""
    return Backend(
        name,
        getattr(limits, name),
        partial(installed.forward, name),
        reproducible,
        (f"yolo_flash::{name}",),
        partial(installed.backward, name),
        partial(installed.separate, name),
        importable=partial(installed.import_problem, name),
        by_name=by_name,
    )


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("stock", lambda spec, machine: iter(()), None, _always, fused=False),
        Backend(
            "sdpa_math",
            limits.packed_mask,
            packed.math,
            _always,
            ("aten::_scaled_dot_product_attention_math",),
            separate=separate.math,
            fused=False,
        ),
        Backend(
            "sdpa_flash",
            limits.flash,
            packed.flash,
            _on_cpu,
            ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
            packed.flash_backward,
            separate.flash,
        ),
        Backend(
            "sdpa_efficient",
            limits.efficient,
            packed.efficient,
            _on_cpu,
            ("aten::_scaled_dot_product_efficient_attention",),
            packed.efficient_backward,
            separate.efficient,
        ),
        Backend(
            "sdpa_cudnn",
            limits.cudnn,
            packed.cudnn,
            _on_cpu,
            ("aten::_scaled_dot_product_cudnn_attention",),
            packed.cudnn_backward,
            separate.cudnn,
        ),
        Backend(
            "triton_area",
            limits.triton_area,
            packed.triton_area,
            _always,
            ("yolo_flash::area_attention",),
            packed.triton_area_backward,
        ),
        _package("flash_attn_2", _if_asked),
        _package("flash_attn_3", _if_asked),
        _package("flash_attn_4", _if_asked),
        _package("xformers", _on_cpu, by_name=True),
        Backend("sparse_window", limits.sparse_window, sparse.attend, _always, (sparse.OPERATOR,), exact=False),
    )
}


def label(name: str) -> str:
    """The name of a backend, or `auto`, as every line for people has it, see `Backend.label`."""
    return BACKENDS[name].label if name in BACKENDS else name


def is_approximate(name: str) -> bool:
    """Whether a backend computes something else than stock attention; `auto` never takes one."""
    return name in BACKENDS and not BACKENDS[name].exact


def check_name(name: str) -> str:
    """Return `name` if it is `auto` or a backend.

    Raises:
        BackendNotSupportedError: It is neither, with the nearest valid name.
    """
    valid = ["auto", *BACKENDS]
    if name not in valid:
        raise BackendNotSupportedError(f"there is no backend {name!r}.{did_you_mean(name, valid)}")
    return name
