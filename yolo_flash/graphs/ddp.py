"""Gradients of all ranks, averaged in one message after the backward.

DistributedDataParallel has a hook on every parameter, which copies the gradient into a bucket and out again: a thousand
small launches a step, which overlap with an eager backward and wait behind a replayed one (docs/results/ddp-h100.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class RankAverage:
    """Averages gradients in the place of a DDP model's hooks until `close`: on all ranks at the same step, or on none.

    Each rank accumulates its own gradients, from graphs or eager, and `average` replaces them by the mean, as DDP does.
    For two ranks and one batch a step the bits are DDP's; else sums take another order.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        """Stop the own averaging, as its `no_sync` does, of a model with all parameters on one device."""
        self._model = model
        named = model.module.named_parameters()
        self._parameters = [p for name, p in named if name not in model.parameters_to_ignore]
        counts = [p.numel() for p in self._parameters]
        # Frozen parameters too: the message has the same size on every rank, whatever is frozen later.
        self._flat = torch.zeros(sum(counts) + len(counts), dtype=torch.float32, device=self._parameters[0].device)
        *means, self._shares = self._flat.split([*counts, len(counts)])
        # The means have the layouts of the parameters: only then a copy of many tensors is one launch.
        layouts = [torch.empty_like(p, device="meta").stride() for p in self._parameters]
        self._means = [
            mean.as_strided(p.shape, layout) for mean, p, layout in zip(means, self._parameters, layouts, strict=True)
        ]
        self._there: list[bool] = []
        self._mine = self._shares.clone()  # `_there` on the device
        model.require_backward_grad_sync = False

    def average(self) -> None:
        """Give every rank the mean of all ranks' gradients, as accumulated since the last optimizer step.

        A gradient that a rank lacks counts as zero; a parameter without a gradient on all ranks stays without.
        """
        gradients = [p.grad for p in self._parameters]
        there = [gradient is not None for gradient in gradients]
        if there != self._there:  # seldom: the copy makes the host wait for the device
            self._there = there
            self._mine.copy_(torch.tensor(there))
        self._shares.copy_(self._mine)
        own = [gradient for gradient in gradients if gradient is not None]
        means = [mean for mean, mine in zip(self._means, there, strict=True) if mine]
        absent = [mean for mean, mine in zip(self._means, there, strict=True) if not mine]
        if absent:
            torch._foreach_zero_(absent)
        if own:
            torch._foreach_copy_(means, own)
        self._flat *= 1 / dist.get_world_size()
        dist.all_reduce(self._flat)
        if own:
            torch._foreach_copy_(own, means)
        missing = [i for i, p in enumerate(self._parameters) if p.requires_grad and not there[i]]
        if missing:
            shares = self._shares.tolist()
            for p, mean in [(self._parameters[i], self._means[i]) for i in missing if shares[i]]:
                p.grad = mean.to(p.dtype, copy=True)
        self._model.require_forward_param_sync = True  # DDP then sends buffers, if it was told to

    def close(self) -> None:
        """Let the model average by itself again; only right after `average`, or without gradients."""
        self._model.require_backward_grad_sync = True


def everywhere(trainer: Any, mine: bool) -> bool:
    """Whether `mine` is true on all ranks, which call this at the same step."""
    if trainer.world_size <= 1:
        return mine
    votes: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(votes, mine)
    return all(votes)
