"""The area attention of YOLOv12's authors and that of Ultralytics: one computation, stored in two ways.

The authors' turbo release (v1.1) has a convolution `qk` whose rows are all queries and then all keys, each head after
head, a convolution `v`, and a 5x5 `pe`. Ultralytics has one convolution `qkv` whose rows are, for each head, its
queries, keys and values, and a 7x7 `pe`. Each row has its own BatchNorm channel, which moves along.

The authors' first release (v1.0) has Ultralytics' layout, with a bias in front of the BatchNorm of `pe`. Ultralytics
runs that, but a model that it builds from the YAML, as it does for every training, has no such bias and drops it. The
mean that BatchNorm subtracts takes it over.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules.block import AAttn
from ultralytics.nn.modules.conv import Conv

from .reading import CheckpointError

AUTHORS = ("qk", "v", "proj", "pe")
STOCK = ("qkv", "proj", "pe")
_ROWS = ("weight", "bias", "running_mean", "running_var")


def attention_blocks(model: nn.Module) -> dict[str, Any]:
    """Layer name -> area attention, of either layout."""
    return {name: module for name, module in model.named_modules() if type(module) is AAttn}


def is_authors(block: nn.Module) -> bool:
    """Whether a block is area attention in the authors' layout, which Ultralytics cannot run."""
    return type(block) is AAttn and "qk" in block._modules


def to_ultralytics(block: Any, layer: str) -> bool:
    """Bring a block into Ultralytics' layout, in place.

    Args:
        block: Area attention of either layout.
        layer: Its name, for messages.

    Returns:
        Whether there was anything to do.

    Raises:
        CheckpointError: The block is neither as the authors' releases have it nor as Ultralytics has it.
    """
    if not _of_authors(block, layer):
        _check(block, layer, {"qkv": 3}, pe=7)
        return _fold_bias(block.pe)
    _check(block, layer, {"qk": 2, "v": 1}, pe=5)
    for what in ("eps", "momentum", "num_batches_tracked", "track_running_stats", "affine"):
        found = [getattr(part.bn, what) for part in (block.qk, block.v)]
        if found[0] != found[1]:
            raise CheckpointError(f"{layer}: BatchNorm of qk has {what}={found[0]}, that of v {found[1]}.")
    heads = block.num_heads

    def join(qk: Tensor, v: Tensor) -> Tensor:
        q, k = qk.chunk(2)
        return torch.stack([rows.unflatten(0, (heads, -1)) for rows in (q, k, v)], 1).flatten(0, 2)

    parts = [_rows(block.qk), _rows(block.v)]
    qkv = _with_rows(block.qk, {name: join(parts[0][name], parts[1][name]) for name in parts[0]})
    _resize(block.pe, 7)
    _fold_bias(block.pe)
    _set_modules(block, {"qkv": qkv, "proj": block.proj, "pe": block.pe})
    return True


def to_authors(block: Any, layer: str) -> bool:
    """Bring a block into the authors' layout, in place; the inverse of `to_ultralytics` for blocks of v1.1.

    Args:
        block: Area attention of either layout.
        layer: Its name, for messages.

    Returns:
        Whether there was anything to do.

    Raises:
        CheckpointError: The block is neither as the authors' releases have it nor as Ultralytics has it, or its 7x7
            `pe` uses the outer ring, which the authors' 5x5 does not have.
    """
    if _of_authors(block, layer):
        return False
    _check(block, layer, {"qkv": 3}, pe=7)
    if block.pe.conv.bias is not None:
        raise CheckpointError(f"{layer}: pe has a bias, as in the authors' v1.0; their v1.1 has none.")
    outer = block.pe.conv.weight.detach().clone()
    outer[..., 1:-1, 1:-1] = 0
    if not (worst := float(outer.abs().max())) == 0:
        raise CheckpointError(
            f"{layer}: pe is 7x7 and its outer ring is used (largest value {worst:.3g}); the authors' pe is 5x5. Only "
            f"weights that were converted from theirs and not trained since can go back."
        )

    def split(rows: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.flatten(0, 1) for part in rows.unflatten(0, (block.num_heads, 3, -1)).unbind(1))
        return torch.cat([q, k]), v

    halves = {name: split(rows) for name, rows in _rows(block.qkv).items()}
    qk, v = (_with_rows(block.qkv, {name: half[i] for name, half in halves.items()}) for i in range(2))
    _resize(block.pe, 5)
    _set_modules(block, {"qk": qk, "v": v, "proj": block.proj, "pe": block.pe})
    vars(block).pop("all_head_dim", None)  # which the authors' class does not have
    return True


def _of_authors(block: Any, layer: str) -> bool:
    """Whether the convolutions of a block are the authors', and not Ultralytics'; raises where they are neither's."""
    found = set(block._modules)
    if found not in (set(AUTHORS), set(STOCK)):
        raise CheckpointError(f"{layer} has {', '.join(block._modules)}: neither {_and(AUTHORS)} nor {_and(STOCK)}.")
    return found == set(AUTHORS)


def _check(block: Any, layer: str, projections: dict[str, int], pe: int) -> None:
    """Raise unless the convolutions are those of the layout: kernel, groups, rows and what follows them.

    Args:
        block: Area attention.
        layer: Its name.
        projections: Name -> how many times the block's channels its convolution puts out.
        pe: Side of the kernel of `pe`.
    """
    heads, head_dim = getattr(block, "num_heads", None), getattr(block, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise CheckpointError(f"{layer} has no num_heads and head_dim.")
    dim = heads * head_dim
    wanted = {name: (times * dim, dim, 1, 1) for name, times in projections.items()}
    wanted |= {"proj": (dim, dim, 1, 1), "pe": (dim, 1, pe, pe)}
    for name, shape in wanted.items():
        part = block._modules[name]
        if not isinstance(part, Conv) or set(part._modules) != {"conv", "bn", "act"}:
            raise CheckpointError(f"{layer}.{name} is not a convolution with its BatchNorm: {part}.")
        conv, bn = part.conv, part.bn
        if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or type(part.act) is not nn.Identity:
            kinds = ", ".join(type(module).__name__ for module in (conv, bn, part.act))
            raise CheckpointError(f"{layer}.{name} is {kinds} instead of Conv2d, BatchNorm2d, Identity.")
        if conv.weight.shape != shape:
            raise CheckpointError(
                f"{layer}.{name} has weights of {_by(conv.weight.shape)} where {heads} heads of {head_dim} channels "
                f"have {_by(shape)}."
            )
        side, groups = shape[-1], dim if name == "pe" else 1
        found = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if found != ((1, 1), (side // 2, side // 2), (1, 1), groups):
            raise CheckpointError(f"{layer}.{name} has stride, padding, dilation, groups of {found}.")
        if (conv.bias is not None and name != "pe") or bn.running_mean is None or bn.weight is None:
            raise CheckpointError(f"{layer}.{name}: a bias, or BatchNorm without weights or statistics.")


def _rows(part: Any) -> dict[str, Tensor]:
    """The tensors of a Conv that have a row for each output channel."""
    return {"conv.weight": part.conv.weight.detach()} | {
        f"bn.{name}": getattr(part.bn, name).detach() for name in _ROWS
    }


def _with_rows(part: Any, rows: dict[str, Tensor]) -> Any:
    """A copy of a Conv with other rows, and everything else alike: mode, eps, momentum, what takes gradients."""
    new = copy.deepcopy(part)
    for name, tensor in rows.items():
        owner, leaf = name.split(".")
        _set(getattr(new, owner), leaf, tensor)
    new.conv.out_channels = new.bn.num_features = len(rows["conv.weight"])
    return new


def _set(module: Any, name: str, tensor: Tensor) -> None:
    old = getattr(module, name)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def _resize(pe: Any, side: int) -> None:
    """Zeros around the kernel, or the ring cut off."""
    ring = (side - pe.conv.weight.shape[-1]) // 2
    _set(pe.conv, "weight", F.pad(pe.conv.weight.detach(), (ring,) * 4))
    pe.conv.kernel_size, pe.conv.padding = (side, side), (side // 2, side // 2)
    pe.conv._reversed_padding_repeated_twice = [side // 2] * 4


def _fold_bias(pe: Any) -> bool:
    """Move a bias into the mean that BatchNorm subtracts; in float16 the sum is rounded once."""
    if pe.conv.bias is None:
        return False
    mean = pe.bn.running_mean
    pe.bn.running_mean = (mean.double() - pe.conv.bias.detach().double()).to(mean.dtype)
    pe.conv.bias = None
    return True


def _set_modules(block: Any, modules: dict[str, nn.Module]) -> None:
    block._modules.clear()
    block._modules.update(modules)


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _by(shape: Any) -> str:
    return "x".join(map(str, shape))
