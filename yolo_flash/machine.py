"""What one device and this installation can do, as plain data: a T4 or a B200 is a literal in a test."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["cuda", "rocm", "mps", "cpu", "other"]
Release = tuple[int, ...]

PACKAGES = {  # backend -> the package in pip that it runs on, where a user has installed it
    "flash_attn_2": "flash-attn",
    "flash_attn_3": "flash-attn-3",
    "flash_attn_4": "flash-attn-4",
    "xformers": "xformers",
}

_ARCHITECTURES = (  # the highest entry not above the device's compute capability names it
    ((12, 0), "Blackwell"),
    ((10, 0), "Blackwell"),
    ((9, 0), "Hopper"),
    ((8, 9), "Ada"),
    ((8, 0), "Ampere"),
    ((7, 5), "Turing"),
    ((7, 0), "Volta"),
    ((6, 0), "Pascal"),
    ((5, 0), "Maxwell"),
)


@dataclass(frozen=True)
class Machine:
    """One device with the software that drives it.

    Attributes:
        kind: `cuda` is NVIDIA; AMD's cards call themselves cuda in torch and are `rocm` here.
        name: The device's own name, such as `Tesla T4`.
        capability: Compute capability (major, minor) of an NVIDIA card, else None.
        gcn: AMD's architecture name, such as `gfx942`, else None.
        memory_gib: Memory of the device in GiB, None where torch does not tell.
        torch: Version of torch.
        toolkit: Version of CUDA or ROCm that torch was built with, None for a CPU build.
        driver: Version of NVIDIA's driver, None without or where the system does not tell.
        cudnn: Version of cuDNN as torch's integer (9.15.1 is 91501), None without.
        flash_built: Whether this build of torch contains the CUDA flash kernels.
        packages: Package -> version, or why it cannot be imported. Those of `PACKAGES` are there where they are
            installed, and not imported.
        flash_impl: What runs in place of torch's flash kernels in this process, `FA3` or `FA4`, since somebody called
            `torch.nn.attention.activate_flash_attention_impl`; else None.
        system: Python and operating system.

    Examples:
        >>> print(Machine("cuda", "Tesla T4", capability=(7, 5)))
        Tesla T4 (Turing, compute capability 7.5)
    """

    kind: Kind
    name: str
    capability: tuple[int, int] | None = None
    gcn: str | None = None
    memory_gib: float | None = None
    torch: str = torch.__version__
    toolkit: str | None = None
    driver: str | None = None
    cudnn: int | None = None
    flash_built: bool = True
    packages: Mapping[str, str] = field(default_factory=dict)
    flash_impl: str | None = None
    system: str = ""

    @property
    def architecture(self) -> str:
        """The name people know: `Turing`, `Hopper`, `gfx942`, `CPU`."""
        if self.capability is None:
            return self.gcn or self.kind.upper()
        return next((name for low, name in _ARCHITECTURES if self.capability >= low), "older than Maxwell")

    @property
    def release(self) -> Release:
        """Version of torch as numbers, (2, 5, 1)."""
        return release(self.torch)

    @property
    def runs_flash(self) -> str:
        """What `sdpa_flash` runs in place of torch's kernels, as a clause; empty where it runs these."""
        if not self.flash_impl:
            return ""
        return f"runs {self.flash_impl}: torch.nn.attention.activate_flash_attention_impl was called in this process"

    @property
    def with_versions(self) -> str:
        """The device and what its numbers depend on, for the head of a table."""
        cudnn = f", cuDNN {cudnn_release(self.cudnn)}" if self.cudnn else ""
        return f"{self}, torch {self.torch}{cudnn}{f', flash {self.flash_impl}' if self.flash_impl else ''}"

    def __str__(self) -> str:
        """`Tesla T4 (Turing, compute capability 7.5)`."""
        if self.capability is not None:
            return f"{self.name} ({self.architecture}, compute capability {dotted(self.capability)})"
        return f"{self.name} ({self.architecture})"


def release(version: str) -> Release:
    """The numbers that a version begins with: `3.5.0-windows` -> (3, 5, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number)  # type: ignore[index]


def dotted(numbers: Release) -> str:
    """(9, 0) -> `9.0`."""
    return ".".join(map(str, numbers))


def cudnn_release(version: int) -> str:
    """The integer that torch has for cuDNN as people write it: 91501 -> `9.15.1`, 8907 -> `8.9.7`."""
    major, rest = divmod(version, 10000 if version >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def flash_impl() -> str | None:
    """What runs in place of torch's flash kernels at this moment, see `Machine.flash_impl`."""
    attention = sys.modules.get("torch.nn.attention")  # torch < 2.11 has no such function
    return getattr(attention, "current_flash_attention_impl", lambda: None)()


def detect(device: torch.device) -> Machine:
    """Read the Machine of a device. Initialises CUDA when the device is one, and only then.

    Args:
        device: Any torch device; a `meta` tensor's device counts as a device of kind `other`.
    """
    return _read(device, flash_impl() if device.type == "cuda" else None)


@functools.lru_cache
def _read(device: torch.device, impl: str | None) -> Machine:
    common: dict[str, Any] = {
        "torch": str(torch.__version__),
        "packages": {"triton": _import_result("triton")},
        "system": f"Python {platform.python_version()}, {platform.platform(terse=True)}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rocm = torch.version.hip is not None
        common["packages"] |= {} if rocm else _installed()
        return Machine(
            kind="rocm" if rocm else "cuda",
            name=properties.name,
            capability=None if rocm else (properties.major, properties.minor),
            gcn=properties.gcnArchName.split(":")[0] if rocm else None,
            memory_gib=properties.total_memory / 2**30,
            toolkit=torch.version.hip if rocm else torch.version.cuda,
            driver=None if rocm else _driver(),
            cudnn=None if rocm else torch.backends.cudnn.version(),
            flash_built=torch.backends.cuda.is_flash_attention_available(),
            flash_impl=impl,
            **common,
        )
    if device.type == "cpu":
        from ultralytics.utils.torch_utils import get_cpu_info

        return Machine(kind="cpu", name=get_cpu_info(), **common)
    if device.type == "mps":
        return Machine(kind="mps", name="Apple GPU", **common)
    return Machine(kind="other", name=str(device), **common)


def resolve_device(device: str | int | None) -> torch.device:
    """The torch device that Ultralytics takes for `device=`: the GPU if there is one and none is named.

    Raises:
        ValueError: The device does not exist.
    """
    from ultralytics.utils import LOGGER
    from ultralytics.utils.torch_utils import select_device

    threads, disabled = torch.get_num_threads(), LOGGER.disabled
    LOGGER.disabled = True  # select_device logs before it raises
    try:
        return torch.device(select_device("" if device is None else device, verbose=False))
    except ValueError as error:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cards = f"torch sees {found} GPU{'' if found == 1 else 's'} here"
        valid = ", ".join(["device=cpu", *(f"device={i}" for i in range(found))])
        raise ValueError(f"there is no device={device}: {cards}. Valid: {valid}.") from error
    finally:
        LOGGER.disabled = disabled
        torch.set_num_threads(threads)  # select_device changes it for the CPU


def _driver() -> str | None:
    """NVIDIA's driver version from Linux' own file, else the newest CUDA that the driver supports, if torch tells."""
    with contextlib.suppress(OSError, TypeError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return re.search(r"Module .*?(\d+\.[\d.]+)", text)[1]  # type: ignore[index]
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(newest()) if newest else None


def _installed() -> dict[str, str]:
    """The versions of what is installed of `PACKAGES`, without importing it: that takes seconds."""
    found = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(package)
    return found


def _import_result(name: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except Exception as error:  # a broken installation raises anything, and its text is what the user needs
        return f"{type(error).__name__}: {error}"
