"""Whether functions are the ones that the installed torch and Ultralytics define: a user's replacement has to run.

A function is a class's own when its code stands in the file of that class, under the qualified name that it has there,
without a wrapper but a decorator that stands there too. What merely bears the names of the original, as
`functools.wraps` gives them, comes from another file.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import ultralytics

PACKAGES = ("torch", "torchvision", "ultralytics", "yolo_flash")

_TORCH, _ULTRALYTICS = (str(Path(str(package.__file__)).parent) + os.sep for package in (torch, ultralytics))


def foreign(objects: Iterable[Any], names: Iterable[str] | None = None) -> str:
    """The first function of some objects that is not its class's own, on an instance, on a class, or called by name.

    Classes of packages other than `PACKAGES` are foreign as a whole, unless `names` are given. What the functions of
    Ultralytics call by its name is followed within Ultralytics (`bbox_iou`) and to torch's functions (`F.softplus`).

    Args:
        objects: With attributes, such as modules, a criterion or a trainer.
        names: Functions to look at; all of them, and what they call, if None.

    Returns:
        `Class.function`, or `Class` for a class of somebody else; empty if all is torch's, Ultralytics' or ours.
    """
    objects = list(objects)
    wanted = None if names is None else set(names)
    for obj in objects:
        for name, value in vars(obj).items():
            if (wanted is None or name in wanted) and _shadows(obj, name, value, wanted is not None):
                return f"{type(obj).__name__}.{name}"
    for cls in dict.fromkeys(base for obj in objects for base in type(obj).__mro__ if base is not object):
        if found := _foreign_in_class(cls, wanted):
            return found
    if wanted is None:
        for space, name in helpers(objects):
            if not _is_own_helper(space[name]):
                return f"{space.get('__name__', 'a module')}.{name}"
    return ""


def helpers(objects: Iterable[Any]) -> list[tuple[dict[str, Any], str]]:
    """Where the functions of objects find what they call by name: namespaces of Ultralytics and torch, and the names.

    Args:
        objects: Whose classes are looked through, and the functions that their functions call, and so on.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    classes = dict.fromkeys(base for obj in objects for base in type(obj).__mro__)
    theirs = [cls for cls in classes if _package(cls.__module__) == "ultralytics"]
    stack = [f for cls in theirs for _, f in _functions(cls, vars(cls)) if isinstance(f, FunctionType)]
    while stack:
        function = stack.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        used = list(_names(function.__code__))
        for name in used:
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType):
                found[id(function.__globals__), name] = function.__globals__, name
                if _package(value.__module__) == "ultralytics":
                    stack.append(value)
            elif isinstance(value, ModuleType) and _package(value.__name__) in PACKAGES:
                space = vars(value)
                for attribute in used:
                    if isinstance(space.get(attribute), FunctionType):
                        found[id(space), attribute] = space, attribute
    return list(found.values())


def is_own_class(cls: type) -> bool:
    """Whether a class comes from `PACKAGES` by its name; `foreign` looks at what it is made of."""
    return _package(cls.__module__) in PACKAGES


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _shadows(obj: Any, name: str, value: Any, is_function: bool = False) -> bool:
    """Whether an instance attribute takes the place of a function, or is one of somebody else.

    Args:
        obj: The instance.
        name: Of the attribute.
        value: Of the attribute.
        is_function: Whether the name is known to be that of a function.
    """
    if isinstance(value, MethodType):  # a fused Conv has its `forward_fuse` as forward
        function = value.__func__
        return value.__self__ is not obj or not any(
            vars(base).get(function.__name__) is function for base in type(obj).__mro__
        )
    if isinstance(value, FunctionType):
        return _package(value.__module__) not in PACKAGES or not _in_file_of(value, value.__module__)
    return callable(value) and (is_function or not isinstance(getattr(type(obj), name, None), (type(None), type)))


def _foreign_in_class(cls: type, wanted: set[str] | None) -> str:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    known = is_own_class(cls)
    if wanted is None and not known:
        return cls.__name__
    for name, function in _functions(cls, vars(cls) if wanted is None else wanted):
        if isinstance(function, partial):
            return f"{cls.__name__}.{name}"
        if not known or file is None or not _is_own(function, file, f"{cls.__qualname__}.{name}"):
            alias = known and _package(cls.__module__) == "torch" and _in_file_of(function, cls.__module__)
            if not alias:  # torch.nn.Module has two: `forward` and `__call__`
                return f"{cls.__name__}.{name}"
    return ""


def _functions(cls: type, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        value = vars(cls).get(name)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        for function in (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,):
            if isinstance(function, (FunctionType, partial)):
                yield name, function


def _is_own(function: FunctionType, file: str | None, qualified_name: str) -> bool:
    """Whether a function stands in a file under a name; None: the file of the module that it says it is from."""
    inner: Any = function
    while (wrapped := getattr(inner, "__wrapped__", None)) is not None:
        if not inner.__code__.co_filename.startswith((_TORCH, _ULTRALYTICS)):
            return False
        inner = wrapped
    if not isinstance(inner, FunctionType):
        return False
    there = _in_file_of(inner, inner.__module__) if file is None else inner.__code__.co_filename == file
    if not there or inner.__qualname__ != qualified_name:
        return False
    if inner is function:
        return True
    # A wrapper is the class's own where it is a decorator, with which the code of the function then begins.
    first = linecache.getline(inner.__code__.co_filename, inner.__code__.co_firstlineno)
    return first.lstrip().startswith("@")


def _is_own_helper(function: FunctionType) -> bool:
    if function.__code__.co_filename.startswith(_TORCH):
        return True  # torch makes some of its functions by others
    known = (*PACKAGES, *sys.stdlib_module_names)
    return _package(function.__module__) in known and _is_own(function, None, function.__qualname__)


def _in_file_of(function: FunctionType, module: str | None) -> bool:
    return function.__code__.co_filename == getattr(sys.modules.get(module or ""), "__file__", None)


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):  # a comprehension, or a function within
            yield from _names(constant)
