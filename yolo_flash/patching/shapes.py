"""What of a model's images reaches each attention layer, from a forward that computes nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .multihead import images_and_tokens


class LayerInput(NamedTuple):
    """What reaches an attention layer: images, the tokens of each, and as how many rows and columns they lie.

    The grid is None for an `nn.MultiheadAttention`, whose queries have no place in an image.
    """

    images: int
    tokens: int
    grid: tuple[int, int] | None


class _AllSeenError(Exception):
    """Ends a forward in which every attention layer has got its input."""


def layer_inputs(model: nn.Module, layers: Iterable[str], batch: int, height: int, width: int) -> dict[str, LayerInput]:
    """What reaches the attention layers, from a forward of a copy of the model on torch's meta device.

    Beyond the Python objects of the modules, the copy takes no memory. BatchNorm statistics and random generators are
    left alone. On the meta device patched blocks run as stock.

    Args:
        model: Patched or stock.
        layers: Names of its attention layers.
        batch: Images.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Returns:
        Layers that a plain forward reaches: without labels, and so without the denoising queries of RT-DETR.
    """
    names = list(layers)
    if not names:
        return {}
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in (*model.parameters(), *model.buffers())
    }
    if (criterion := getattr(model, "criterion", None)) is not None:
        memo[id(criterion)] = None  # holds tensors of the real device and refers back to the model
    ghost: Any = copy.deepcopy(model, memo)
    seen: dict[str, LayerInput] = {}

    def note(name: str, block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        grid = None if isinstance(block, nn.MultiheadAttention) else (args[0].shape[2], args[0].shape[3])
        seen[name] = LayerInput(*images_and_tokens(block, args[0]), grid)
        if len(seen) == len(names):
            raise _AllSeenError

    for module in ghost.modules():
        if type(module) is nn.BatchNorm2d:  # which changes no shape, and takes most of the time on this device
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    for name in names:
        block = ghost.get_submodule(name)
        block.register_forward_pre_hook(partial(note, name))
    config: Any = getattr(model, "yaml", None)
    channels = config.get("channels", 3) if isinstance(config, dict) else 3
    with contextlib.suppress(_AllSeenError), torch.no_grad():
        ghost.train()(torch.empty(batch, channels, height, width, device="meta"))
    return seen
