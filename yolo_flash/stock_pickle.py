"""Objects of a class of ours that the rest of the world takes for the stock class: pickled as stock, copied as ours."""

from __future__ import annotations

import copy
import copyreg
from typing import Any, ClassVar

PREFIX = "_flash_"  # of every attribute that the plugin adds to an object; they stay out of pickles


class StockPickle:
    """First base of a class that replaces a stock class on living instances.

    A checkpoint that named a class of ours could not be loaded without the plugin, so `__class__` reports the stock
    class: the pickler writes what it reports. `type(obj)` remains ours, and with it the forward.
    """

    _stock: ClassVar[type]

    @property
    def __class__(self) -> type:
        return type(self)._stock

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As the stock object would, without our attributes."""
        return copyreg.__newobj__, (type(self)._stock,), _without_ours(self.__dict__)  # type: ignore[attr-defined]

    def __copy__(self) -> Any:
        """A shallow copy of our class."""
        return self._restore(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of our class: EMA, validator, predictor and exporter all work on copies."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        return new._restore(copy.deepcopy(self.__dict__, memo), new)

    def _restore(self, state: dict[str, Any], new: Any = None) -> Any:
        new = type(self).__new__(type(self)) if new is None else new
        new.__setstate__(state)  # of torch.nn.Module, and of the blocks that mend old checkpoints
        return new


def become(obj: Any, cls: type[StockPickle], **attributes: Any) -> None:
    """Turn an instance of a stock class into `cls`, which derives from it, and give it our attributes (unprefixed)."""
    object.__setattr__(obj, "__class__", cls)
    obj.__dict__.update({PREFIX + name: value for name, value in attributes.items()})


def restore(obj: Any) -> None:
    """Undo `become`: the same class and the same attributes as before."""
    stock = type(obj)._stock
    kept = _without_ours(obj.__dict__)
    obj.__dict__.clear()
    obj.__dict__.update(kept)
    object.__dict__["__class__"].__set__(obj, stock)


def _without_ours(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not name.startswith(PREFIX)}
