"""RT-DETR's training step in fixed shapes: its denoising queries are padded to a fixed number.

A step adds noisy labels to the decoder's queries, at most twice `num_denoising`, as many as the labels of the batch
give. Ultralytics' own function draws them, outside of the graphs and with the random numbers of an eager step; they are
inputs of the graphs, padded. No query sees a padded one, and what becomes of it weighs nothing.

With dropout, which no RT-DETR of Ultralytics has, other shapes would draw other random numbers: the comparison that
precedes a capture refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..utils.errors import first_line, is_out_of_memory
from ..utils.numerics import relative_error
from . import rtdetr_loss
from .capture import LOSS_ERROR, NextCall, can_replay, distance, next_loss, pinned
from .fixed_loss import Capacity
from .graphed_step import GraphedStep, no_trace, without_cached_casts
from .host_constants import HostConstants
from .rtdetr_loss import NO_BOX, PADDING, MatchedLoss

_ROUNDING = 8  # machine epsilons that padding may change the outputs by, relative: products are cut in another way
_LEAST_ERROR = 1e-4  # is allowed in any case

Labels = dict[str, Any]  # as RTDETRDetectionModel.loss gives them to its network


class Drawn(NamedTuple):
    """Denoising queries of a batch.

    Attributes:
        classes: `[images, room]` int64: classes from 1 on, 0 for a query without one.
        boxes: `[images, room, 4]` as logits.
        hidden: `[room + queries, room + queries]` bool: which query does not see which, as attention masks have it.
        meta: What Ultralytics' criterion has to know about them.
    """

    classes: Tensor
    boxes: Tensor
    hidden: Tensor
    meta: dict[str, Any]


class Network(nn.Module):
    """The network of an RT-DETR with a fixed number of denoising queries.

    Attributes:
        model: Of Ultralytics.
        room: For denoising queries.
        queries: The others that an image has.
    """

    def __init__(self, model: Any, queries: int) -> None:
        super().__init__()
        self.model, self.queries = model, queries
        self.room = 2 * model.model[-1].num_denoising
        self._constants = HostConstants()
        device = next(model.parameters()).device
        # Made here: an attribute that came later would be a change of the network.
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def forward(self, images: Tensor, classes: Tensor, boxes: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """As RTDETRDetectionModel.predict and RTDETRDecoder.forward in training.

        Args:
            images: `[images, channels, height, width]`.
            classes: See `Drawn`, as for the others.
            boxes: Of the denoising queries.
            hidden: Of all queries.

        Returns:
            Boxes and scores of the decoder `[layers, images, room + queries, 4 or classes]`, and of the encoder.
        """
        with self._constants:
            *layers, head = self.model.model
            x: Any = images
            kept: list[Any] = []
            for layer in layers:
                if layer.f != -1:
                    x = kept[layer.f] if isinstance(layer.f, int) else [x if j == -1 else kept[j] for j in layer.f]
                x = layer(x)
                kept.append(x if layer.i in self.model.save else None)
            features, shapes = head._get_encoder_input([kept[j] for j in head.f])
            weight = head.denoising_class_embed.weight
            embedded = torch.where(classes.unsqueeze(-1) > 0, weight[(classes - 1).clamp(min=0)], 0.0)
            embedded, reference, enc_boxes, enc_scores = head._get_decoder_input(features, shapes, embedded, boxes)
            heads = head.dec_bbox_head, head.dec_score_head, head.query_pos_head
            dec_boxes, dec_scores = head.decoder(embedded, reference, features, shapes, *heads, attn_mask=hidden)
        return dec_boxes, dec_scores, enc_boxes, enc_scores

    def draw(self, labels: Labels) -> Drawn | None:
        """Draw denoising queries as an eager step does; None if the labels give none, or too many."""
        from ultralytics.models.utils.ops import get_cdn_group  # when it is needed, as Ultralytics does

        head, device = self.model.model[-1], labels["bboxes"].device
        numbers = torch.arange(1, len(head.denoising_class_embed.weight) + 1, device=device)
        found = get_cdn_group(
            labels,
            head.nc,
            self.queries,
            numbers.unsqueeze(1).to(torch.get_default_dtype()),  # in the place of embeddings, which need gradients
            head.num_denoising,
            head.label_noise_ratio,
            head.box_noise_scale,
            training=True,
        )
        if found[0] is None or found[0].shape[1] > self.room:
            return None
        numbers, boxes, mask, meta = found
        images, count, _ = numbers.shape
        classes = numbers.new_zeros(images, self.room, dtype=torch.int64)
        classes[:, :count] = numbers.squeeze(-1)
        padded = boxes.new_zeros(images, self.room, 4)
        padded[:, :count] = boxes
        hidden = mask.new_zeros(self.room + self.queries, self.room + self.queries)
        hidden[:count, :count] = mask[:count, :count]
        hidden[:count, self.room :] = mask[:count, count:]
        hidden[self.room :, :count] = mask[count:, :count]
        hidden[self.room :, self.room :] = mask[count:, count:]
        hidden[:count, count : self.room] = hidden[self.room :, count : self.room] = True
        hidden[count : self.room, :count] = True  # the padded ones see each other: a row without any is NaN
        return Drawn(classes, padded, hidden, meta)

    def as_stock(self, outputs: tuple[Tensor, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
        """Outputs without the padding, as the model's own network gives them."""
        count, _ = meta["dn_num_split"]
        dec = (torch.cat([output[:, :, :count], output[:, :, self.room :]], dim=2) for output in outputs[:2])
        return *dec, *outputs[2:], meta

    def reconstructed(self, drawn: Drawn, labels: Labels) -> Tensor:
        """The box of its image that each denoising query reconstructs, see `MatchedLoss`; on the CPU."""
        meta, count = drawn.meta, drawn.meta["dn_num_split"][0]
        found = torch.full((len(drawn.classes), self.room), NO_BOX)
        found[:, count:] = PADDING
        pairs = self.model.criterion.get_dn_match_indices(meta["dn_pos_idx"], meta["dn_num_group"], meta["dn_gt_idx"])
        first = 0
        for mine, number, (queries, boxes) in zip(found, labels["gt_groups"], pairs, strict=True):
            mine[queries] = boxes - first
            first += number
        return found

    @contextlib.contextmanager
    def aside(self) -> Iterator[Callable[[Any], Any]]:
        """Work on a stream of its own, on which the host waits for no step under way.

        Yields:
            A function that hands tensors on to the stream of the caller.
        """
        if self._side is None:
            yield lambda tensors: tensors
            return
        current = torch.cuda.current_stream(self._side.device)

        def hand_on(tensors: Any) -> Any:
            for leaf in pytree.tree_leaves(tensors):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(current)
            return tensors

        with torch.cuda.stream(self._side):
            yield hand_on
        current.wait_stream(self._side)


def labels_of(targets: Tensor, device: torch.device) -> Labels:
    """The labels in padded targets on the CPU, on a device; without waiting for it."""
    exists = targets[..., 0] >= 0
    flat = targets[exists]
    labels = {"cls": flat[:, 0].long(), "bboxes": flat[:, 1:].contiguous(), "batch_idx": exists.nonzero()[:, 0]}
    there = {name: pinned(value).to(device, non_blocking=True) for name, value in labels.items()}
    return {**there, "gt_groups": exists.sum(1).tolist()}


def capture_step(
    model: Any,
    batch: dict[str, Any],
    targets: Tensor | None,
    capacity: Capacity,
    capture: Callable[..., GraphedStep] = GraphedStep,
) -> tuple[GraphedStep, str]:
    """Capture the forward and backward of an RT-DETR, as `capture.capture_step`.

    Raises:
        torch.OutOfMemoryError: There is too little memory.
        RuntimeError: The network cannot be captured, or does not compute what the model's own does.
    """
    images = batch["img"]
    why_not = "the boxes of its batches are not known on the CPU" if targets is None else ""
    why_not = rtdetr_loss.not_supported_reason(getattr(model, "criterion", None)) or why_not
    compared = _made_up(len(images), capacity) if targets is None or not _most(targets) else targets
    network, drawn, labels = _compared(model, images, compared)
    if _most(compared) > network.queries:  # such batches run eager
        compared = _made_up(len(images), capacity)
        network, drawn, labels = _compared(model, images, compared)
    if targets is not None and not why_not:
        try:
            loss = MatchedLoss(model.criterion, network.room)
            extra = compared, network.reconstructed(drawn, labels)
            off = _loss_error(network, loss, images, drawn, labels, extra)
            if off <= LOSS_ERROR:
                return capture(network, images, loss, extra, drawn[:3]), ""
            why_not = f"in fixed shapes it is off by {off:.1e}"
        except Exception as error:  # of another Ultralytics, torch or Triton
            if is_out_of_memory(error):
                raise
            why_not = first_line(error)
    return capture(network, images, None, (), drawn[:3]), why_not


def replay_next_call(
    model: Any, step: GraphedStep, batch: dict[str, Any], targets: Tensor | None, ended: Callable[[str], object] = bool
) -> NextCall | None:
    """Let the next forward of an RT-DETR be a replay, as `capture.replay_next_call`."""
    network: Any = step.network
    images = batch["img"]
    if not can_replay(model, step, images, ended):
        return None
    if step.loss is None:

        def predict(x: Any, *args: Any, batch: Labels | None = None, **kwargs: Any) -> Any:
            if not isinstance(x, Tensor) or args or kwargs or batch is None or not step.fits(x):
                ended("the network was called for something else")
                return NotImplemented
            drawn = network.draw(batch)
            if drawn is None:
                ended("it has no denoising queries, or too many")
                return NotImplemented
            ended("")
            return network.as_stock(step(x, *drawn[:3]), drawn.meta)

        return NextCall(model, "predict", predict)
    if targets is None:
        return None
    most = _most(targets)
    if not 0 < most <= network.queries:
        ended(f"{most} boxes in an image, the decoder has {network.queries} queries" if most else "no boxes")
        return None

    def replay() -> Any:
        with network.aside() as hand_on:
            labels = labels_of(targets, images.device)
            drawn = hand_on(network.draw(labels))
        if drawn is None:
            ended("it has no denoising queries, or too many")
            return NotImplemented
        extra = targets, network.reconstructed(drawn, labels)
        loss, items = step(images, *drawn[:3], *map(pinned, extra))
        return loss, dict(zip(MatchedLoss.names, items.clone(), strict=True))

    return next_loss(model, batch, ended, replay)


def _most(targets: Tensor) -> int:
    """Boxes of the image that has the most."""
    return int((targets[..., 0] >= 0).sum(1).max())


def _made_up(images: int, capacity: Capacity) -> Tensor:
    """Targets for a comparison where a batch has none: a box in each image but the last."""
    box = torch.tensor([0.0, 0.5, 0.5, 0.3, 0.2])
    targets = torch.zeros(images, max(capacity.boxes, 1), 5)
    targets[..., 0] = -1
    targets[: max(images - 1, 1), 0] = box
    return targets


def _compared(model: Any, images: Tensor, targets: Tensor) -> tuple[Network, Drawn, Labels]:
    """The network in fixed shapes, and denoising queries of some targets, with which it does as the model's own.

    Raises:
        RuntimeError: It does not, or there are no such queries.
    """
    device = images.device
    labels = labels_of(targets, device)
    with no_trace(model, device), without_cached_casts(device), torch.no_grad():
        wanted = model.predict(images, batch=labels)
    with no_trace(model, device), without_cached_casts(device), torch.no_grad():  # with the same random numbers
        network = Network(model, wanted[2].shape[1])
        drawn = network.draw(labels)
        if drawn is None:
            raise RuntimeError("the decoder has no denoising queries, or too many")
        found = network.as_stock(network(images, *drawn[:3]), drawn.meta)
    off = max(relative_error(a, b) for a, b in zip(found[:4], wanted[:4], strict=True))
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else wanted[0].dtype
    if not off <= max(_ROUNDING * torch.finfo(dtype).eps, _LEAST_ERROR):
        raise RuntimeError(f"with a fixed number of denoising queries the outputs are off by {off:.1e}")
    return network, drawn, labels


def _loss_error(
    network: Network, loss: MatchedLoss, images: Tensor, drawn: Drawn, labels: Labels, extra: tuple[Tensor, Tensor]
) -> float:
    """The largest relative error of a loss in fixed shapes, and of its gradients, against the model's."""
    device, model = images.device, network.model
    with no_trace(model, device), without_cached_casts(device), torch.no_grad():
        outputs = network(images, *drawn[:3])

    def stock(inputs: Any) -> tuple[Tensor, Tensor]:
        total, items = model.loss({"img": images, **labels}, preds=network.as_stock(inputs, drawn.meta))
        return total, torch.stack(list(items.values()))

    on_device = [tensor.to(device) for tensor in extra]
    return distance(lambda inputs: loss(inputs, *on_device), stock, outputs)
