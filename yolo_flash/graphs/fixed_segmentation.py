"""The mask term of Ultralytics' segmentation loss in shapes that do not depend on the data.

Stock looks at one image after the other and takes as many rows as anchors were assigned there, which the host waits to
learn. Here the images are taken in the order of their foreground, and each has the rows that an image of that rank may
need: the largest image of a batch many, the smallest few. All rows of an image are one call of the criterion's own
`single_mask_loss`, as in stock, so that products are rounded alike. A row too many has coefficients of zero and a box
without pixels: its loss and its gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.ops import xyxy2xywh

BYTES_A_PIXEL = 10  # for each row and pixel of a mask: logits and target in float32 wait for the backward, 2 on the way


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


def mask_loss(
    part: Any, coefficients: Tensor, proto: Tensor, masks: Tensor, found: Assigned, size: Tensor, rows: Sequence[int]
) -> Tensor:
    """The mask loss of one set of outputs, as v8SegmentationLoss.calculate_segmentation_loss; 0 without foreground.

    Args:
        part: The criterion, with one mask for all boxes of an image (`overlap_mask=True`).
        coefficients: Of the masks, `[images, anchors, prototypes]`.
        proto: Prototypes `[images, prototypes, height, width]`.
        masks: Numbers of the boxes from 1 on, 0 for the background: `[images, height, width]`, float32.
        found: Of the assigner.
        size: Width, height, width and height of the images in pixels.
        rows: The most anchors that are assigned in the image with most of them, with second most, and so on.
    """
    height, width = masks.shape[-2:]
    if proto.shape[-2:] != (height, width):
        proto = F.interpolate(proto, (height, width), mode="bilinear", align_corners=False)
    counts = found.foreground.sum(1)
    order = counts.argsort(descending=True)
    image = order.unsqueeze(1)
    flags = found.foreground.index_select(0, order).to(torch.uint8)
    anchor = flags.argsort(dim=1, descending=True, stable=True)[:, : rows[0]]  # the foreground as it is, then others
    real = (torch.arange(anchor.shape[1], device=anchor.device) < counts[image]).unsqueeze(2)
    boxes = torch.where(real, found.boxes[image, anchor] / size, 0)
    area = torch.where(real.squeeze(2), xyxy2xywh(boxes)[..., 2:].prod(2), 1)
    x1, y1, x2, y2 = boxes.unbind(2)
    boxes = torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), 2)
    coefficients = torch.where(real, coefficients[image, anchor], 0)
    numbers = found.of_box[image, anchor] + 1
    proto, masks = proto.index_select(0, order), masks.index_select(0, order)
    losses = [
        part.single_mask_loss(
            (mask == number[:n].view(-1, 1, 1)).float(), coefficient[:n], prototypes, box[:n], surface[:n]
        )
        for n, mask, number, coefficient, prototypes, box, surface in zip(
            rows, masks, numbers, coefficients, proto, boxes, area, strict=True
        )
    ]
    return torch.stack(losses).sum() / counts.sum().clamp(min=1)
