"""yolo-flash: exact, fused and fast attention inside Ultralytics YOLO models."""

from ._version import __version__
from .backends import AttentionSpec, BackendNotSupportedError
from .blocks import FlashKernelError
from .config import FlashConfig, FlashConfigError
from .machine import Machine
from .plan import PlanRow
from .report import checks
from .selector import Decision
from .trainer import patch_model, plan, unpatch_model

__all__ = [
    "AttentionSpec",
    "BackendNotSupportedError",
    "Decision",
    "FlashConfig",
    "FlashConfigError",
    "FlashKernelError",
    "Machine",
    "PlanRow",
    "__version__",
    "checks",
    "patch_model",
    "plan",
    "unpatch_model",
]
