"""yolo-flash: exact, fused and fast attention inside Ultralytics YOLO models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .backends.registry import BackendNotSupportedError
    from .backends.spec import AttentionSpec
    from .checkpoints.convert import convert
    from .checkpoints.reading import CheckpointError
    from .cli.checks import checks
    from .config import FlashConfig, FlashConfigError
    from .dispatch.decision import Decision
    from .engine.model import patch_model, plan, unpatch_model
    from .graphs.graphed_step import FlashGraphError
    from .machine import Machine
    from .patching.fallback import FlashKernelError
    from .planning.plan import PlanRow
    from .verification.verify import verify

__all__ = [
    "AttentionSpec",
    "BackendNotSupportedError",
    "CheckpointError",
    "Decision",
    "FlashConfig",
    "FlashConfigError",
    "FlashGraphError",
    "FlashKernelError",
    "Machine",
    "PlanRow",
    "__version__",
    "checks",
    "convert",
    "patch_model",
    "plan",
    "unpatch_model",
    "verify",
]

# Imported when first used: Ultralytics changes the environment and may greet on standard output when it is imported.
_MODULES = {
    "AttentionSpec": "backends.spec",
    "BackendNotSupportedError": "backends.registry",
    "CheckpointError": "checkpoints.reading",
    "Decision": "dispatch.decision",
    "FlashConfig": "config",
    "FlashConfigError": "config",
    "FlashGraphError": "graphs.graphed_step",
    "FlashKernelError": "patching.fallback",
    "Machine": "machine",
    "PlanRow": "planning.plan",
    "checks": "cli.checks",
    "convert": "checkpoints.convert",
    "patch_model": "engine.model",
    "plan": "engine.model",
    "unpatch_model": "engine.model",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    except AttributeError as error:  # which Python would take for a name that does not exist, and not tell
        raise ImportError(f"{name} of yolo_flash cannot be imported: {error}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
