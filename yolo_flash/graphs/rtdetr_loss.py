"""RT-DETR's loss in shapes that do not depend on the data, with its matching on the device, as CUDA graphs need them.

Ultralytics matches boxes and queries on the host, for each layer of the decoder and the encoder: seven times a step the
host waits for costs, solves a problem for each image, and copies indices back. Here the costs are computed with boxes
padded to a fixed number an image, one kernel solves all problems, and every query gets its box or none. The losses are
calls of the run's own criterion, of all queries: those without a box have a prediction and a target that are equal, and
weigh nothing. Matchings are those of the criterion, and losses up to the order of their sums; `rtdetr.capture_step`
measures the difference on a batch of the run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.models.utils import loss as stock
from ultralytics.models.utils.ops import HungarianMatcher
from ultralytics.utils.loss import FocalLoss, VarifocalLoss

from ..utils.stock_code import foreign
from . import assignment, fixed_loss
from .fixed_loss import Capacity
from .signature import Signature

NO_BOX, PADDING = -1, -2  # in the place of a query's box: a query of the background, and one that does not count

_BYTES_A_CELL = 160  # for each image, box and query: costs of seven layers, and the numbers of the one at work
_SURE = -1e4  # a logit with neither loss nor gradient in the background; float16 holds it
_SIDE = 128.0  # of a box that equals its target: its overlap is 1 in float16 too, without rounding


def not_supported_reason(criterion: Any) -> str:
    """Why a criterion stays outside of the graphs; empty if the graphs can hold it."""
    for value, known in (
        (criterion, stock.RTDETRDetectionLoss),
        (getattr(criterion, "matcher", None), HungarianMatcher),
        (getattr(criterion, "vfl", None), VarifocalLoss),
        (getattr(criterion, "fl", None), FocalLoss),
    ):
        if type(value) is not known:
            return f"{type(value).__name__} is not the loss of RT-DETR"
    if not criterion.aux_loss or criterion.use_uni_match:
        return "its layers are not matched one by one"
    if replaced := foreign(_parts(criterion)):
        return f"{replaced} is not Ultralytics' own"
    return assignment.not_supported_reason()


def needed(batch: dict[str, Any], images: int, side: tuple[int, int], criterion: Any) -> Capacity:
    """The capacity that a batch of the loader needs; computed on the CPU, as `fixed_loss.needed`."""
    counts = torch.bincount(batch["batch_idx"].long().view(-1), minlength=images)
    return Capacity(int(counts.max()))  # how many there are in all does not matter


def needed_bytes(capacity: Capacity, images: int, side: tuple[int, int], criterion: Any) -> int:
    """Bytes of the matching, whose tensors are `[images, boxes, queries]`, for the default number of queries."""
    return images * capacity.boxes * 300 * _BYTES_A_CELL


pad_targets = functools.partial(fixed_loss.pad_targets, no_class=-1)


class MatchedLoss:
    """The loss of a criterion, in fixed shapes."""

    names = ("giou_loss", "cls_loss", "l1_loss")  # as RTDETRDetectionModel.loss has them

    def __init__(self, criterion: Any, denoising: int) -> None:
        """Hold a criterion for which `not_supported_reason` is empty; `denoising` queries come before the others."""
        self.criterion, self.denoising = criterion, denoising
        self._gains = _gains(criterion)
        self._signature = Signature(_parts(criterion))

    def __call__(self, outputs: tuple[Tensor, ...], targets: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
        """The loss.

        Args:
            outputs: Boxes and scores of the decoder `[layers, images, queries, 4 or classes]`, and of the encoder.
            targets: From `pad_targets`, on the device. No image has more boxes than queries.
            reconstructed: The box that a denoising query reconstructs `[images, denoising]`, `NO_BOX` or `PADDING`.

        Returns:
            The loss, a scalar for the backward, and the loss items `[3]`.
        """
        (dn_boxes, boxes), (dn_scores, scores) = (
            output.split([self.denoising, output.shape[2] - self.denoising], dim=2) for output in outputs[:2]
        )
        boxes = torch.cat([outputs[2].unsqueeze(0), boxes])
        scores = torch.cat([outputs[3].unsqueeze(0), scores])
        with torch.no_grad():
            matched = self.match(boxes, scores, targets)
        last = self._of_layers(boxes[-1:], scores[-1:], targets, matched[-1:])
        others = self._of_layers(boxes[:-1], scores[:-1], targets, matched[:-1])
        dn_scores = torch.where((reconstructed == PADDING).unsqueeze(-1), _SURE, dn_scores)
        dn = self._of_layers(dn_boxes, dn_scores, targets, reconstructed.expand(len(dn_boxes), -1, -1))
        return (last + others + dn).sum(), last.detach()

    def match(self, boxes: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
        """The box of each query `[layers, images, queries]`, `NO_BOX` for most."""
        costs = torch.stack([self._costs(*layer, targets) for layer in zip(boxes, scores, strict=True)])
        return assignment.assign(costs, (targets[..., 0] >= 0).sum(1, dtype=torch.int32))

    def holds(self, criterion: Any) -> bool:
        """Whether this is the loss of a criterion, whose numbers and functions have not changed since."""
        return criterion is self.criterion and _gains(criterion) == self._gains and not self._signature.changed()

    def _costs(self, boxes: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
        """What each box and query `[images, boxes, queries]` cost, as HungarianMatcher.forward."""
        matcher = self.criterion.matcher
        labels, wanted = targets[..., 0].long().clamp(min=0), targets[..., 1:].unsqueeze(2)
        scores = scores.detach().float()
        scores = scores.sigmoid() if matcher.use_fl else F.softmax(scores, dim=-1)
        scores = scores.gather(2, labels[:, None].expand(-1, scores.shape[1], -1)).transpose(1, 2)
        boxes = boxes.detach().float().unsqueeze(1)
        if matcher.use_fl:
            against = (1 - matcher.alpha) * (scores**matcher.gamma) * (-(1 - scores + 1e-8).log())
            cost_class = matcher.alpha * ((1 - scores) ** matcher.gamma) * (-(scores + 1e-8).log()) - against
        else:
            cost_class = -scores
        cost_box = (boxes - wanted).abs().sum(-1)
        cost_giou = 1.0 - stock.bbox_iou(boxes, wanted, xywh=True, GIoU=True).squeeze(-1)
        gain = matcher.cost_gain
        costs = gain["class"] * cost_class + gain["bbox"] * cost_box + gain["giou"] * cost_giou
        return costs.masked_fill(costs.isnan() | costs.isinf(), 0.0).float().contiguous()

    def _of_layers(self, boxes: Tensor, scores: Tensor, targets: Tensor, of_query: Tensor) -> Tensor:
        """GIoU, class and box loss `[3]`, summed over layers, as DETRLoss._get_loss; layers count as images."""
        layers, images, queries, _ = boxes.shape
        matched = of_query >= 0
        count = matched[0].sum().clamp(min=1)
        index = of_query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, 5)
        label, wanted = targets.expand(layers, -1, -1, -1).gather(2, index).split([1, 4], dim=-1)
        labels = torch.where(matched, label.squeeze(-1).long(), self.criterion.nc)
        predicted, wanted = (torch.where(matched.unsqueeze(-1), values, _SIDE) for values in (boxes, wanted))
        overlap = stock.bbox_iou(predicted.detach(), wanted, xywh=True).squeeze(-1)
        quality = torch.where(matched, overlap, 0.0)
        # Means of these two functions are over all queries and rows: they become means over the boxes of a layer.
        flat = (values.flatten(0, 1) for values in (scores, labels, quality))
        (of_class,) = self.criterion._get_loss_class(*flat, queries).values()
        of_box = self.criterion._get_loss_bbox(predicted.flatten(0, 2), wanted.flatten(0, 2))
        rows = layers * images * queries
        parts = of_box["loss_giou"] * rows, of_class * queries, of_box["loss_bbox"] * rows
        return torch.stack(parts) / count


def _parts(criterion: Any) -> list[Any]:
    """A criterion and the modules in it, but for its focal loss, which is for batches without boxes."""
    return [criterion, criterion.matcher, criterion.vfl]


def _gains(criterion: Any) -> tuple[Any, ...]:
    return tuple(criterion.loss_gain.items()), tuple(criterion.matcher.cost_gain.items())
