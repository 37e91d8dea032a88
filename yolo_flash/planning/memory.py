"""The memory that attention will keep from the forward to the backward of a training step, by counting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..backends.registry import BACKENDS
from ..backends.spec import AttentionSpec
from .plan import PlanRow


@dataclass(frozen=True)
class Forecast:
    """Bytes that attention keeps from the forward to the backward of a training step: its peak."""

    stock: int
    planned: int


def attention_memory(rows: Iterable[PlanRow]) -> Forecast:
    """Count what the attention of one training step keeps, in stock form and as planned.

    The difference of the two is within 3 % of that of measured steps (docs/results/steps-h100.md); a test allows 10 %.
    """
    decisions = [row.decision for row in rows if row.mode == "train"]
    return Forecast(
        stock=sum(kept_bytes(decision.spec, "stock") for decision in decisions),
        planned=sum(kept_bytes(decision.spec, decision.backend) for decision in decisions),
    )


def kept_bytes(spec: AttentionSpec, backend: str) -> int:
    """Bytes that one layer keeps for its backward, its queries, keys and values included.

    Unfused attention keeps its score matrices; a fused kernel keeps its output, and a float32 for each query and head.
    An approximate one also keeps the queries, keys and values that it has sorted by their place in the image.
    """
    tokens = spec.batch * spec.num_heads * spec.seq_len_q
    packed = tokens * (2 * spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
    if not BACKENDS[backend].fused:
        return packed + score_bytes([spec])
    packed *= 1 if BACKENDS[backend].exact else 2
    return packed + tokens * (spec.head_dim_v * spec.dtype.itemsize + 4)


def score_bytes(specs: Iterable[AttentionSpec]) -> int:
    """Bytes of score matrices that stock blocks, one a spec, keep for the backward of one step.

    A score takes 4 bytes in float32, and 6 under autocast: the softmax runs in float32, the product on a half copy.
    """
    return sum(spec.scores * (4 if spec.dtype is torch.float32 else 6) for spec in specs)
