"""The network's forward and backward as CUDA graphs, replayed in a training step in the place of its Python.

Captured is the network alone, for one shape of images; the loss, which has shapes of its own in every step, stays as
it is. As `torch.cuda.make_graphed_callables` does it, with four differences that a trainer needs:

- gradients are handed out as copies: `.grad` takes over what it is given, and the next replay would overwrite it while
  it is accumulated (pytorch issue 181723);
- the parameters that are captured are aliases, leaves of their own over the same memory: hooks of DDP and of users stay
  with the real ones, and no gradient is accumulated on a stream of somebody else;
- capturing leaves no trace: buffers, which BatchNorm changes, and random generators are as before, to the bit;
- a replay is refused when the model is no longer the one that was captured.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils import _pytree as pytree  # as torch's own graphed callables

_OUTPUT = object()  # the place of a tensor among what the network gives
_WARM_UPS = 3  # kernels are chosen, compiled and given their workspaces before the capture


class FlashGraphError(Exception):
    """The step cannot run from CUDA graphs. Not a RuntimeError, which the trainer might take for out of memory."""


class GraphedNetwork:
    """A network in training, captured for images of one shape, dtype and layout under the autocast of the moment.

    Attributes:
        seconds: What the capture took.
        pool_bytes: Memory that belongs to the graphs: eager work cannot use it.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        """Warm up and capture on these images.

        Args:
            model: Takes a tensor of images; parameters and buffers on a CUDA device.
            images: `[batch, channels, height, width]`, on that device.

        Raises:
            RuntimeError: The network does something that cannot be captured, such as a synchronisation; or there is too
                little memory. Nothing of the model has changed.
        """
        start = time.perf_counter()
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._modules = list(model.modules())
        self._signature = self._sign()
        self._replays = 0
        self._images = images.detach().clone()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        aliases = {name: p.detach().requires_grad_() for name, p in trained}

        def forward() -> Any:
            return functional_call(model, aliases, (self._images,))

        with torch.cuda.device(images.device), _no_trace(model, images.device), _without_cached_casts(images.device):
            self._warm_up(forward, list(aliases.values()))
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(images.device)
            used = self._capture(forward, list(aliases.values()))
            self.pool_bytes = torch.cuda.memory_reserved(images.device) - before
        self._parameters = [p for (_, p), takes_part in zip(trained, used, strict=True) if takes_part]
        self.seconds = time.perf_counter() - start

    def __call__(self, images: Tensor) -> Any:
        """What the network gives for the images, by replay; its backward is replayed too.

        The outputs are the graph's own memory: they hold until the next call.

        Args:
            images: Of the captured shape, see `fits`.
        """
        outputs = iter(_Replay.apply(self, images, *self._parameters))
        leaves = [next(outputs) if leaf is _OUTPUT else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)

    def fits(self, images: Tensor) -> bool:
        """Whether images have the shape, dtype and device that were captured."""
        mine = self._images
        return images.shape == mine.shape and images.dtype == mine.dtype and images.device == mine.device

    def stale(self, model: nn.Module | None = None) -> bool:
        """Whether the model is no longer what was captured: other memory, modes, frozen parameters, or hooks.

        Args:
            model: Given, its modules are enumerated anew too, which takes a millisecond.
        """
        if model is not None and [*map(id, model.modules())] != [*map(id, self._modules)]:
            return True
        return self._sign() != self._signature

    # Capture ----------------------------------------------------------------------------------------------------------
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
        # Other threads, which pin the memory of the next batch, may go on with what a capture forbids in its own.
        how: dict[str, Any] = {"stream": self._side, "capture_error_mode": "thread_local"}
        with torch.cuda.stream(self._side):  # gives back the stream after a capture that failed, which torch does not
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

    def _sign(self) -> list[Any]:
        """What the kernels of the graphs depend on beyond the images."""
        return [
            *((t.data_ptr(), t.requires_grad) for t in self._tensors),
            *((module.training, has_hooks(module)) for module in self._modules),
        ]

    # Replay -----------------------------------------------------------------------------------------------------------
    def replay_forward(self, images: Tensor) -> int:
        """Run the captured forward; the number of this replay."""
        self._images.copy_(images)
        self._forward.replay()
        self._replays += 1
        return self._replays

    def replay_backward(self, number: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the captured backward.

        Args:
            number: Of the replay that it belongs to.
            gradients: Of the outputs; None where the loss does not use one.

        Returns:
            Gradients of the parameters that take part, in memory of their own.

        Raises:
            FlashGraphError: The activations are gone, since the forward was replayed again.
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
        return list(torch._foreach_mul(self._gradients, 1.0))  # copies of all in a few launches


class _Replay(torch.autograd.Function):
    """The network as one node."""

    @staticmethod
    def forward(ctx: Any, network: GraphedNetwork, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.network, ctx.number = network, network.replay_forward(images)
        ctx.set_materialize_grads(False)
        outputs = tuple(output.detach() for output in network.outputs)
        still = [output for output, gradient in zip(outputs, network._upstream, strict=True) if gradient is None]
        ctx.mark_non_differentiable(*still)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.network.replay_backward(ctx.number, gradients)


def answer_once(model: Any, network: GraphedNetwork) -> None:
    """Let the next `predict` of a model of Ultralytics be a replay, and the one after it be its own again.

    On the instance, and for the length of one call: no copy, checkpoint or callback ever meets it.
    """

    def predict(x: Any, *args: Any, **kwargs: Any) -> Any:
        forget_answer(model)
        plain = isinstance(x, Tensor) and not args and not kwargs and torch.is_grad_enabled()
        return network(x) if plain and network.fits(x) else model.predict(x, *args, **kwargs)

    vars(model)["predict"] = predict


def forget_answer(model: nn.Module) -> None:
    """Undo `answer_once` where the forward never came."""
    vars(model).pop("predict", None)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called in the module's forward or backward: a replay would not call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _trains(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


@contextlib.contextmanager
def _no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and the random generators of the CPU and the device as they were, to the bit."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device]):
        try:
            yield
        except BaseException:  # a capture that failed has left the generator in its state of capturing
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)


def _without_cached_casts(device: torch.device) -> Any:
    """The autocast of the moment; weights that it has cast and kept would be captured as they are now."""
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
