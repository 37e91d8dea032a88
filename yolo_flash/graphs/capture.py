"""One training step of an Ultralytics model from graphs: the network, with the loss if graphs can hold it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..utils.errors import first_line, is_out_of_memory
from ..utils.numerics import relative_error
from . import fixed_loss
from .fixed_loss import Capacity, FixedShapeLoss
from .graphed_step import GraphedStep, no_trace, without_cached_casts

Loss = Callable[[Any], tuple[Tensor, Tensor]]  # of the outputs of a network: losses and loss items

LABELS = ("batch_idx", "cls", "bboxes")  # keys of a batch that the loss reads

LOSS_ERROR = 1e-3  # of the loss in fixed shapes and its gradients, at most; 0 where sums take the same order


def capture_step(
    model: Any,
    batch: dict[str, Any],
    targets: Tensor | None,
    capacity: Capacity,
    capture: Callable[..., GraphedStep] = GraphedStep,
) -> tuple[GraphedStep, str]:
    """Capture the forward and backward of a model.

    Args:
        model: In training mode, with a criterion; on a CUDA device.
        batch: On that device.
        targets: The boxes of the batch, padded to the capacity; None if they are not known on the CPU.
        capacity: Of the loss.
        capture: Makes the graphs, as `GraphedStep`.

    Returns:
        The graphs, and why they do not hold the loss; empty if they do.

    Raises:
        torch.OutOfMemoryError: There is too little memory.
        RuntimeError: Not even the network can be captured.
    """
    images = batch["img"]
    why_not = "the boxes of its batches are not known on the CPU" if targets is None else ""
    why_not = fixed_loss.not_supported_reason(getattr(model, "criterion", None)) or why_not
    if targets is not None and not why_not:
        try:
            loss = FixedShapeLoss(model.criterion, capacity)
            off = loss_error(model, loss, *_labelled(batch, targets))
            if off <= LOSS_ERROR:
                extra = [targets, fixed_loss.gains(model.criterion), *loss.masks_of(batch)]
                return capture(model, images, loss, extra), ""
            why_not = f"in fixed shapes it is off by {off:.1e}"
        except Exception as error:  # of another Ultralytics or torch
            if is_out_of_memory(error):
                raise
            why_not = first_line(error)
    return capture(model, images, None, ()), why_not


def replay_next_call(
    model: Any, step: GraphedStep, batch: dict[str, Any], targets: Tensor | None, ended: Callable[[str], object] = bool
) -> NextCall | None:
    """Let the next forward of a model be a replay, if the batch has the captured shape and the loss room for its boxes.

    Args:
        model: The captured model.
        step: Its graphs.
        batch: On the model's device.
        targets: The boxes of the batch on the CPU, padded to the capacity; None if the loss has no room for them.
        ended: Called with why the forward was no replay; with an empty string if it was one.

    Returns:
        What takes the place of the model's method; None if the next forward is eager.
    """
    images = batch["img"]
    if not can_replay(model, step, images, ended):
        return None
    if not isinstance(step.loss, FixedShapeLoss):

        def predict(x: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, Tensor) or args or kwargs or not step.fits(x) or not torch.is_grad_enabled():
                ended("the network was called for something else")
                return NotImplemented
            ended("")
            return step(x)

        return NextCall(model, "predict", predict)
    if targets is None:
        return None
    names = step.loss.names
    extra = [pinned(targets), pinned(fixed_loss.gains(model.criterion)), *step.loss.masks_of(batch)]
    if not step.fits(images, *extra):
        ended("masks of another shape than those at the capture")
        return None

    def replay() -> Any:
        losses, items = step(images, *extra)
        return losses, dict(zip(names, items.clone(), strict=True))

    return next_loss(model, batch, ended, replay, (*LABELS, *step.loss.reads))


def can_replay(model: Any, step: GraphedStep, images: Tensor, ended: Callable[[str], object]) -> bool:
    """Whether a replay may answer the next call of a model; `ended` is called with why it may not."""
    if own := {"forward", "predict", "loss"} & vars(model).keys():
        ended(f"the model has a {min(own)} of a user's own")
        return False
    if not step.fits(images):
        ended(f"images of {images.dtype} on {images.device}")
        return False
    return True


def next_loss(
    model: Any,
    batch: dict[str, Any],
    ended: Callable[[str], object],
    replay: Callable[[], Any],
    read: tuple[str, ...] = LABELS,
) -> NextCall:
    """Let a replay answer the next call of a model's `loss`, if it is for this batch, and what it read as it was."""
    images = batch["img"]
    labels = [(name, batch[name], batch[name]._version) for name in read]

    def loss(given: Any, preds: Any = None) -> Any:
        # DDP hands on another dict.
        if given["img"] is not images or preds is not None or not torch.is_grad_enabled():
            ended("the model was called for something else")
            return NotImplemented
        if any(given[name] is not tensor or tensor._version != version for name, tensor, version in labels):
            ended("boxes or masks were changed after preprocess_batch")
            return NotImplemented
        ended("")
        return replay()

    return NextCall(model, "loss", loss)


class NextCall:
    """Takes the place of a method of a model, on the instance, for its next call.

    No copy, checkpoint or callback of the trainer meets it. Whoever has kept it calls the model's own method.
    """

    def __init__(self, model: Any, name: str, answer: Callable[..., Any]) -> None:
        """Take the place of a method; where `answer` returns NotImplemented, the method itself is called."""
        self._model, self._name = model, name
        self._answer: Callable[..., Any] | None = answer
        vars(model)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of `answer`, or of the method."""
        answer = self._answer
        self.withdraw()
        given = NotImplemented if answer is None else answer(*args, **kwargs)
        own = getattr(type(self._model), self._name)
        return own(self._model, *args, **kwargs) if given is NotImplemented else given

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """The copied model's own method."""
        return MethodType(getattr(type(self._model), self._name), memo.get(id(self._model), self._model))

    def withdraw(self) -> bool:
        """Give the model its method back, but leave what others have put there; whether the call was still to come."""
        answer, self._answer = self._answer, None
        if vars(self._model).get(self._name) is self:
            del vars(self._model)[self._name]
        return answer is not None


def loss_error(model: Any, loss: FixedShapeLoss, batch: dict[str, Any], targets: Tensor) -> float:
    """The largest relative error of a loss in fixed shapes, and of its gradients, against the model's criterion.

    The model, in training mode, is unchanged afterwards.
    """
    device = batch["img"].device
    with no_trace(model, device), without_cached_casts(device), torch.no_grad():
        outputs = model.predict(batch["img"])
    extra = targets.to(device), fixed_loss.gains(model.criterion).to(device), *loss.masks_of(batch)

    def criterion(inputs: Any) -> tuple[Tensor, Tensor]:
        losses, items = model.criterion(inputs, batch)
        return losses, torch.stack(list(items.values()))

    return distance(lambda inputs: loss(inputs, *extra), criterion, outputs)


def _labelled(batch: dict[str, Any], targets: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A batch and its padded boxes; a batch without boxes gets some, for a comparison of more than zeros.

    So does one with masks, but none in its first image: there stock sums the loss of masks in half precision.
    """
    if targets.any() and (targets[0].any() or "masks" not in batch):
        return batch, targets
    images = batch["img"]
    count = min(len(images), 8)
    across = 32 / max(images.shape[2:])  # as many anchors as every capacity has room for
    device, box = images.device, torch.tensor([0.5, 0.5, across, across])
    made = {
        "batch_idx": torch.arange(count, dtype=torch.float32, device=device),
        "cls": torch.zeros(count, 1, device=device),
        "bboxes": box.expand(count, 4).to(device),
    }
    if "masks" in batch:
        made["masks"] = torch.ones_like(batch["masks"])
    targets = torch.zeros_like(targets)
    targets[:count, 0, 1:] = box
    return {**batch, **made}, targets


def distance(loss: Loss, stock: Loss, outputs: Any) -> float:
    """The largest relative error of a loss, its items and its gradients against those of another."""
    wanted, found = (with_gradients(function, outputs) for function in (stock, loss))
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def with_gradients(loss: Loss, outputs: Any) -> list[Tensor]:
    """Losses, loss items, and the gradients of the outputs."""
    leaves, structure = pytree.tree_flatten(outputs)
    leaves = [leaf.detach().requires_grad_() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    losses, items = loss(pytree.tree_unflatten(leaves, structure))
    trained = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True, materialize_grads=True)
    return [losses.detach(), items, *gradients]


def pinned(tensor: Tensor) -> Tensor:
    """A tensor in memory from which copies to the device are asynchronous."""
    return tensor.pin_memory() if torch.cuda.is_initialized() else tensor
