"""Read a checkpoint of which nobody vouches: only names on a list are looked up, and none of them can do harm.

A pickle is a program: it calls what it names. The names are read first, from the opcodes, and a checkpoint that names
anything else than what Ultralytics' models consist of is refused before any of it is unpickled. Then the same bytes are
unpickled, with a stand-in for each name. The stand-in of a class makes an empty object and never calls the constructor:
that of a model would evaluate text in its YAML as Python. `torch.load(weights_only=True)` calls constructors of all
classes that it is told to allow.
"""

from __future__ import annotations

import codecs
import enum
import importlib
import io
import pathlib
import pickle
import pickletools
import re
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import _utils as torch_utils
from torch import nn

_MODULES = re.compile(r"torch\.nn\.modules(\.\w+)?|ultralytics\.nn\.modules(\.\w+)?|ultralytics\.nn\.tasks")
_HELPERS = ("ultralytics.utils.loss", "ultralytics.utils.tal", "torchvision.transforms.transforms")
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_SHOWN = 5  # names in a message


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or converted, with what was found.

    Examples:
        >>> convert("missing.pt")
        Traceback (most recent call last):
        yolo_flash.checkpoints.reading.CheckpointError: missing.pt does not exist or is not a file.
    """


def read_checkpoint(content: bytes, name: str) -> dict[str, Any]:
    """Unpickle a checkpoint, on the CPU.

    Args:
        content: The bytes of a file that `torch.save` wrote.
        name: What messages call the file.

    Returns:
        The checkpoint, its models as they were saved: dtype, mode and attributes included.

    Raises:
        CheckpointError: Not a file of `torch.save`, a damaged one, one that names what is not allowed, or no dict.
    """
    data = _pickle_of(io.BytesIO(content), name)
    try:
        looked_up = globals_in(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    strange = [".".join(pair) for pair in sorted(looked_up) if not _allows(*pair)]
    if strange:
        named = ", ".join(strange[:_SHOWN])
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise CheckpointError(
            f"{name} names {named}{more}, which is no part of Ultralytics' models. Loading it could run foreign code. "
            f"Nothing of it was loaded."
        )
    strict: Any = types.ModuleType("strict_pickle")
    strict.Unpickler = _Unpickler
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", pickle_module=strict, weights_only=False)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except Exception as error:  # a pickle calls its names with whatever it likes
        raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} holds {_a(type(found))} instead of the dict that Ultralytics saves.")
    return found


def names_authors_layout(file: Path) -> bool:
    """Whether a checkpoint has area attention with `qk`, as the authors' fork writes it; a look into the pickle's text.

    Nothing is unpickled. Files that cannot be read are left to those who read them.
    """
    try:
        with file.open("rb") as stream:
            data = _pickle_of(stream, file.name)
    except (OSError, CheckpointError):
        return False
    return b"cultralytics.nn.modules.block\nAAttn\n" in data and b"X\x02\x00\x00\x00qk" in data


def _pickle_of(stream: Any, name: str) -> bytes:
    """The pickle within a file of `torch.save`, by the reader that `torch.load` uses, so that both see the same one."""
    magic = stream.read(4)
    stream.seek(0)
    if magic != b"PK\x03\x04":
        found = "an empty file" if not magic else "a pickle without an archive, or something else"
        raise CheckpointError(
            f"{name} is not the zip archive that torch.save has written since torch 1.6 but {found}. "
            f"torch.save(torch.load(...)) in the program that trusts it writes one."
        )
    try:
        reader = torch._C.PyTorchFileReader(stream)
        records = reader.get_all_records()
        if "constants.pkl" in records:
            raise CheckpointError(f"{name} is a TorchScript export. Name the .pt that it was exported from.")
        return reader.get_record("data.pkl")
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name} is damaged or not a checkpoint: {str(error).splitlines()[0]}") from error


def globals_in(data: bytes) -> set[tuple[str, str]]:
    """The module and name of everything that a pickle looks up, without unpickling it.

    Returns:
        Pairs. A name that is put together while unpickling is ("a name", "that is computed").

    Raises:
        CheckpointError: Not a pickle.
    """
    found: set[tuple[str, str]] = set()
    memo: dict[int, Any] = {}
    pushed: list[Any] = []  # the top of the stack as far as it was only pushed; None for anything but a text
    try:
        for opcode, given, _ in pickletools.genops(data):
            name, argument = opcode.name, cast(Any, given)
            if name in ("GLOBAL", "INST"):
                module, _, attribute = str(argument).partition(" ")
                found.add((module, attribute))
            elif name == "STACK_GLOBAL":
                texts = pushed[-2:]
                known = len(texts) == 2 and all(isinstance(text, str) for text in texts)
                found.add((texts[0], texts[1]) if known else ("a name", "that is computed"))
            elif name.startswith("EXT"):
                found.add(("copyreg extension", str(argument)))
            if name == "MEMOIZE" or name.endswith("PUT"):
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = pushed[-1] if pushed else None
                continue
            if opcode.stack_before:  # something is taken off
                pushed.clear()
            if name.endswith("GET"):
                pushed.append(memo.get(int(argument)))
            elif opcode.stack_after:
                pushed.append(argument if isinstance(argument, str) and "GLOBAL" not in name else None)
    except Exception as error:  # genops raises whatever its readers raise
        raise CheckpointError(f"the pickle is damaged: {error}") from error
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _stand_in(module, name)
        if found is None:
            raise CheckpointError(f"{module}.{name} is no part of Ultralytics' models")
        return found


def _allows(module: str, name: str) -> bool:
    """Whether the unpickler has something for a name; `torch.load` itself makes the types of storages."""
    storage = module in ("torch", "torch.storage") and re.fullmatch(r"\w*Storage", name)
    return bool(storage) or _stand_in(module, name) is not None


def _stand_in(module: str, name: str) -> Any:
    """What a name means within a checkpoint; None if it is not allowed. New each time: a pickle may set attributes."""
    module = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}.get(module, module)
    if function := _FUNCTIONS.get((module, name)):
        return lambda *args: function(*args)
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    if module in ("pathlib", "pathlib._local") and name in _PATHS:
        kind: Any = Path if name in ("PosixPath", "WindowsPath") else getattr(pathlib, name)
        return lambda *parts: kind(*map(str, parts))
    if (module, name) == ("torchvision.transforms.functional", "InterpolationMode"):
        return _Members(importlib.import_module(module).InterpolationMode)
    if (module, name) == ("ultralytics.utils", "IterableSimpleNamespace"):
        return _blank(importlib.import_module(module).IterableSimpleNamespace)
    if not name.isidentifier() or not (module in _HELPERS or _MODULES.fullmatch(module)):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    if not isinstance(found, type) or found.__module__ != module:
        return None
    return _blank(found) if module in _HELPERS or issubclass(found, nn.Module) else None


class _Blank(type):
    """The type of stand-ins for classes; see `_blank`."""

    real: type


def _blank(cls: Any) -> Any:
    """A class whose objects are empty ones of `cls`: no constructor runs, and no argument is taken."""
    return _Blank(cls.__name__, (), {"real": cls, "__new__": lambda _: cls.__new__(cls)})


class _Members:
    """The stand-in for an Enum: its members by value."""

    def __init__(self, real: type[enum.Enum]) -> None:
        self.real = real

    def __call__(self, value: Any) -> enum.Enum:
        return self.real(value)


def _attribute(owner: Any, name: Any) -> Any:
    """`getattr` as checkpoints need it: a head that keeps the forward of `Detect`, and the member of an Enum."""
    if isinstance(owner, _Blank) and issubclass(owner.real, nn.Module) and name == "forward":
        return owner.real.forward
    if isinstance(owner, _Members) and name in owner.real.__members__:
        return owner.real[name]
    if isinstance(owner, nn.Module) and name == "forward_fuse":
        raise CheckpointError(
            f"it holds a fused model ({type(owner).__name__}.{name}): the weights that it was fused from are needed"
        )
    raise CheckpointError(f"it takes the attribute {name!r} of {_a(type(owner))}, which is no part of a checkpoint")


def _number_type(*args: Any) -> Any:
    found = np.dtype(*args)
    if found.kind not in "biuf":
        raise CheckpointError(f"it holds a NumPy value of type {found}: only numbers are read")
    return found


def _scalar(kind: Any, value: Any) -> Any:
    if not isinstance(value, bytes) or _number_type(kind).itemsize != len(value):
        raise CheckpointError("it holds a NumPy number without its bytes")
    return np.frombuffer(value, kind)[0]


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise CheckpointError(f"it encodes a text as {encoding!r}: only latin1 is read")
    return codecs.latin_1_encode(text)[0]


def _a(cls: type) -> str:
    return f"an object of type {cls.__module__}.{cls.__qualname__}"


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "set"): lambda items=(): set(items),
    ("builtins", "frozenset"): lambda items=(): frozenset(items),
    ("builtins", "getattr"): _attribute,
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _number_type,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_parameter"): torch_utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch_utils._rebuild_tensor_v2,
}
