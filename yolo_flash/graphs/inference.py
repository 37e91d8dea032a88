"""A network's forward from CUDA graphs, for image shapes that come again: what validation and prediction share."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ..utils.errors import first_line, is_out_of_memory
from ..utils.memory import readable
from ..utils.numerics import relative_error
from ..utils.timing import clock_ms
from .graphed_step import mended_generator, without_cached_casts
from .signature import Signature, has_hooks, plain_values, tensors_aside

_SHAPES = 32  # captured at most; rectangular batches have some 15
_CHANGES = 3  # of the network, after which nothing is captured any more
_GAIN = 1.05  # below it a graph does not pay for its memory
_WARM_UPS = 3  # kernels are chosen, compiled, measured and given their workspaces before the capture
_SELDOM = "a shape that has come too seldom"
_NO_GAIN = "a batch of a size at which graphs gain nothing"
UNREMARKABLE = frozenset({_SELDOM, _NO_GAIN})  # outcomes that need no line in the log


class InferenceGraphs:
    """Graphs of one network in inference, by the shape of the images; a shape is captured when it comes a second time.

    A graph stays as long as the network does: shapes that take turns would drive each other out, and every batch would
    be a capture. A replay gives the bits that the network gives, or no graph is used.

    Attributes:
        beside: Bytes that other work of this process has to find free beside the graphs.
        held: Bytes that the graphs hold.
        first: What the first of the graphs is of, for the log; empty before there was one.
        why_not: Why no more shapes are captured; empty as long as they are.
        outcome: Why the last call was no replay; empty if it was one.
    """

    held: int
    first: str
    why_not: str
    outcome: str
    _graphs: dict[Any, CapturedForward]
    _network: nn.Module | None  # which the graphs were captured of
    _signature: Signature | None

    def __init__(self, pays: bool = False, capture: Callable[..., CapturedForward] | None = None) -> None:
        """Start without graphs.

        Args:
            pays: Keep a graph only if it is measured to be 5 % faster, and capture further shapes only once they have
                come so often that their forwards might have paid for the capture.
            capture: Makes the graph of a network for images, beside an earlier one; `CapturedForward` by default.
        """
        self._pays = pays
        self._capture = capture or CapturedForward
        self.beside = 0
        self.release()

    def release(self) -> None:
        """Free the graphs, and forget what there was."""
        self.why_not = self.outcome = self.first = ""
        self._changes = 0
        self._sights: Counter[Any] = Counter()
        self._sights_needed = 2
        self._too_large = math.inf  # pixels of a batch from which on a graph was seen to gain nothing
        self._drop()

    def __len__(self) -> int:
        """How many shapes are captured."""
        return len(self._graphs)

    def __call__(self, network: nn.Module, images: Tensor) -> Any:
        """The outputs of the network, by replay where there is a graph."""
        inner = model_of(network)
        if self._graphs and (inner is not self._network or self._signature is None or self._signature.changed()):
            self._drop()  # of other weights, classes, precision or hooks: shapes may be captured anew
            self._changes += 1
            if self._changes >= _CHANGES:
                self.why_not = f"the network changed {self._changes} times since it was captured"
        graph = self._graph(network, inner, images)
        return network(images) if graph is None else graph(images)

    def _graph(self, network: nn.Module, inner: nn.Module, images: Tensor) -> CapturedForward | None:
        """The graph for images, captured now if it is time; None, with the outcome, where the network has to run."""
        where = images.dtype, images.device, torch.is_inference_mode_enabled()
        key = (*images.shape, images.stride(), *where, *plain_values(_head_of(inner)))
        graph = self._graphs.get(key)
        self.outcome = ""
        if graph is not None:
            return graph
        if key in self._sights or len(self._sights) < 1024:  # a folder may have images of all shapes
            self._sights[key] += 1
        if self.why_not:
            self.outcome = self.why_not
        elif images.numel() >= self._too_large:
            self.outcome = _NO_GAIN
        elif self._sights[key] < self._sights_needed:
            self.outcome = _SELDOM
        elif any(map(has_hooks, inner.modules())):  # such as a tracker's, which reads features
            self.outcome = "a hook on the network would not be called"
        elif any(isinstance(module, _NormBase) and module.training for module in inner.modules()):
            self.outcome = "a normalisation in training mode counts every forward, those of a capture too"
        elif len(self._graphs) >= _SHAPES:
            self.outcome = self.why_not = f"{_SHAPES} shapes are captured"
        else:
            try:
                graph = self._captured(network, images)
            except Exception as error:  # whatever it is, the network can run without
                short = "there is too little memory for them: " if is_out_of_memory(error) else ""
                self.outcome = self.why_not = short + first_line(error)
                self._drop()
        if graph is not None:
            if not self._graphs:
                self._network, self._signature = inner, Signature.of_model(inner, apart=_head_of(inner))
            self._graphs[key] = graph
        return graph

    def _captured(self, network: nn.Module, images: Tensor) -> CapturedForward | None:
        """A new graph; None, with the outcome, if memory is too short for it or it gains nothing."""
        start = time.perf_counter()
        graph = self._capture(network, images, next(iter(self._graphs.values()), None))
        held = self.held + graph.held
        if self._graphs:  # what it has grown by stays in their memory, whatever becomes of it
            self.held = held
        if graph.room < (needed := max(held, self.beside)):
            self.outcome = self.why_not = (
                f"graphs of {len(self) + 1} shapes hold {readable(held)}, and the batches beside them need up to "
                f"{readable(needed)}, {readable(graph.room)} are free: a smaller batch would do"
            )
            return None
        runs = graph, network
        found, wanted = ([t for t in pytree.tree_leaves(run(images)) if isinstance(t, Tensor)] for run in runs)
        off = max((_error(*pair) for pair in zip(found, wanted, strict=True)), default=0.0)
        if off != 0:  # or NaN
            raise ValueError(f"a replay is off by {off:.1e}")
        what = " x ".join(map(str, images.shape))
        if self._pays:
            del found, wanted
            replayed, eager = (_milliseconds(run, images) for run in runs)
            if eager < _GAIN * replayed:
                self._too_large = images.numel()
                self.outcome = f"a forward of {what} takes {replayed:.1f} ms from a graph and {eager:.1f} without"
                return None
            milliseconds = (time.perf_counter() - start) * 1e3
            self._sights_needed = max(2, math.ceil(milliseconds / (eager - replayed)))
            what += f" in {replayed:.1f} ms instead of {eager:.1f} ({eager / replayed:.2f}x)"
        self.held, self.first = held, self.first or what
        return graph

    def _drop(self) -> None:
        self._graphs, self._network, self._signature, self.held = {}, None, None, 0


class CapturedForward:
    """A network's forward in inference, for images of one shape, under the autocast of the moment.

    Graphs of a network share the memory of what is computed on the way: they never run at the same time, and the
    outputs, which the replay of another one may overwrite, are copied right behind the replay.

    Attributes:
        held: Bytes by which the memory of this process has grown.
        room: Bytes that the device had free after the capture, when nothing was in torch's cache.
    """

    held: int
    room: int

    def __init__(self, network: nn.Module, images: Tensor, earlier: CapturedForward | None = None) -> None:
        """Warm up and capture, in the memory and stream of an `earlier` graph of the network.

        Raises:
            RuntimeError: The network does something that cannot be captured; or there is too little memory.
        """
        device, inner = images.device, model_of(network)
        self._stream: Any = earlier._stream if earlier else torch.cuda.Stream(device)  # by which a pool keeps memory
        pool = earlier._graph.pool() if earlier else None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        with torch.inference_mode(False):  # else no replay could write into it outside of that mode
            self._images = torch.empty_like(images)
        self._images.copy_(images)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with (
            torch.cuda.device(device),
            mended_generator(device),
            torch.cuda.stream(self._stream),  # restores the stream after a capture that failed, which torch does not
            without_cached_casts(device),
        ):
            for _ in range(_WARM_UPS):
                network(self._images)
            self._stream.synchronize()
            self._read = tensors_aside(inner)
            self._graph: Any = torch.cuda.CUDAGraph()
            how: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._graph, pool=pool, **how):
                self._outputs = network(self._images)
        if [*map(id, self._read)] != [*map(id, tensors_aside(inner))]:
            raise RuntimeError("a module keeps a tensor of its last forward, which a replay would not renew")
        self.held = torch.cuda.memory_reserved(device) - before
        self.room = torch.cuda.mem_get_info(device)[0]

    def __call__(self, images: Tensor) -> Any:
        """The outputs for images of the captured shape, in memory of their own."""
        self._images.copy_(images)
        self._graph.replay()
        tensors = {id(leaf): leaf for leaf in pytree.tree_leaves(self._outputs) if isinstance(leaf, Tensor)}
        copies = {name: tensor.clone() for name, tensor in tensors.items()}  # one of a tensor that is there twice
        return pytree.tree_map(lambda leaf: copies.get(id(leaf), leaf), self._outputs)


def model_of(network: Any) -> nn.Module:
    """The model in Ultralytics' AutoBackend, of which the model is no submodule; any other network itself."""
    return network.model if getattr(network, "format", "") == "pt" else network


def _head_of(model: Any) -> Any:
    """A YOLO's head, whose settings such as `max_det` a call of `predict` may set; any other model itself."""
    layers = getattr(model, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) else model


def _milliseconds(run: Callable[[Tensor], Any], images: Tensor) -> float:
    return min(clock_ms(lambda: run(images), images.device) for _ in range(2))


def _error(found: Tensor, wanted: Tensor) -> float:
    """The relative error of a tensor; 0 if all numbers are the same, of which some may be NaN in half precision."""
    same = torch.equal(found, wanted) or bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())
    return 0.0 if same else relative_error(found, wanted)
