"""Inputs on which a backend is held against attention in high precision: random ones, and hard ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from ..utils.numerics import Results, relative_error
from .arms import Arm

_PARTS = ("output", "gradient of q", "gradient of k", "gradient of v")
_HIGH = 120.0  # a score of the hard inputs: its exponential overflows float32, that of its negative is zero there
_HARD_SCORES = {"cpu": 2**22, "cuda": 2**24}  # as many images of hard inputs as make this, one at least
_HARD_LARGEST = {"cpu": 2**24, "cuda": 2**27}  # scores of one image: beyond, a trial would take seconds more


def _far_below(q: Tensor, k: Tensor) -> None:
    """All scores lower by 120: the softmax, and so the result, is that of the other channels."""
    q[..., 0] = (_HIGH * q.shape[-1] ** 0.5) ** 0.5
    k[..., 0] = -q[..., 0]


def _far_above(q: Tensor, k: Tensor) -> None:
    q[..., 0] = k[..., 0] = (_HIGH * q.shape[-1] ** 0.5) ** 0.5


def _one_key(q: Tensor, k: Tensor) -> None:
    """One key, in the middle, has scores of about 120, and all the weight."""
    q.abs_()
    k[k.shape[0] // 2] = _HIGH / 0.8 / q.shape[-1] ** 0.5  # 0.8 is the mean of a random |q|


_HARD: dict[str, Callable[[Tensor, Tensor], None]] = {
    "scores far below 0": _far_below,
    "one dominating key": _one_key,
    "scores far above 0": _far_above,
}
"""Kind of hard inputs -> changes one group of random ones in place: queries and keys `[tokens, heads, head_dim]`."""


@dataclass(frozen=True)
class Probe:
    """Inputs of an arm, and how far results are off for them."""

    groups: int
    given: Tensor
    upstream: Tensor  # gradient of the output
    errors: Callable[[Results], dict[str, float]]  # of each part of the results; ArithmeticError for another shape
    rounding: float  # error that a backend may have besides twice that of stock and the rounding of the dtype
    usual: float  # takes the place of stock's error where stock cannot run


def random_probe(arm: Arm, groups: int) -> Probe:
    """Random inputs; output and gradients of q, k and v each have an error of their own."""
    given, upstream = arm.inputs(groups)
    truth = _exact(arm, given, upstream)

    def errors(results: Results) -> dict[str, float]:
        found = [relative_error(*pair) for pair in zip(_split(arm, results, truth), truth, strict=False)]
        if arm.spec.seq_len_k == 1:  # the gradients of q and k are zero but for rounding
            found[1:3] = [error if math.isnan(error) else 0.0 for error in found[1:3]]
        return dict(zip(_PARTS, found, strict=False))

    # What is usual in this dtype, whose sums are in float32 at the least.
    usual = max(torch.finfo(arm.spec.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    # Stock may round a few small sums right by luck: on an H200, masked, memory-efficient attention was 7e-7 off in
    # float32, where twice stock's error was 5e-7.
    return Probe(groups, given, upstream, errors, rounding=2 * torch.finfo(torch.float32).eps, usual=usual)


def hard_probe(arm: Arm) -> Probe | None:
    """Scores far below 0, one dominating key, scores far above 0: a group of each, on the first image at least.

    cuDNN's backward gave NaN for scores far below 0 (cudnn-frontend issue 1072). The gradients of q, k and v have one
    error together: those of q and k are zero but for rounding where one key has all the weight. A score of 120 is off
    by 1e-5 in float32, and a fused backward, which takes exponentials again, meets this error four times: in the score,
    in the logarithm of the sum, in the difference of the two, and in the product with a key as large.

    Returns:
        None where one image is so large that this would take seconds: small images have shown the same kernel. None
        below 16 tokens too, where stock may round few large scores right by luck, and is no yardstick.
    """
    spec, place = arm.spec, arm.device.type
    scores = spec.area * spec.scores // spec.batch
    if spec.seq_len_k < 16 or scores > _HARD_LARGEST.get(place, 0):
        return None
    groups = spec.area * max(1, min(_HARD_SCORES[place] // scores, -(-len(_HARD) // spec.area)))
    given, upstream = arm.inputs(groups)
    for change, (q, k) in zip(cycle(_HARD.values()), arm.queries_and_keys(given), strict=False):
        change(q, k)
    truth = _exact(arm, given, upstream)

    def errors(results: Results) -> dict[str, float]:
        found = _split(arm, results, truth)
        by_kind = {}
        for start, kind in enumerate(list(_HARD)[:groups]):
            out, *grads = (tuple(t[start :: len(_HARD)] for t in pair) for pair in zip(found, truth, strict=False))
            by_kind[f"output for {kind}"] = relative_error(*out)
            if grads:
                joint = (torch.cat([t.flatten(1).double() for t in side], dim=1) for side in zip(*grads, strict=True))
                by_kind[f"gradient for {kind}"] = relative_error(*joint)
        return by_kind

    rounding = 4 * _HIGH * torch.finfo(torch.float32).eps
    return Probe(groups, given, upstream, errors, rounding, usual=_HIGH * torch.finfo(spec.dtype).eps)


def _exact(arm: Arm, given: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and the gradients of q, k and v, in float64; in float32 where a CPU would take half a minute."""
    large = arm.device.type == "cpu" and arm.spec.scores // arm.spec.batch > 2**27
    return arm.exact(given, upstream, torch.float32 if large else torch.float64)


def _split(arm: Arm, results: Results, truth: list[Tensor]) -> list[Tensor]:
    """Output and, in training, the gradients of q, k and v, in the shape of `_exact`; ArithmeticError for another."""
    found = arm.split(results)
    if any(a.shape != b.shape for a, b in zip(found, truth, strict=False)):
        raise ArithmeticError("a result has another shape than the reference")
    return found
