"""What segmentation adds to Ultralytics' detection loss, in shapes that do not depend on the data.

Stock looks at one image after the other and takes as many anchors as were assigned there, which the host waits to
learn. Here the images are taken in the order of their number of boxes, and each has the rows that an image of that
rank may need: the first of a batch many, the last few. All rows of an image are one product with its prototypes, as in
stock, so that they are rounded alike, and one call of the criterion's own `single_mask_loss`. A row too many has
coefficients of zero and a box without pixels: its loss and its gradients are exactly zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils import loss, tal
from ultralytics.utils.ops import crop_mask, xyxy2xywh

SEGMENT_LOSS_26 = getattr(loss, "SegmentLoss26", None)  # older releases train YOLO26 with the loss of the others
MASK_ASSIGNER = getattr(tal, "SegTaskAlignedAssigner", None)  # of that loss

_BYTES_TRAINED = 10  # for each row and pixel: logits and target in float32, held for the backward, and 2 on the way
_BYTES_COMPARED = 6  # for each row and pixel of one image: logits, bits, and numbers in half precision
_EXACT = 2048  # pixels of which float16 counts every number
_BEST = 3  # of a box's top candidates, by boxes, how many times as many have their masks compared


class Assigned(NamedTuple):
    """What the assigner found for each anchor.

    Attributes:
        boxes: Target boxes `[images, anchors, 4]` in pixels, xyxy.
        scores: Target scores `[images, anchors, classes]`.
        foreground: Whether an anchor has a box `[images, anchors]`.
        of_box: Number of that box in its image `[images, anchors]`.
    """

    boxes: Tensor
    scores: Tensor
    foreground: Tensor
    of_box: Tensor


class Masks(NamedTuple):
    """Masks of a batch, and what predicts them.

    Attributes:
        coefficients: Of the prototypes `[images, anchors, prototypes]`.
        proto: Prototypes `[images, prototypes, height, width]`.
        masks: Numbers of the boxes from 1 on, 0 for the background: `[images, height, width]`, float32.
        size: Width, height, width and height of the images in pixels.
        order: Images, that with most boxes first `[images]`.
        ranked: The most boxes of the first image in that order, of the second, and so on.
    """

    coefficients: Tensor
    proto: Tensor
    masks: Tensor
    size: Tensor
    order: Tensor
    ranked: tuple[int, ...]

    def rows(self, flags: Tensor, per_box: int) -> tuple[list[int], Tensor]:
        """The marked anchors of the images in their order, each row filled up with others.

        Args:
            flags: `[images, anchors]`.
            per_box: Number of anchors that are marked for a box at most.

        Returns:
            How many the first, the second image may have, and so on; anchors `[images, the first of these numbers]`.
        """
        counts = [min(per_box * boxes, flags.shape[1]) for boxes in self.ranked]
        ordered = flags.index_select(0, self.order).to(torch.uint8)
        return counts, ordered.argsort(dim=1, descending=True, stable=True)[:, : counts[0]]


def mask_bytes(assigner: Any, ranked: tuple[int, ...], pixels: int) -> int:
    """Bytes that graphs take for masks of so many pixels, see `Masks.ranked`."""
    trained = sum(ranked) * assigner.topk2 * _BYTES_TRAINED
    compared = ranked[0] * _BEST * assigner.topk * _BYTES_COMPARED if type(assigner) is MASK_ASSIGNER else 0
    return (trained + compared) * pixels


def mask_loss(part: Any, given: Masks, found: Assigned) -> Tensor:
    """The mask loss, as v8SegmentationLoss.calculate_segmentation_loss; 0 without foreground.

    Args:
        part: The criterion, with one mask for all boxes of an image (`overlap_mask=True`).
        given: Its inputs.
        found: Of its assigner.
    """
    proto, (height, width) = given.proto, given.masks.shape[-2:]
    if proto.shape[-2:] != (height, width):
        proto = F.interpolate(proto, (height, width), mode="bilinear", align_corners=False)
    image = given.order.unsqueeze(1)
    counts, anchor = given.rows(found.foreground, part.assigner.topk2)
    real = found.foreground[image, anchor].unsqueeze(2)
    boxes = torch.where(real, found.boxes[image, anchor] / given.size, 0)
    area = torch.where(real.squeeze(2), xyxy2xywh(boxes)[..., 2:].prod(2), 1)
    x1, y1, x2, y2 = boxes.unbind(2)
    boxes = torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), 2)
    coefficients = torch.where(real, given.coefficients[image, anchor], 0)
    numbers = found.of_box[image, anchor] + 1
    proto, masks = (values.index_select(0, given.order) for values in (proto, given.masks))
    losses = []
    each = zip(counts, coefficients, proto, masks, numbers, boxes, area, strict=True)  # unbound at once
    for n, coefficient, prototypes, mask, number, box, surface in each:
        wanted = (mask == number[:n].view(-1, 1, 1)).float()
        losses.append(part.single_mask_loss(wanted, coefficient[:n], prototypes, box[:n], surface[:n]))
    return torch.stack(losses).sum() / found.foreground.sum().clamp(min=1)


def mask_overlaps(assigner: Any, given: Masks, metric: Tensor, predicted: Tensor) -> Tensor:
    """Overlaps of predicted masks and those of boxes `[images, boxes, anchors]`, as SegTaskAlignedAssigner.

    Args:
        assigner: Of that class.
        given: Inputs of the criterion.
        metric: How well boxes fit `[images, boxes, anchors]`; 0 where an anchor is no candidate. Of the best of each
            box the masks are compared, others have an overlap of 0.
        predicted: Boxes `[images, anchors, 4]` in pixels, xyxy.
    """
    proto, masks = given.proto.detach(), given.masks
    height, width = proto.shape[-2:]
    if masks.shape[-2:] != (height, width):
        masks = F.interpolate(masks[None], (height, width), mode="nearest")[0]
    per_box = min(_BEST * assigner.topk, metric.shape[2])
    best = metric.topk(per_box, dim=-1).indices
    compared = torch.zeros_like(metric, dtype=torch.bool).scatter_(-1, best, True) & (metric > 0)
    image = given.order.unsqueeze(1)
    counts, anchor = given.rows(compared.any(1), per_box)
    coefficients = given.coefficients.detach()[image, anchor]
    boxes = predicted[image, anchor] * (height / given.size[1].float())
    proto, masks = (values.index_select(0, given.order) for values in (proto, masks))
    overlaps = torch.zeros_like(metric)  # of the images in their order
    numbers = torch.arange(1, metric.shape[1] + 1, device=metric.device)
    dtype = torch.half if metric.is_cuda else torch.float
    block = max(pixels for pixels in range(1, _EXACT + 1) if height * width % pixels == 0)
    for i, (n, count) in enumerate(zip(counts, given.ranked, strict=True)):
        found = (coefficients[i, :n] @ proto[i].flatten(1)) > 0
        found = crop_mask(found.view(n, height, width), boxes[i, :n]).flatten(1)
        wanted = masks[i].flatten() == numbers[:count, None]
        blocks = (mask.to(dtype).view(len(mask), -1, block).transpose(0, 1) for mask in (wanted, found))
        with torch.autocast(metric.device.type, enabled=False):
            both = torch.bmm(next(blocks), next(blocks).transpose(1, 2)).float().sum(0)
        either = wanted.sum(1, keepdim=True) + found.sum(1) - both
        overlaps[i, : len(wanted)].scatter_(1, anchor[i, :n].expand(len(wanted), -1), both / either.clamp(min=1))
    return torch.where(compared, overlaps.index_select(0, given.order.argsort()), 0)


def semantic_loss(part: Any, semantic: Tensor, classes: Tensor, masks: Tensor, foreground: Tensor) -> Tensor:
    """The loss of semantic outputs, as v8SegmentationLoss.loss; 0 without foreground.

    Args:
        part: The criterion.
        semantic: Logits `[images, classes, height, width]`.
        classes: Of each pixel `[images, height, width]`.
        masks: As in `Masks`.
        foreground: As in `Assigned`.
    """
    index = classes.long().unsqueeze(1)
    wanted = torch.zeros(len(index), part.nc, *index.shape[2:], device=index.device)
    wanted.scatter_(1, index, (masks != 0).unsqueeze(1).float())
    return torch.where(foreground.any(), part.bcedice_loss(semantic, wanted), 0)
