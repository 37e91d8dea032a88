"""The updates of Muon from a CUDA graph: some 500 launches a step become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from ultralytics.optim import muon

from ..utils.numerics import arithmetic
from .recurring import Recurring, SmallGraph, check_room, same_bits

_ROOM = 8  # times the bytes of the gradients: their copies, padded matrices, and updates


def muon_update(gradients: list[Tensor], momentums: list[Tensor], beta: float, nesterov: bool) -> list[Tensor]:
    """Ultralytics' own updates for matrices and filters; the momentum buffers change in place."""
    return muon.muon_update(gradients, momentums, beta=beta, nesterov=nesterov)


class CapturedMuon:
    """`muon_update` of one list of tensors as a graph, held against the function itself.

    Attributes:
        results: The updates of the last call, in the memory of the graph: the next call overwrites them.
        pool_bytes: Memory of the graph, which other work cannot use.
    """

    def __init__(self, gradients: list[Tensor], momentums: list[Tensor], beta: float, nesterov: bool) -> None:
        """Capture, and make the first updates: a call follows for each later step.

        Args:
            gradients: On a CUDA device, float32; each call brings others of the same shapes and strides.
            momentums: The optimizer's own buffers, which every replay changes.
            beta: Momentum, a constant of the graph.
            nesterov: Whether updates look ahead.

        Raises:
            RuntimeError: The function cannot be captured, memory is short, or a replay differs in a bit. The buffers
                are unchanged.
        """
        device = gradients[0].device
        check_room(device, _ROOM * sum(gradient.nbytes for gradient in gradients))
        self._gradients = _copies(gradients)
        before, wanted = _copies(momentums), _copies(momentums)
        updates: list[Tensor] = []
        self._graph = SmallGraph(
            lambda: muon_update(self._gradients, momentums, beta, nesterov),
            lambda: updates.extend(muon_update(self._gradients, wanted, beta, nesterov)),
            device,
        )
        self.results, self.pool_bytes = self._graph.results, self._graph.pool_bytes
        self._graph.replay()
        if not same_bits([*self.results, *momentums], [*updates, *wanted]):
            torch._foreach_copy_(momentums, before)
            raise RuntimeError("a replay differs from Ultralytics' own updates")

    def __call__(self, gradients: list[Tensor], *_: Any) -> list[Tensor]:
        """The updates for these gradients, see `results`; the momentum buffers change."""
        torch._foreach_copy_(self._gradients, gradients)
        self._graph.replay()
        return self.results


def recurring_muon(why_not: str = "") -> Recurring:
    """`muon_update` for the tensors of one parameter group: from a graph once its momentum has settled.

    A graph keeps the momentum coefficient, which the warm-up of a training changes in every step, and the memory of
    the buffers.
    """
    return Recurring(muon_update, _key, CapturedMuon, why_not)


def _key(gradients: list[Tensor], momentums: list[Tensor], beta: float, nesterov: bool) -> tuple[Any, ...]:
    return (
        beta,
        nesterov,
        torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        *arithmetic(),
        *map(Tensor.data_ptr, momentums),
        *map(Tensor.stride, momentums),
        *map(Tensor.stride, gradients),
    )


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
