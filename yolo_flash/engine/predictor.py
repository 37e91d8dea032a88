"""A mixin for Ultralytics' predictors: the network runs from CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from ultralytics.engine.predictor import BasePredictor
from ultralytics.utils import LOGGER

from ..graphs.predict import PredictGraphs


class FlashPredictorMixin(BasePredictor):
    """First base of a class generated for each predictor class, see `predictor_class`."""

    _flash_graphs: PredictGraphs

    def setup_model(self, *args: Any, **kwargs: Any) -> None:
        """Drop the graphs of the network before."""
        self._flash_graphs = PredictGraphs()
        super().setup_model(*args, **kwargs)

    def inference(self, im: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Replay plain forwards of a PyTorch model on a GPU; run all others as the predictor does."""
        model: Any = self.model
        special = args or kwargs or self.args.augment or self.args.embed or self.args.visualize
        if special or not _has_graphs(im) or getattr(model, "format", "") != "pt":
            return super().inference(im, *args, **kwargs)
        return self._flash_graphs(model, im)


def _has_graphs(images: Tensor) -> bool:
    return images.is_cuda and not torch.version.hip


@functools.lru_cache
def predictor_class(base: type) -> type:
    """Our predictor on top of `base`, of Ultralytics or of a user; `base` itself if it overrides `inference`."""
    if issubclass(base, FlashPredictorMixin):
        return base
    if getattr(base, "inference", None) is not BasePredictor.inference:
        LOGGER.warning(f"yolo-flash: {base.__name__} has an inference of its own, which runs without CUDA graphs.")
        return base
    return type(base.__name__, (FlashPredictorMixin, base), {})
