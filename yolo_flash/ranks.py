"""Gradients of all ranks, averaged in one message behind the backward.

DistributedDataParallel follows every parameter with a hook, copies its gradient into a bucket and out again: a thousand
small launches a step, which overlap with an eager backward and wait behind a replayed one (docs/results/ddp-h100.md).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class RankAverage:
    """Takes over from the hooks of a DDP model until `close`: on all ranks at the same step, or on none.

    Backwards add up what each rank has found by itself, from graphs or eager, and `average` makes it the mean: the sum
    that DDP divides, with other rounding only where several batches make one step.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        """Stop the model's own averaging, as its `no_sync` does.

        Args:
            model: Whose trained parameters lie on one device.
        """
        self._model = model
        self._all = list(model.module.parameters())
        self._lay_out()
        model.require_backward_grad_sync = False

    def _lay_out(self) -> None:
        self._parameters = [p for p in self._all if p.requires_grad]
        counts = [p.numel() for p in self._parameters]
        self._flat = torch.zeros(sum(counts) + len(counts), dtype=torch.float32, device=self._all[0].device)
        *gradients, self._found = self._flat.split([*counts, len(counts)])
        # In the layout of the parameters, where a copy of many tensors is one launch.
        layouts = [torch.empty_like(p, device="meta").stride() for p in self._parameters]
        self._gradients = [
            gradient.as_strided(p.shape, layout)
            for gradient, p, layout in zip(gradients, self._parameters, layouts, strict=True)
        ]

    def average(self) -> None:
        """Give every rank the mean of the gradients of all, which are there since the last optimizer step.

        A parameter that some rank has no gradient for counts as zero there; one that no rank has, stays without.
        """
        if [*map(id, self._parameters)] != [id(p) for p in self._all if p.requires_grad]:
            self._lay_out()  # a layer was frozen or woken, on every rank
        pairs = list(zip(self._parameters, self._gradients, strict=True))
        there = [(p.grad, mine) for p, mine in pairs if p.grad is not None]
        own, mine = [gradient for gradient, _ in there], [gradient for _, gradient in there]
        complete = len(there) == len(pairs)
        if complete:
            self._found.fill_(1.0)
        else:
            self._flat.zero_()
            self._found.copy_(torch.tensor([float(p.grad is not None) for p in self._parameters]))
        if there:
            torch._foreach_copy_(mine, own)
        self._flat /= dist.get_world_size()
        dist.all_reduce(self._flat)
        if there:
            torch._foreach_copy_(own, mine)
        if not complete:
            for (p, gradient), share in zip(pairs, self._found.tolist(), strict=True):
                if p.grad is None and share:
                    p.grad = gradient.to(p.dtype, copy=True)
        self._model.require_forward_param_sync = True  # of buffers, where the model was told to send them

    def close(self) -> None:
        """Let the model average by itself again."""
        self._model.require_backward_grad_sync = True
