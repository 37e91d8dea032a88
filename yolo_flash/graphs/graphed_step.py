"""Forward and backward of a training step as CUDA graphs, replayed in the place of their Python.

A network is captured for one shape of images, with its loss if the shapes in the loss do not depend on the data. The
capture is that of `torch.cuda.make_graphed_callables`, with four differences that a trainer needs:

- gradients are copied or added to `.grad`, all in a few launches: autograd would put the memory of the graph into
  `.grad`, and the next replay would overwrite gradients that are being accumulated (pytorch issue 181723);
- the captured parameters are aliases, leaves of their own over the same memory: hooks stay with the model's parameters,
  and no gradient is accumulated on a stream of somebody else;
- a capture leaves no trace: buffers, which BatchNorm changes, and random generators are as before, to the bit;
- a replay is refused when the model is no longer the one that was captured, see `signature.py`.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree  # as torch's own graphed callables

from .signature import Signature, tensors_aside

_OUTPUT = object()  # marks the place of a tensor among the outputs
_WARM_UPS = 3  # kernels are chosen, compiled and given their workspaces before the capture


class FlashGraphError(Exception):
    """The step cannot run from CUDA graphs. Not a RuntimeError, which the trainer might take for out of memory.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"), graphs="on")
        >>> model.train(data="coco8.yaml", imgsz=32, device="cpu")
        Traceback (most recent call last):
        yolo_flash.graphs.graphed_step.FlashGraphError: ... needs an NVIDIA GPU, the device is cpu...
    """


class GraphedStep:
    """A network in training, and its loss, captured for images of one shape under the autocast of the moment.

    Attributes:
        network: What was captured.
        loss: The loss that was captured behind the network; None if a call gives the outputs of the network.
        through_autograd: Whether autograd hands gradients to the parameters one by one, for a user's own training loop
            that may ask for gradients (`torch.autograd.grad`); else they are added to `.grad` all at once.
        seconds: Duration of the capture.
        pool_bytes: Memory of the graphs, which eager work cannot use.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        loss: Callable[..., Any] | None = None,
        extra: Sequence[Tensor] = (),
        beside: Sequence[Tensor] = (),
    ) -> None:
        """Warm up and capture on these images.

        Args:
            network: Takes a tensor of images, and those beside it; parameters and buffers on a CUDA device.
            images: `[batch, channels, height, width]`, on that device.
            loss: Takes the outputs of the network and the extra tensors; never waits for the device.
            extra: Inputs of the loss, on any device; each call brings others of the same shapes.
            beside: Inputs of the network beside the images; likewise.

        Raises:
            RuntimeError: The network does something that cannot be captured, such as a synchronisation; or there is too
                little memory. The model is unchanged.
        """
        start = time.perf_counter()
        self.network, self.loss = network, loss
        self.through_autograd = False
        self._signature = Signature.of_model(network)
        self._replays = 0
        others = (tensor.to(images.device, copy=True) for tensor in (*beside, *extra))
        self._inputs = [images.detach().clone(), *others]
        self._handle = torch.zeros((), device=images.device, requires_grad=True)
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        aliases = {name: p.detach().requires_grad_() for name, p in trained}

        def forward() -> Any:
            own = 1 + len(beside)
            outputs = functional_call(network, aliases, tuple(self._inputs[:own]))
            return outputs if loss is None else loss(outputs, *self._inputs[own:])

        with torch.cuda.device(images.device), no_trace(network, images.device), without_cached_casts(images.device):
            self._warm_up(forward, list(aliases.values()))
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(images.device)
            used = self._capture(forward, list(aliases.values()))
            self.pool_bytes = torch.cuda.memory_reserved(images.device) - before
        self._read = tensors_aside(network)
        self._parameters = [p for (_, p), takes_part in zip(trained, used, strict=True) if takes_part]
        self.seconds = time.perf_counter() - start

    def __call__(self, images: Tensor, *extra: Tensor) -> Any:
        """The outputs of the network, or its loss, by replay; the backward is replayed too.

        The outputs lie in the memory of the graph: the next call overwrites them.

        Args:
            images: Of the captured shape, see `fits`.
            *extra: Inputs of the network beside the images, and then those of the loss.
        """
        # A hook on a parameter wants to see its gradient; without hooks, all gradients go to `.grad` at once.
        through = self.through_autograd or any(map(_hooked, self._parameters))
        parameters = self._parameters if through else [self._handle]
        outputs = iter(_Replay.apply(self, through, (images, *extra), *parameters))
        leaves = [next(outputs) if leaf is _OUTPUT else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)

    def fits(self, images: Tensor, *extra: Tensor) -> bool:
        """Whether images have the captured shape, dtype and device, and inputs of the loss their shapes."""
        mine = self._inputs[0]
        same = all(given.shape == held.shape for given, held in zip(extra, self._inputs[1:], strict=False))
        return same and images.shape == mine.shape and images.dtype == mine.dtype and images.device == mine.device

    def stale(self) -> bool:
        """Whether memory, modes, numbers, functions, layers or hooks of the model are not as they were captured."""
        return self._signature.changed()

    def _warm_up(self, forward: Callable[[], Any], aliases: list[Tensor]) -> None:
        self._side = torch.cuda.Stream()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                outputs = [leaf for leaf in pytree.tree_leaves(forward()) if _trains(leaf)]
                if not outputs:
                    raise RuntimeError("no output of the network depends on a trained parameter")
                gradients = [torch.zeros_like(output) for output in outputs]
                torch.autograd.grad(outputs, aliases, gradients, allow_unused=True)
        torch.cuda.synchronize()

    def _capture(self, forward: Callable[[], Any], aliases: list[Tensor]) -> list[bool]:
        """Capture both directions; whether each parameter takes part in the outputs."""
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as those that pin the next batch, may make calls that a capture forbids in its thread.
        how: dict[str, Any] = {"stream": self._side, "capture_error_mode": "thread_local"}
        with torch.cuda.stream(self._side):  # restores the stream after a failed capture, which torch does not
            with torch.cuda.graph(self._forward, **how):
                captured = forward()
            self._leaves, self._structure = pytree.tree_flatten(captured)
            self.outputs = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
            self._upstream = [torch.zeros_like(o) if _trains(o) else None for o in self.outputs]
            self._zero = [True] * len(self.outputs)
            trained = [o for o in self.outputs if _trains(o)]
            given = [gradient for gradient in self._upstream if gradient is not None]
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), **how):
                gradients = torch.autograd.grad(trained, aliases, given, allow_unused=True)
        torch.cuda.synchronize()
        self._gradients = [gradient for gradient in gradients if gradient is not None]
        self.outputs = [output.detach() for output in self.outputs]  # the graph of autograd has done its work
        self._leaves = [_OUTPUT if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return [gradient is not None for gradient in gradients]

    def replay_forward(self, inputs: Sequence[Tensor]) -> int:
        """Copy the inputs and run the captured forward; returns the number of this replay."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._forward.replay()
        self._replays += 1
        return self._replays

    def replay_backward(self, number: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the captured backward.

        Args:
            number: Of the forward's replay.
            gradients: Of the outputs; None for an output that the loss does not use.

        Returns:
            Gradients of the parameters that take part, in the memory of the graph: the next call overwrites them.

        Raises:
            FlashGraphError: The forward was replayed again since, and the activations are gone.
        """
        if number != self._replays:
            raise FlashGraphError("the network was replayed again before this backward: flash.graphs=off avoids it.")
        for i, (mine, gradient) in enumerate(zip(self._upstream, gradients, strict=True)):
            if mine is None or (gradient is None and self._zero[i]):
                continue
            if gradient is None:
                mine.zero_()
            else:
                mine.copy_(gradient)
            self._zero[i] = gradient is None
        self._backward.replay()
        return self._gradients

    def accumulate(self, gradients: Sequence[Tensor]) -> None:
        """Add gradients to `.grad` of the parameters that take part, as autograd does."""
        pairs = list(zip(self._parameters, gradients, strict=True))
        sums = [(p.grad, gradient) for p, gradient in pairs if p.grad is not None]
        fresh = [(p, gradient) for p, gradient in pairs if p.grad is None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [gradient for _, gradient in sums])
        if fresh:
            for (p, _), copy in zip(fresh, _copies([gradient for _, gradient in fresh]), strict=True):
                p.grad = copy


class _Replay(torch.autograd.Function):
    """A graphed step as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, step: GraphedStep, through: bool, inputs: Sequence[Tensor], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.through, ctx.number = step, through, step.replay_forward(inputs)
        ctx.set_materialize_grads(False)
        outputs = tuple(output.detach() for output in step.outputs)
        still = [output for output, gradient in zip(outputs, step._upstream, strict=True) if gradient is None]
        ctx.mark_non_differentiable(*still)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FlashGraphError(
                "a step from CUDA graphs has no gradient of its gradient (create_graph=True): flash.graphs=off has."
            )
        step, ctx.step = ctx.step, None  # the trainer keeps its last loss, and so this node: the graphs shall be free
        if step is None:
            raise FlashGraphError("the network was differentiated twice: flash.graphs=off avoids it.")
        found = step.replay_backward(ctx.number, gradients)
        if ctx.through:
            return None, None, None, *_copies(found)
        step.accumulate(found)
        return None, None, None, None


def _copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_mul(list(tensors), 1.0)  # in a few launches


def _hooked(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


class EarlyCopy:
    """A copy of scalars to the CPU that waits for the work in the stream by now, not for work that comes later."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        """Begin the copy of scalars for which `possible` is true."""
        self._names = list(values)
        self._copy = torch.stack([value.detach() for value in values.values()]).to("cpu", non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    @staticmethod
    def possible(values: Any) -> bool:
        """Whether the values are scalars on one device, of one dtype."""
        tensors = list(values.values()) if isinstance(values, dict) else []
        plain = all(isinstance(value, Tensor) and value.is_cuda and not value.ndim for value in tensors)
        return plain and len({(value.device, value.dtype) for value in tensors}) == 1

    def read(self) -> dict[str, Tensor]:
        """The values; waits for the copy."""
        self._done.synchronize()
        return dict(zip(self._names, self._copy, strict=True))


def _trains(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


@contextlib.contextmanager
def no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers and the random generators of the CPU and the device as they were, to the bit."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), mended_generator(device):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)


@contextlib.contextmanager
def mended_generator(device: torch.device) -> Iterator[None]:
    """Keep the device's random generator usable after a failed capture, which leaves the generator in capture mode."""
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        raise


def without_cached_casts(device: torch.device) -> Any:
    """The autocast of the moment without its cache: a capture would hold cached casts of weights as constants."""
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
