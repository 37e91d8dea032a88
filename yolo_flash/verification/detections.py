"""Whether two models find the same objects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.utils.nms import non_max_suppression

from .compare import Outputs, head_of

CONF, IOU = 0.25, 0.7  # Ultralytics' defaults for prediction


@dataclass(frozen=True)
class Detections:
    """What a detector finds with a score above 0.25, after non-maximum suppression or its end-to-end head's choice.

    Attributes:
        stock: Detections of the stock model.
        ours: Detections of the patched model.
        matched: Those that both have: the same class at the same anchor.
        score: Largest difference of the score of any detection of either model.
        box: Largest difference of a coordinate of any detection, in pixels.
        allowed_score: What `score` may be.
        allowed_box: What `box` may be.
    """

    stock: int
    ours: int
    matched: int
    score: float
    box: float
    allowed_score: float
    allowed_box: float

    @property
    def ok(self) -> bool:
        """Whether all differences are those of rounding; a NaN is not."""
        return self.score <= self.allowed_score and self.box <= self.allowed_box


def compare_detections(
    model: nn.Module, truth: Outputs, stock: Outputs, ours: Outputs, imgsz: int, dtype: torch.dtype
) -> Detections | None:
    """Compare the detections of two models, by anchor: results of `run_model` in prediction, as in `compare`.

    Rounding can carry a score over the threshold, or an overlap, so that one model keeps a detection that the other has
    as a candidate only: counts may differ. Candidates may differ by three times the largest error of stock, plus
    rounding: that far apart are two models of which one lies twice as far from the truth.

    Returns:
        None where the model, either of them, is no detector of upright boxes: its raw outputs have to do.
    """
    head = head_of(model)
    if type(head) not in (Detect, v10Detect):
        return None
    decoded = [results["outputs.0"].double() for results in (truth, stock, ours)]
    # Boxes and scores of all anchors: `[batch, 4 + classes, anchors]`.
    wanted, first, found = (out.mT if head.end2end else out for out in decoded)
    theirs, mine = _kept(head, first), _kept(head, found)
    score = box = 0.0
    for image, anchor, label in theirs | mine:
        difference = (found[image, :, anchor] - first[image, :, anchor]).abs()
        score, box = _larger(score, difference[4 + label]), _larger(box, difference[:4].max())
    off, rounding = (first - wanted).abs(), torch.finfo(dtype).eps
    return Detections(
        *(len(theirs), len(mine), len(theirs & mine), score, box),
        allowed_score=3 * float(off[:, 4:].max()) + rounding,
        allowed_box=3 * float(off[:, :4].max()) + rounding * imgsz,
    )


def _kept(head: Any, candidates: Tensor) -> set[tuple[int, int, int]]:
    """(image, anchor, class) of the detections."""
    if head.end2end:
        scores, labels, anchors = head.get_topk_index(candidates[:, 4:].mT, head.max_det)
        rows = [(labels[i, scores[i, :, 0] > CONF, 0], anchors[i, scores[i, :, 0] > CONF]) for i in range(len(scores))]
    else:
        found, kept = non_max_suppression(candidates.float(), CONF, IOU, return_idxs=True)
        rows = [(boxes[:, 5], anchors.flatten()) for boxes, anchors in zip(found, kept, strict=True)]
    return {
        (image, int(anchor), int(label))
        for image, (labels, anchors) in enumerate(rows)
        for label, anchor in zip(labels, anchors, strict=True)
    }


def _larger(value: float, other: Tensor) -> float:
    """The larger of two; a NaN stays."""
    return value if value >= float(other) else math.nan if math.isnan(value) else float(other)
