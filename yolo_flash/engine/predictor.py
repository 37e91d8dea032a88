"""A mixin for Ultralytics' predictors: the network runs from CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from ultralytics.engine.predictor import BasePredictor
from ultralytics.utils import LOGGER

from ..graphs.inference import InferenceGraphs
from ..graphs.limits import no_nvidia_gpu


class FlashPredictorMixin(BasePredictor):
    """First base of a class generated for each predictor class, see `predictor_class`."""

    _flash_graphs: InferenceGraphs
    _flash_told: str

    def setup_model(self, *args: Any, **kwargs: Any) -> None:
        """Drop the graphs of the network before."""
        self._flash_graphs, self._flash_told = InferenceGraphs(), ""
        super().setup_model(*args, **kwargs)

    def inference(self, im: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replay plain forwards of a PyTorch model on a GPU; run all others as the predictor does."""
        model: Any = self.model
        special = args or kwargs or self.args.augment or self.args.embed or self.args.visualize
        if special or no_nvidia_gpu(im.device) or getattr(model, "format", "") != "pt":
            return super().inference(im, *args, **kwargs)
        outputs = self._flash_graphs(model, im)
        if (why_not := self._flash_graphs.why_not) != self._flash_told:
            self._flash_told = why_not
            held = len(self._flash_graphs)
            LOGGER.warning(f"yolo-flash: prediction captures no more CUDA graphs, and holds {held}: {why_not}")
        return outputs


@functools.lru_cache
def predictor_class(base: type) -> type:
    """Our predictor on top of `base`, of Ultralytics or of a user; `base` itself if it overrides `inference`."""
    if issubclass(base, FlashPredictorMixin):
        return base
    if getattr(base, "inference", None) is not BasePredictor.inference:
        LOGGER.warning(f"yolo-flash: {base.__name__} has an inference of its own, which runs without CUDA graphs.")
        return base
    return type(base.__name__, (FlashPredictorMixin, base), {})
