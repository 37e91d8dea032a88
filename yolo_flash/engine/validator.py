"""A mixin for Ultralytics' validators: the network runs from CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import LOGGER, RANK

from ..graphs.validation import ValidationGraphs
from ..utils.errors import is_out_of_memory


class FlashValidatorMixin(BaseValidator):
    """First base of a class generated for each validator class, see `with_graphs`."""

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
