"""A mixin for Ultralytics' validators: the network runs from CUDA graphs, and metrics wait for the GPU once a batch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from ultralytics.engine.validator import BaseValidator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER, RANK

from ..graphs.capture import LABELS
from ..graphs.validation import ValidationGraphs
from ..utils.errors import is_out_of_memory

_COMPARING = ("update_metrics", "_prepare_batch", "_prepare_pred", "_process_batch", "match_predictions")
_DEVICES = ("cuda",)


class FlashValidatorMixin(BaseValidator):
    """First base of a class generated for each validator class, see `with_graphs`."""

    device: Any
    _flash_graphs: ValidationGraphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Validate, a second time without graphs where memory did not suffice beside them."""
        graphs, why_not = self._flash_graphs, "validation ran out of memory beside its CUDA graphs"
        while True:
            try:
                return super().__call__(*args, **kwargs)
            except RuntimeError as error:
                # Other ranks are in the middle of this validation.
                if RANK != -1 or not is_out_of_memory(error) or not graphs.give_up(why_not):
                    raise
                LOGGER.warning(f"yolo-flash: {why_not}: they are freed, and it is run again.")
            finally:
                graphs.end()

    def init_metrics(self, model: Any) -> None:
        """Learn which network this validation calls."""
        self._flash_graphs.begin(self, model)
        super().init_metrics(model)

    def preprocess(self, batch: Any) -> Any:
        """Let the forward of the batch be a replay: this is the last call before the forward."""
        batch = super().preprocess(batch)
        self._flash_graphs.before_forward(batch.get("img") if isinstance(batch, dict) else None)
        return batch

    def update_metrics(self, preds: Any, batch: Any) -> None:
        """Compare predictions and labels of a batch on the CPU, where Ultralytics' code waits for no GPU.

        The code does some 25 small operations an image, of which 8 wait. They are one product, quotient or difference
        each, which every device rounds alike.
        """
        if not self._compares_as_stock() or not preds:
            super().update_metrics(preds, batch)
            return
        counts = [len(pred["conf"]) for pred in preds]
        parts = {name: torch.cat([pred[name] for pred in preds]).cpu().split(counts) for name in preds[0]}
        here = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        device, self.device = self.device, torch.device("cpu")
        try:
            super().update_metrics(here, batch | {name: batch[name].cpu() for name in LABELS})
        finally:
            self.device = device

    def _compares_as_stock(self) -> bool:
        """Whether predictions are compared by Ultralytics' functions for boxes, which leave them as they are."""
        args, mine = self.args, super()
        return (
            self.device.type in _DEVICES
            and not (args.single_cls or args.save_json or args.save_txt or args.visualize)
            and vars(self).keys().isdisjoint(_COMPARING)
            and all(
                getattr(getattr(mine, name, None), "__func__", None) is getattr(DetectionValidator, name)
                for name in _COMPARING
            )
        )


def with_graphs(validator: Any, graphs: ValidationGraphs) -> Any:
    """Let a validator, of Ultralytics or of a user, run its network from graphs; the same object."""
    if graphs.mode != "off" and isinstance(validator, BaseValidator):
        cls: Any = type(validator)
        validator.__class__ = _validator_class(cls)
        vars(validator)["_flash_graphs"] = graphs
    return validator


@functools.lru_cache
def _validator_class(base: type) -> type:
    return base if issubclass(base, FlashValidatorMixin) else type(base.__name__, (FlashValidatorMixin, base), {})
