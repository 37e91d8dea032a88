"""Gradients unscaled and clipped as `GradScaler.unscale_` and `clip_grad_norm_` do: by their operators, or a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .recurring import Recurring, SmallGraph, check_room, same_bits

MAX_NORM = 10.0  # of all gradients together, as Ultralytics clips them
_ALIGNED = 16  # bytes: the kernel of the norm sums in another order elsewhere


def clip(gradients: list[Tensor], order: list[int], count: int, scale: Tensor | None) -> tuple[list[Tensor], Any]:
    """Unscale and clip gradients in place.

    Args:
        gradients: On one device, float32; those that are clipped come first, in the order of the model.
        order: Places of those that are unscaled, in the order of the optimizer: all of them.
        count: How many are clipped.
        scale: Of the loss, on the device; None if it was not scaled.

    Returns:
        The gradients, and 1 in a tensor if one of them is infinite or NaN, else 0; None without a scale.
    """
    found_inf = None
    if scale is not None:
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        ordered = [gradients[i] for i in order]
        torch._amp_foreach_non_finite_check_and_unscale_(ordered, found_inf, scale.double().reciprocal().float())
    clipped = gradients[:count]
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(clipped, 2.0)), 2.0)
    torch._foreach_mul_(clipped, torch.clamp(MAX_NORM / (total + 1e-6), max=1.0))
    return gradients, found_inf


class CapturedClip:
    """`clip` of copies of gradients as a graph, held against the function itself.

    Attributes:
        results: Copies of the gradients of the last call, unscaled and clipped, and whether one overflowed: the next
            call overwrites them.
        pool_bytes: Memory of the graph beside the copies, which other work cannot use.
    """

    def __init__(self, gradients: list[Tensor], order: list[int], count: int, scale: Tensor | None) -> None:
        """Capture, and make a first call.

        Args:
            gradients: As for `clip`; each call brings others of the same shapes and strides.
            order: As for `clip`.
            count: As for `clip`.
            scale: As for `clip`; read by every replay.

        Raises:
            RuntimeError: It cannot be captured, memory is short, or a replay differs in a bit.
        """
        device = gradients[0].device
        check_room(device, 2 * sum(gradient.nbytes for gradient in gradients))
        self._scale = scale  # held, for its memory to stay
        self._copies, copies = ([gradient.clone() for gradient in gradients] for _ in range(2))
        found: list[Any] = []
        self._graph = SmallGraph(
            lambda: clip(self._copies, order, count, scale),
            lambda: found.extend(clip(copies, order, count, scale)),
            device,
        )
        self.results, self.pool_bytes = self._graph.results, self._graph.pool_bytes
        self._graph.replay()
        flags = [] if scale is None else [self.results[1]], [] if scale is None else [found[1]]
        if not same_bits([*self._copies, *flags[0]], [*copies, *flags[1]]):
            raise RuntimeError("a replay differs from torch's own clipping")

    def __call__(self, gradients: list[Tensor], *_: Any) -> tuple[list[Tensor], Any]:
        """Copies of these gradients, unscaled and clipped, see `results`; the gradients stay as they are."""
        torch._foreach_copy_(self._copies, gradients)
        self._graph.replay()
        return self.results


def recurring_clip(why_not: str = "") -> Recurring:
    """`clip` of the gradients of one list of parameters: from a graph once they lie in memory in the same order."""
    return Recurring(clip, _key, CapturedClip, why_not)


def _key(gradients: list[Tensor], order: list[int], count: int, scale: Tensor | None) -> tuple[Any, ...]:
    aligned = all(gradient.data_ptr() % _ALIGNED == 0 for gradient in gradients)
    # Not aligned ones are like no others, not even themselves: they never settle.
    return (None if scale is None else scale.data_ptr(), aligned or object(), *map(Tensor.stride, gradients))
