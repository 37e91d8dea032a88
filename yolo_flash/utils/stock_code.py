"""Whether functions are those that the installed torch and Ultralytics define, or a user's, which have to run.

A function is a class's own if its code stands in the file of the class, under the same qualified name, and without a
wrapper other than a decorator in that file. A replacement that merely bears the names of the original, as
`functools.wraps` gives them, comes from another file.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import linecache
import os
import sys
import types
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import ultralytics
from torch import nn

PACKAGES = ("torch", "torchvision", "ultralytics", "yolo_flash")

_TORCH, _ULTRALYTICS = (str(Path(str(package.__file__)).parent) + os.sep for package in (torch, ultralytics))
_WRAPPERS = (_TORCH, _ULTRALYTICS, contextlib.__file__)
_STARTS = ("forward", "__call__", "predict", "loss")  # of a module's code that a step runs
_CACHED = type(functools.lru_cache(len))
_NO_FUNCTIONS = (
    type,
    ModuleType,
    nn.Module,  # a class may hold one, such as the activation of Conv
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodWrapperType,
)


def foreign(objects: Iterable[Any], names: Iterable[str] | None = None) -> str:
    """The first function of some objects that is not its class's own, on an instance, on a class, or called by name.

    Classes of packages other than `PACKAGES` are foreign as a whole, unless `names` are given. Calls by name of
    Ultralytics' functions are followed within Ultralytics (`bbox_iou`) and to torch's functions (`F.softplus`).

    Args:
        objects: With attributes, such as modules, a criterion or a trainer.
        names: Functions to look at; None for all of them and the functions that they call.

    Returns:
        `Class.function`, or `Class` for a class of another package; empty if nothing is foreign.
    """
    objects = list(objects)
    wanted = None if names is None else set(names)
    for obj in objects:
        for name, value in vars(obj).items():
            if (wanted is None or name in wanted) and _shadows(obj, name, value, wanted is not None):
                return f"{type(obj).__name__}.{name}"
    for cls in dict.fromkeys(base for obj in objects for base in type(obj).__mro__ if base is not object):
        if found := foreign_in_class(cls, wanted):
            return found
    if wanted is None:
        for space, name in helpers(objects):
            if not is_own(space[name]):
                return f"{space.get('__name__', 'a module')}.{name}"
    return ""


def helpers(objects: Iterable[Any]) -> list[tuple[dict[str, Any], str]]:
    """The functions that objects call by name, each as the namespace of Ultralytics or torch, and the name in there.

    Calls are followed from the forward of a module, and from all functions of another object, such as a criterion.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    classes = dict.fromkeys(base for obj in objects for base in type(obj).__mro__)
    theirs = [cls for cls in classes if _package(cls.__module__) == "ultralytics"]
    methods: dict[str, list[FunctionType]] = {}
    stack: list[FunctionType] = []
    for cls in theirs:
        for name, function in _functions(cls, vars(cls)):
            if isinstance(function, FunctionType):
                methods.setdefault(name, []).append(function)
                if name in _STARTS or not issubclass(cls, nn.Module):
                    stack.append(function)
    while stack:
        function = inspect.unwrap(stack.pop())
        if id(function) in seen:
            continue
        seen.add(id(function))
        names, chains = _read_by(function.__code__)
        stack += (method for name in names for method in methods.get(name, ()))
        for first, *rest in chains:
            space, name, value = function.__globals__, first, function.__globals__.get(first)
            while rest and isinstance(value, ModuleType) and _package(value.__name__) in PACKAGES:
                space, name = vars(value), rest.pop(0)
                value = space.get(name)
            if _is_function(value):
                found[id(space), name] = space, name
                if isinstance(value, FunctionType) and _package(value.__module__) == "ultralytics":
                    stack.append(value)
    return list(found.values())


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _shadows(obj: Any, name: str, value: Any, is_function: bool) -> bool:
    """Whether an instance attribute takes the place of a function, whose name it may be known to be."""
    if isinstance(value, MethodType):  # a fused Conv has its `forward_fuse` as forward
        function = value.__func__
        return value.__self__ is not obj or not any(
            vars(base).get(function.__name__) is function for base in type(obj).__mro__
        )
    if isinstance(value, FunctionType):
        return _package(value.__module__) not in PACKAGES or not _in_file_of(value, value.__module__)
    return callable(value) and (is_function or not isinstance(getattr(type(obj), name, None), (type(None), type)))


def foreign_in_class(cls: type, wanted: Iterable[str] | None) -> str:
    """The first function of a class that is not its own, bases left out; of `wanted` names, or of all, as `foreign`."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    known = _package(cls.__module__) in PACKAGES
    if wanted is None and not known:
        return cls.__name__
    for name, function in _functions(cls, vars(cls) if wanted is None else wanted):
        # Torch has other names for some of its functions (`nn.Module.__call__`), and dynamo replaces one for good.
        torch_s = _package(cls.__module__) == "torch" and _is_in_torch(function)
        own = known and file is not None and _is_own(function, file, f"{cls.__qualname__}.{name}")
        if not (own or torch_s):
            return f"{cls.__name__}.{name}"
    return ""


def _functions(cls: type, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The functions that a class defines under names, and whatever takes the place of one."""
    for name in names:
        value = vars(cls).get(name)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, cached_property):
            value = value.func
        for function in (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,):
            if _is_function(function):
                yield name, function


def _is_function(value: Any) -> bool:
    """Whether a value is called like a function, as are wrappers and descriptors of a user's; classes do not count."""
    if isinstance(value, FunctionType):
        return True
    return not isinstance(value, _NO_FUNCTIONS) and (callable(value) or hasattr(type(value), "__get__"))


def _is_own(function: Any, file: str | None, qualified_name: str) -> bool:
    """Whether a function stands in a file, by default that of its `__module__`, under a qualified name."""
    inner = function
    while (wrapped := getattr(inner, "__wrapped__", None)) is not None:
        ours = isinstance(inner, FunctionType) and inner.__code__.co_filename.startswith(_WRAPPERS)
        if not ours and type(inner) is not _CACHED:
            return False
        inner = wrapped
    if not isinstance(inner, FunctionType):
        return False
    there = _in_file_of(inner, inner.__module__) if file is None else inner.__code__.co_filename == file
    if not there or inner.__qualname__ != qualified_name:
        return False
    if inner is function:
        return True
    # A wrapper is the class's own if it is a decorator: then the code of the function begins with it.
    first = linecache.getline(inner.__code__.co_filename, inner.__code__.co_firstlineno)
    return first.lstrip().startswith("@")


def is_own(function: Any) -> bool:
    """Whether a function of a module, such as `bbox_iou`, stands in the file of that module, or is torch's."""
    if _is_in_torch(function):
        return True  # torch makes some of its functions by others
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None)
    return _package(module) in (*PACKAGES, *sys.stdlib_module_names) and _is_own(function, None, name)


def _is_in_torch(function: Any) -> bool:
    inner = inspect.unwrap(function)
    if isinstance(inner, FunctionType):
        return inner.__code__.co_filename.startswith(_TORCH)
    return _package(type(inner).__module__) == "torch" and not hasattr(inner, "__wrapped__")


def _in_file_of(function: FunctionType, module: str | None) -> bool:
    return function.__code__.co_filename == getattr(sys.modules.get(module or ""), "__file__", None)


@functools.lru_cache(maxsize=2048)
def _read_by(code: types.CodeType) -> tuple[frozenset[str], tuple[tuple[str, ...], ...]]:
    """All names in some code, and the chains that it reads from its module: `("torch", "nn", "functional", "relu")`."""
    names, chains = set(code.co_names), set()
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(instruction.argval)
            continue
        if chain:
            chains.add(tuple(chain))
        chain = [instruction.argval] if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a comprehension, or a function within
            inner_names, inner_chains = _read_by(constant)
            names |= inner_names
            chains |= set(inner_chains)
    return frozenset(names), tuple(chains)
