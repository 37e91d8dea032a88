"""The table of attention backends."""

from __future__ import annotations

from ..utils.errors import did_you_mean
from .backend import Backend, always
from .installed import INSTALLED
from .sdpa import CUDNN, EFFICIENT, FLASH, MATH
from .sparse import SPARSE_WINDOW
from .triton_area import TRITON_AREA

STOCK = Backend("stock", lambda spec, machine: iter(()), None, always, fused=False, color="#a0a0a0")

_ALL = (STOCK, MATH, FLASH, EFFICIENT, CUDNN, TRITON_AREA, *INSTALLED, SPARSE_WINDOW)  # in the order of every list
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}

# Okabe and Ito's palette and others that colour-blind readers can tell apart; unfused backends are grey.
COLORS = {backend.name: backend.color for backend in BACKENDS.values()}


class BackendNotSupportedError(ValueError):
    """A backend asked for by name cannot run. The message has the reasons, and the backends that can.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"), backend="triton_area")
        >>> plan(model, device="cpu")
        Traceback (most recent call last):
        yolo_flash.backends.registry.BackendNotSupportedError: backend=triton_area cannot run ... These can: auto, ...
    """


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
