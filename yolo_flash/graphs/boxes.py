"""The boxes of a run's batches: whether the captured loss has room for them, and whether the memory has."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from ..utils.memory import free_bytes, readable
from .capture import LABELS
from .fixed_loss import Capacity
from .kinds import DETECTION

_SHARE = 0.25  # of the free memory that the boxes of a batch may take in the graphs


class BatchBoxes(NamedTuple):
    """What is known of a batch's boxes without waiting for the device; by default nothing.

    Attributes:
        needed: The capacity that they need; None if it is not known.
        targets: The boxes, padded to the capacity of the loss; None if it has no room for them, or they are not known.
        too_many: Why the memory has no room for them; empty if it has.
    """

    needed: Capacity | None = None
    targets: Tensor | None = None
    too_many: str = ""


class BoxRoom:
    """Room for boxes in a run's captured loss.

    Attributes:
        kind: Of the model, which says what boxes need.
        shape: Images in a full batch, their height and their width in pixels.
        capacity: Of the captured loss, or of the one to be captured.
        refused: Number of batches with more boxes than the memory has room for.
    """

    def __init__(self) -> None:
        self.kind = DETECTION
        self.shape: tuple[int, int, int] = (0, 0, 0)
        self.capacity = Capacity()
        self.refused = 0

    def is_full(self, images: Tensor) -> bool:
        """Whether images have the shape of a full batch."""
        return (images.shape[0], *images.shape[2:]) == self.shape

    def look(self, batch: dict[str, Any], criterion: Any, device: torch.device, captured: bool) -> BatchBoxes:
        """Look at the boxes of a full batch; the capacity grows for them until a loss is captured.

        Args:
            batch: As the loader gives it; nothing is known of boxes that are not on the CPU, or not in the order of
                their images: there stock losses differ from each other.
            criterion: Of the run.
            device: Of the run.
            captured: Whether there is a captured loss.
        """
        if any(batch[name].device.type != "cpu" for name in LABELS) or (batch["batch_idx"].view(-1).diff() < 0).any():
            return BatchBoxes()
        needed = self.kind.losses.needed(batch, self.shape[0], self.shape[1:], criterion)
        if not self.capacity.holds(needed) and self._too_large(needed, criterion, device):
            self.refused += 1
            return BatchBoxes(too_many="too many boxes in an image for the memory")
        if not captured:
            self.capacity = self.capacity.grown(needed)
        boxes = BatchBoxes(needed)
        return self._pad(batch, boxes) if self.capacity.holds(needed) else boxes

    def grow(self, batch: dict[str, Any], boxes: BatchBoxes) -> BatchBoxes:
        """Let the capacity grow until there is room for the boxes of a batch, whose labels may be on the device."""
        if boxes.needed is None or boxes.targets is not None:
            return boxes
        self.capacity = self.capacity.grown(boxes.needed)
        return self._pad({name: batch[name].cpu() for name in LABELS}, boxes)

    def _pad(self, batch: dict[str, Any], boxes: BatchBoxes) -> BatchBoxes:
        return boxes._replace(targets=self.kind.losses.pad_targets(batch, self.shape[0], self.capacity.boxes))

    def _too_large(self, needed: Capacity, criterion: Any, device: torch.device) -> bool:
        """Whether graphs would take a large share of the memory for so many boxes in an image; the first is logged."""
        wanted = self.capacity.grown(needed)
        need = self.kind.losses.needed_bytes(wanted, self.shape[0], self.shape[1:], criterion)
        room = free_bytes(device)
        if need > _SHARE * room and not self.refused:
            LOGGER.info(
                f"yolo-flash: a batch with {needed.boxes} boxes in an image runs without CUDA graphs, which would take "
                f"{readable(need)} for as many, {readable(room)} are free; so do all like it"
            )
        return need > _SHARE * room
