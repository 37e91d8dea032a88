"""Swap the class of a living object for a subclass of ours that is pickled as the stock class, and copied as ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

PREFIX = "_flash_"  # of every attribute that the plugin adds to an object; they stay out of pickles


class StockPickle:
    """First base of a class that replaces a stock class on living instances.

    A checkpoint that named a class of ours could not be loaded without the plugin. The pickler writes what `__class__`
    reports, so `__class__` reports the stock class; `type(obj)` remains ours, and with it the forward.
    """

    _stock: ClassVar[type]

    @property
    def __class__(self) -> type:
        return type(self)._stock

    @__class__.setter
    def __class__(self, cls: type) -> None:
        """Take another class, such as one of `torch.nn.utils.parametrize`, and drop our attributes from the object."""
        object.__dict__["__class__"].__set__(self, cls)
        if not issubclass(cls, StockPickle):
            _drop_ours(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce as the stock object would, by its own `__getstate__`, without our attributes."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        if rest and isinstance(rest[0], dict):
            rest[0] = _without_ours(rest[0])
        return make, tuple(type(self)._stock if a is type(self) else a for a in arguments), *rest

    def __copy__(self) -> Any:
        """A shallow copy of our class."""
        return self._twin(lambda state: dict(state) if isinstance(state, dict) else state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of our class: EMA, validator, predictor and exporter all work on copies."""
        return self._twin(lambda state: copy.deepcopy(state, memo), memo)

    def _twin(self, copied: Callable[[Any], Any], memo: dict[int, Any] | None = None) -> Any:
        reduced: Any = super().__reduce_ex__(4)
        make, arguments, state = reduced[:3]
        twin = make(*arguments)
        if memo is not None:
            memo[id(self)] = twin
        twin.__setstate__(copied(state))  # torch.nn.Module has one, and blocks that convert old checkpoints
        return twin


def become(obj: Any, cls: type[StockPickle], **attributes: Any) -> None:
    """Turn an instance of a stock class into `cls`, which derives from it, and give it our attributes (unprefixed)."""
    object.__setattr__(obj, "__class__", cls)
    obj.__dict__.update({PREFIX + name: value for name, value in attributes.items()})


def restore(obj: Any) -> None:
    """Undo `become`: the same class and the same attributes as before."""
    stock = type(obj)._stock
    _drop_ours(obj)
    object.__dict__["__class__"].__set__(obj, stock)


def stock_twin(obj: StockPickle) -> Any:
    """A new stock object with the attributes of an instance, which stays as it is."""
    twin: Any = object.__new__(type(obj)._stock)
    twin.__dict__.update(_without_ours(obj.__dict__))
    return twin


def _drop_ours(obj: Any) -> None:
    kept = _without_ours(obj.__dict__)
    obj.__dict__.clear()
    obj.__dict__.update(kept)


def _without_ours(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not name.startswith(PREFIX)}
