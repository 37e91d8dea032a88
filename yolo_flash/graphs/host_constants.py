"""Tensors that a network makes on the host in every call, as constants on the device.

RT-DETR counts rows and columns by `torch.arange` on the CPU and copies the numbers to the device, in every forward. A
capture forbids such a copy, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_COPYING = (Tensor.type_as, Tensor.to, Tensor.cuda, Tensor.__getitem__)  # what takes tensors of the host to the device


class HostConstants(TorchFunctionMode):
    """Within it, a tensor of the host goes to the device once: later calls get the first call's copy.

    Tensors are told apart by their order. They have to be the same in every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Tensor, Tensor]] = []  # on the host, and on the device
        self._place = 0

    def __enter__(self) -> HostConstants:
        self._place = 0
        super().__enter__()
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch.

        Raises:
            RuntimeError: A tensor of the host is not the one of the first call: a capture would keep the latter.
        """
        kwargs = dict(kwargs or {})
        if func in _COPYING:
            leaves = pytree.tree_leaves((args, kwargs))
            devices = (leaf.device if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            there = next((d for d in devices if isinstance(d, torch.device) and d.type != "cpu"), None)
            if there is not None:
                args, kwargs = pytree.tree_map(lambda leaf: self._on(there, leaf), (args, kwargs))
        return func(*args, **kwargs)

    def _on(self, device: torch.device, leaf: Any) -> Any:
        """The copy of a tensor of the host; anything else as it is."""
        if not isinstance(leaf, Tensor) or leaf.device.type != "cpu":
            return leaf
        if self._place == len(self._kept):
            self._kept.append((leaf.clone(), leaf.to(device)))
        before, copy = self._kept[self._place]
        self._place += 1
        if leaf.dtype != before.dtype or not torch.equal(leaf, before):
            raise RuntimeError("the host makes other tensors in every call of the network")
        return copy
