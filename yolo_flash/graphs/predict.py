"""Prediction from CUDA graphs: the network of Ultralytics' predictor, captured for image shapes that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from ultralytics.utils import LOGGER

from ..utils.errors import first_line
from ..utils.numerics import relative_error
from .graphed_step import mended_generator
from .signature import Signature, has_hooks, plain_values, tensors_aside

_KEPT = 4  # graphs at once, those used last: each holds the memory of a forward
_CAPTURES = 2 * _KEPT  # at most: shapes that take turns would be captured in every call
_ERROR = 1e-3  # of a replay against the network itself; 0 where both choose the same kernels


class PredictGraphs:
    """Graphs of one network in inference, by the shape of the images; a shape is captured when it comes a second time.

    Attributes:
        why_not: Why nothing is captured any more; empty as long as shapes are captured.
    """

    def __init__(self, capture: Callable[..., CapturedForward] | None = None) -> None:
        """Start without graphs; `capture` makes that of a network for images, `CapturedForward` by default."""
        self.why_not = ""
        self._capture = capture or CapturedForward
        self._captures = 0
        self._seen: set[Any] = set()
        self._graphs: OrderedDict[Any, CapturedForward] = OrderedDict()
        self._network: nn.Module | None = None  # which the graphs were captured of
        self._signature: Signature | None = None

    def __call__(self, network: nn.Module, images: Tensor) -> Any:
        """The outputs of the network, by replay where there is a graph."""
        inner = _model_of(network)
        if self._graphs and (inner is not self._network or self._signature is None or self._signature.changed()):
            self._graphs.clear()  # of other weights, classes, precision or hooks: shapes may be captured anew
        key = (*images.shape, images.dtype, images.device, *plain_values(_head_of(inner)))
        graph = self._graphs.get(key)
        if graph is None and not self.why_not:
            if key in self._seen:
                graph = self._add(key, network, inner, images)
            elif len(self._seen) < 1024:  # a folder may have images of all shapes
                self._seen.add(key)
        if graph is None:
            return network(images)
        self._graphs.move_to_end(key)
        return graph(images)

    def _add(self, key: Any, network: nn.Module, inner: nn.Module, images: Tensor) -> CapturedForward | None:
        if any(map(has_hooks, inner.modules())):  # such as a tracker's, which reads features
            return None
        if self._captures >= _CAPTURES:  # shapes or weights change all the time
            self.why_not = f"{self._captures} captures have been made: those {len(self._graphs)} that are held stay"
            LOGGER.info(f"yolo-flash: no more CUDA graphs for prediction: {self.why_not}")
            return None
        self._captures += 1
        try:
            graph = self._capture(network, images)
            found, wanted = (
                [leaf for leaf in pytree.tree_leaves(run(images)) if isinstance(leaf, Tensor)]
                for run in (graph, network)
            )
            off = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
            if not off <= _ERROR:
                raise ValueError(f"a replay is off by {off:.1e}")
        except Exception as error:
            self.why_not = first_line(error)
            self._graphs.clear()
            LOGGER.warning(f"yolo-flash: prediction goes on without CUDA graphs: {self.why_not}")
            return None
        if not self._graphs:
            self._network, self._signature = inner, Signature.of_model(inner, apart=_head_of(inner))
        self._graphs[key] = graph
        if len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)
        return graph


class CapturedForward:
    """A network's forward in inference, for images of one shape."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        """Warm up and capture.

        Raises:
            RuntimeError: The network does something that cannot be captured.
        """
        self._images = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.device(images.device), mended_generator(images.device), torch.cuda.stream(side):
            for _ in range(3):
                network(self._images)
            side.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._outputs = network(self._images)
        self._read = tensors_aside(_model_of(network))

    def __call__(self, images: Tensor) -> Any:
        """The outputs for images of the captured shape, in memory of their own."""
        self._images.copy_(images)
        self._graph.replay()
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._outputs)


def _model_of(network: Any) -> nn.Module:
    """The model in Ultralytics' AutoBackend, of which the model is no submodule; any other network itself."""
    model = getattr(network, "model", None)
    return model if isinstance(model, nn.Module) else network


def _head_of(model: Any) -> Any:
    """A YOLO's head, whose settings such as `max_det` a call of `predict` may set; any other model itself."""
    layers = getattr(model, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) else model
