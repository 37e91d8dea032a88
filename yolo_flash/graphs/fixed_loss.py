"""Ultralytics' losses of detection and segmentation in shapes that do not depend on the data, as CUDA graphs need them.

Decoding, overlaps, top candidates, targets and the three losses are calls of the run's own criterion. Replaced are the
places that make the host wait for the GPU: boxes come padded to a fixed number an image, pairs of boxes and anchors and
the foreground are compacted to a fixed number, and constants are made once. Padding is assigned nothing and weighs
nothing: assignments are the same to the bit, and losses up to the order of their sums; `capture.loss_error` measures
the difference on a batch of the run. What segmentation adds is in `fixed_segmentation.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.utils.loss import BboxLoss, E2ELoss, v8DetectionLoss, v8SegmentationLoss
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh
from ultralytics.utils.tal import TaskAlignedAssigner, make_anchors

from ..utils.stock_code import foreign
from .fixed_segmentation import (
    MASK_ASSIGNER,
    SEGMENT_LOSS_26,
    Assigned,
    Masks,
    mask_bytes,
    mask_loss,
    mask_overlaps,
    semantic_loss,
)
from .signature import Signature

_ASSIGNERS = {  # of the criteria that graphs can hold
    v8DetectionLoss: TaskAlignedAssigner,
    v8SegmentationLoss: TaskAlignedAssigner,
    SEGMENT_LOSS_26: MASK_ASSIGNER,
}
_NO_PARTS = (Tensor, dict, type, FunctionType, MethodType)
_EPS = 1e-9  # of TaskAlignedAssigner.select_candidates_in_gts
_ROOM = 1.5  # capacity for what a batch needs, as a multiple: later batches may need more
_BYTES_A_CELL = 32  # for each image, box and anchor, at the peak of the assignment; measured: 27 on an H200


class Capacity(NamedTuple):
    """The most that a batch may have.

    Attributes:
        boxes: Boxes of one image.
        total: Boxes of all images.
        pairs: Pairs of a box and an anchor whose centre lies in it.
        ranked: Boxes of the image with most of them, with second most, and so on; empty where masks are not trained.
    """

    boxes: int = 0
    total: int = 0
    pairs: int = 0
    ranked: tuple[int, ...] = ()

    def holds(self, other: Capacity) -> bool:
        """Whether a batch that needs `other` fits."""
        ranks = zip_longest(self.ranked, other.ranked, fillvalue=0)
        return all(mine >= others for mine, others in (*zip(self[:3], other[:3], strict=True), *ranks))

    def grown(self, other: Capacity) -> Capacity:
        """A capacity that holds both, with room for more than `other`."""
        boxes, total, pairs = (_room(*both) for both in zip(self[:3], other[:3], (8, 64, 4096), strict=True))
        ranks = zip_longest(self.ranked, other.ranked, fillvalue=0)
        return Capacity(boxes, total, pairs, tuple(_room(*both, 4) for both in ranks))


def _room(mine: int, others: int, step: int) -> int:
    return max(mine, math.ceil(others * _ROOM / step) * step, step)


def not_supported_reason(criterion: Any) -> str:
    """Why a criterion stays outside of the graphs; empty if the graphs can hold it."""
    parts = _parts(criterion)
    for part in parts:
        for value, known in (
            (part, type(part) if type(part) in _ASSIGNERS else v8DetectionLoss),
            (getattr(part, "assigner", None), _ASSIGNERS.get(type(part))),
            (getattr(part, "bbox_loss", None), BboxLoss),
        ):
            if type(value) is not known:
                return f"{type(value).__name__} is not the loss of detection or segmentation"
    if not hasattr(TaskAlignedAssigner, "pair_overlaps"):
        return "it needs ultralytics >= 8.4.180"
    if not _one_hyp(criterion):
        return "its parts have gains of their own"
    if any(_trains_masks(part) and not part.overlap for part in parts):
        return "overlap_mask=False has a mask for each box, of which every batch has another number"
    if replaced := foreign(_objects(criterion)):
        return f"{replaced} is not Ultralytics' own"
    return ""


def needed_bytes(capacity: Capacity, images: int, side: tuple[int, int], criterion: Any) -> int:
    """Bytes that graphs take for the boxes of a batch; the side is height and width of the images in pixels.

    The tensors of the assignment of boxes to anchors are `[images, boxes, anchors]`, those of masks `[rows, pixels]`.
    """
    parts = _parts(criterion)
    anchors = sum(math.prod(math.ceil(pixels / stride) for pixels in side) for stride in parts[0].assigner.stride)
    masks = 0
    if capacity.ranked:
        pixels = math.prod(length // parts[0].hyp.mask_ratio for length in side)
        masks = sum(mask_bytes(part.assigner, capacity.ranked, pixels) for part in parts)
    return images * capacity.boxes * anchors * _BYTES_A_CELL + masks


def needed(batch: dict[str, Any], images: int, side: tuple[int, int], criterion: Any) -> Capacity:
    """The capacity that a batch of the loader needs at most; computed on the CPU, before the batch goes to the device.

    The side is height and width of the images in pixels.
    """
    index, boxes = batch["batch_idx"].long().view(-1), batch["bboxes"].float()
    counts = torch.bincount(index, minlength=images)
    part = _parts(criterion)[0]
    ranked = tuple(counts.sort(descending=True).values.tolist()) if _trains_masks(part) else ()
    if not len(index):
        return Capacity(ranked=ranked)
    height, width = side
    sizes = boxes[:, 2:] * torch.tensor([width, height], dtype=torch.float32)
    sizes = sizes.clamp(min=part.assigner.stride_val)
    pairs = 0
    for stride in part.assigner.stride:
        across = (sizes / stride).floor() + 2  # one more than is possible, for rounding
        limit = torch.tensor([math.ceil(width / stride), math.ceil(height / stride)])
        pairs += int(torch.minimum(across, limit).prod(1).sum())
    return Capacity(int(counts.max()), len(index), pairs, ranked)


def pad_targets(batch: dict[str, Any], images: int, boxes: int, no_class: int = 0) -> Tensor:
    """Targets of a batch, padded to `[images, boxes, 5]`: class and normalised xywh, in the order of the batch.

    Padding has `no_class`, and a box without size.
    """
    counts = torch.bincount(batch["batch_idx"].long().view(-1), minlength=images)
    flat = torch.cat((batch["cls"].float().view(-1, 1), batch["bboxes"]), 1)
    padded = flat.new_zeros(images, boxes, 5)
    padded[..., 0] = no_class
    padded[torch.arange(boxes) < counts[:, None]] = flat
    return padded


def gains(criterion: Any) -> Tensor:
    """Numbers that may change from step to step `[5]`: gains of box, class and dfl loss, and weights of the parts."""
    hyp = _parts(criterion)[0].hyp
    weights = (criterion.o2m, criterion.o2o) if type(criterion) is E2ELoss else (1.0, 0.0)
    return torch.tensor([hyp.box, hyp.cls, hyp.dfl, *weights], dtype=torch.float32)


class FixedShapeLoss:
    """The loss of a criterion, in fixed shapes.

    Attributes:
        names: Of the loss items.
        reads: What of a batch the loss reads on the device: keys of tensors whose shapes are those of every batch.
    """

    def __init__(self, criterion: Any, capacity: Capacity) -> None:
        """Hold a criterion for which `not_supported_reason` is empty."""
        self.criterion, self.capacity = criterion, capacity
        self._parts = _parts(criterion)
        self.names: tuple[str, ...] = tuple(self._parts[-1].loss_names)
        self.reads: tuple[str, ...] = ("masks", "sem_masks") if _trains_masks(self._parts[0]) else ()
        self._constants: dict[Any, tuple[Tensor, ...]] = {}
        self._signature = Signature(_objects(criterion))

    def __call__(self, outputs: Any, targets: Tensor, gains: Tensor, *read: Tensor) -> tuple[Tensor, Tensor]:
        """The loss.

        Args:
            outputs: Of the network in training.
            targets: From `pad_targets`, padded to `capacity.boxes`, on the device.
            gains: From `gains`, on the device.
            *read: From `masks_of`.

        Returns:
            The losses times the number of images, for the backward, and the loss items: one for each of `names`.
        """
        outputs = self._parts[0].parse_output(outputs)
        if len(self._parts) == 1:
            items = self._one(self._parts[0], outputs, targets, gains, *read)
            return items * len(targets), items.detach()
        many, one = (
            self._one(part, outputs[name], targets, gains, *read)
            for part, name in zip(self._parts, ("one2many", "one2one"), strict=True)
        )
        return many * len(targets) * gains[3] + one * len(targets) * gains[4], one.detach()

    def masks_of(self, batch: dict[str, Any]) -> list[Tensor]:
        """What `reads` names, in float32: the masks of a batch may be uint8, which could not hold those of another."""
        return [batch[name].float() for name in self.reads]

    def holds(self, criterion: Any) -> bool:
        """Whether this is the loss of a criterion, whose numbers and functions have not changed since."""
        return criterion is self.criterion and _one_hyp(criterion) and not self._signature.changed()

    def _one(self, part: Any, outputs: dict[str, Any], targets: Tensor, gains: Tensor, *read: Tensor) -> Tensor:
        """Losses of one set of outputs, as the `loss` of its criterion."""
        if not read:
            return self._detection(part, outputs, targets, gains)[1]
        masks, classes = read
        proto, semantic = outputs["proto"], None
        if isinstance(proto, tuple):  # of YOLO26
            proto, semantic = proto
        coefficients = outputs["mask_coefficient"].permute(0, 2, 1).contiguous()
        *_, size = self._constants_of(part, outputs["feats"], coefficients.dtype)
        order = targets[..., 1:].any(2).sum(1).argsort(descending=True)
        given = Masks(coefficients, proto, masks, size, order, self.capacity.ranked)
        found, (box, cls, dfl) = self._detection(part, outputs, targets, gains, given)
        seg = mask_loss(part, given, found).float() * gains[0]
        sem = torch.zeros_like(seg)
        if semantic is not None:
            sem = semantic_loss(part, semantic, classes, masks, found.foreground).float() * gains[0]
        return torch.stack((box, seg, cls, dfl, sem))

    def _detection(
        self, part: Any, outputs: dict[str, Any], targets: Tensor, gains: Tensor, masks: Masks | None = None
    ) -> tuple[Assigned, Tensor]:
        """As v8DetectionLoss.get_assigned_targets_and_loss: what was assigned, and three losses."""
        distances = outputs["boxes"].permute(0, 2, 1).contiguous()
        scores = outputs["scores"].permute(0, 2, 1).contiguous()
        anchors, strides, size, scale = self._constants_of(part, outputs["feats"], scores.dtype)
        labels, boxes = targets[..., :1], xywh2xyxy(targets[..., 1:] * scale)
        predicted = part.bbox_decode(anchors, distances)
        with torch.no_grad():
            pixels = (predicted.detach() * strides).type(boxes.dtype)
            found = self._assign(
                part.assigner, scores.detach().sigmoid(), pixels, anchors * strides, labels, boxes, masks
            )
            target_scores_sum = found.scores.sum().clamp_(min=1)
            rows, spare = self._foreground(found.foreground, part.assigner.topk2)
        # The spare row's box is not trained: without height it would have a gradient of NaN, in spite of weight 0.
        unit = torch.cat((anchors - 0.5, anchors + 0.5), 1).to(predicted.dtype)
        predicted = torch.where(spare, unit, predicted)
        cross_entropy = part.bce(scores, found.scores.to(scores.dtype))
        if part.class_weights is not None:
            cross_entropy = cross_entropy * part.class_weights
        box, dfl = part.bbox_loss(
            *(distances, predicted, anchors, found.boxes / strides, found.scores, target_scores_sum),
            *(rows, size, strides),
        )
        losses = torch.stack([box.float(), (cross_entropy.sum() / target_scores_sum).float(), dfl.float()])
        return found, losses * gains[:3]

    def _constants_of(self, part: Any, features: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Anchors, their strides, the image size and the scale of boxes: made once, since they come from the host."""
        key = (*(tuple(feature.shape[2:]) for feature in features), features[0].dtype, dtype)
        if key not in self._constants:
            anchors, strides = make_anchors(features, part.stride, 0.5)
            size = torch.tensor(features[0].shape[2:], device=features[0].device, dtype=dtype) * part.stride[0]
            self._constants[key] = anchors, strides, size, size[[1, 0, 1, 0]]
        return self._constants[key]

    def _assign(
        self,
        assigner: Any,
        scores: Tensor,
        predicted: Tensor,
        centres: Tensor,
        labels: Tensor,
        boxes: Tensor,
        masks: Masks | None,
    ) -> Assigned:
        """As TaskAlignedAssigner.forward."""
        assigner.bs, assigner.n_max_boxes = len(boxes), boxes.shape[1]
        exists = boxes.sum(2, keepdim=True).gt_(0.0)
        inside = _inside(centres, boxes, exists, assigner.stride_val)
        candidates = inside & exists.bool()
        image, box, anchor = torch.nonzero_static(candidates, size=self.capacity.pairs, fill_value=0).unbind(1)
        place = candidates.flatten().cumsum(0, dtype=torch.int32).sub_(1).clamp_(0, len(image) - 1)

        def dense(values: Tensor) -> Tensor:
            return torch.where(candidates, values.index_select(0, place).view(candidates.shape), 0)

        overlap = TaskAlignedAssigner.pair_overlaps(assigner, (image, box, anchor), boxes, predicted)
        score = scores[image, anchor, labels[image, box, 0].long()].pow(assigner.alpha)
        if masks is not None and type(assigner) is MASK_ASSIGNER:
            by_boxes = dense(score * overlap.pow(assigner.beta) + assigner.eps)
            overlap = (overlap + mask_overlaps(assigner, masks, by_boxes, predicted)[image, box, anchor]) / 2
        overlaps, metrics = dense(overlap), dense(score * overlap.pow(assigner.beta))
        top = assigner.select_topk_candidates(metrics, topk_mask=exists.expand(-1, -1, assigner.topk).bool())
        positive = top.mul_(inside).mul_(exists.bool())
        of_box, foreground, positive = assigner.select_highest_overlaps(
            positive, overlaps, assigner.n_max_boxes, metrics
        )
        _, target_boxes, target_scores = assigner.get_targets(labels, boxes, of_box, foreground)
        metrics = metrics * positive
        best_metric = metrics.amax(dim=-1, keepdim=True)
        best_overlap = (overlaps * positive).amax(dim=-1, keepdim=True)
        metrics.mul_(best_overlap).div_(best_metric + assigner.eps)
        return Assigned(target_boxes, target_scores * metrics.amax(-2).unsqueeze(-1), foreground.bool(), of_box)

    def _foreground(self, mask: Tensor, per_box: int) -> tuple[_Rows, Tensor]:
        """The rows of the foreground, filled up to a fixed number with a spare row.

        The spare row is one of the background, which weighs nothing; the second result `[images, anchors, 1]` marks it.
        """
        flat = mask.flatten()
        spare = flat.to(torch.int32).argmin()
        rows = torch.nonzero_static(flat, size=min(per_box * self.capacity.total, len(flat)), fill_value=-1).squeeze(1)
        rows = torch.where(rows < 0, spare, rows)
        marked = (torch.arange(len(flat), device=flat.device) == spare) & ~flat
        return _Rows((rows // mask.shape[1], rows % mask.shape[1])), marked.view(*mask.shape, 1)


@dataclass(frozen=True)
class _Rows:
    """Takes the place of the foreground mask, of which BboxLoss asks only the indices."""

    indices: tuple[Tensor, Tensor]

    def nonzero(self, as_tuple: bool) -> tuple[Tensor, Tensor]:
        return self.indices


def _inside(centres: Tensor, boxes: Tensor, exists: Tensor, least: int) -> Tensor:
    """Which anchors lie in which boxes `[images, boxes, anchors]`, as TaskAlignedAssigner.select_candidates_in_gts."""
    xywh = xyxy2xywh(boxes)
    small = (xywh[..., 2:] < least) & exists.bool()
    xywh[..., 2:] = torch.where(small, float(least), xywh[..., 2:])
    x1, y1, x2, y2 = (side.unsqueeze(2) for side in xywh2xyxy(xywh).unbind(2))
    x, y = centres.unbind(1)
    return (x - x1 > _EPS) & (y - y1 > _EPS) & (x2 - x > _EPS) & (y2 - y > _EPS)


def _one_hyp(criterion: Any) -> bool:
    """Whether all parts share one set of hyperparameters: its gains are an input of the graphs."""
    return len({id(part.hyp) for part in _parts(criterion)}) == 1


def _objects(criterion: Any) -> list[Any]:
    """A criterion and all objects within, such as parts, assigners and modules."""
    found: dict[int, Any] = {}
    stack = [criterion]
    while stack:
        obj = stack.pop()
        if id(obj) not in found:
            found[id(obj)] = obj
            held = [value for name, value in vars(obj).items() if name != "hyp"]  # the gains are an input
            held += obj.modules() if isinstance(obj, nn.Module) else []
            stack += [value for value in held if hasattr(value, "__dict__") and not isinstance(value, _NO_PARTS)]
    return list(found.values())


def _parts(criterion: Any) -> list[Any]:
    return [criterion.one2many, criterion.one2one] if type(criterion) is E2ELoss else [criterion]


def _trains_masks(part: Any) -> bool:
    return isinstance(part, v8SegmentationLoss)
