"""Patch the attention blocks of a module in place, and undo it: an instance only changes its class."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Mapping

import torch
import ultralytics
from torch import nn
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import LOGGER

from ..backends.registry import BackendNotSupportedError, check_name, is_approximate
from ..checkpoints.authors import is_authors
from ..config import FlashConfig, FlashConfigError
from ..dispatch.dispatcher import Dispatcher
from .blocks import FlashAAttn, FlashAttention, FlashBlock, unknown_block
from .class_swap import become, restore
from .equivalence import why_not_equal
from .multihead import FlashMultiheadAttention, unread_weights
from .shapes import layer_inputs

BLOCKS: dict[type, type[FlashBlock]] = {
    cls._stock: cls for cls in (FlashAAttn, FlashAttention, FlashMultiheadAttention)
}


_SIDE = 1024  # pixels: a multiple of every stride


def without_known_blocks(name: str) -> str:
    """The sentence about a model that has nothing to patch."""
    families = "YOLOv10, YOLO11, YOLO12, YOLO26 or RT-DETR"
    return f"{name} has no attention layer that the plugin knows (of {families})"


def known_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> attention block of a class that we take over, or patched, in the order of the model.

    Subclasses by users are not ours. An `nn.MultiheadAttention` is ours where no caller reads its attention weights.

    A student under distillation keeps the names that it has alone; its teacher's begin with `teacher_model.`.
    """
    unread = unread_weights(module)
    return {
        name.removeprefix("student_model."): block
        for name, block in module.named_modules()
        if isinstance(block, FlashBlock)
        or (id(block) in unread if type(block) is nn.MultiheadAttention else type(block) in BLOCKS)
    }


def targets(module: nn.Module) -> dict[str, nn.Module]:
    """The known blocks that are patched or can be, since they compute what ours compute."""
    return {name: block for name, block in known_blocks(module).items() if not _strangeness(block)}


def _strangeness(block: nn.Module) -> str:
    """Why a block has to stay stock; empty if it has not."""
    if isinstance(block, FlashBlock):
        return block.why_stock()
    if is_authors(block):
        return (
            "it has the layout of YOLOv12's authors (qk and v instead of qkv), which Ultralytics cannot run; "
            "`yolo-flash convert FILE.pt` writes a checkpoint that it can"
        )
    return why_not_equal(block, BLOCKS[type(block)])


def patch_modules(module: nn.Module, config: FlashConfig, dispatcher: Dispatcher | None = None) -> Dispatcher:
    """Swap every attention block of `module` for ours, or give patched ones new settings.

    Args:
        module: Any module; blocks are found at every depth.
        config: The settings.
        dispatcher: Share the decisions of another patched module with the same settings.

    Returns:
        What the patched blocks share.

    Raises:
        BackendNotSupportedError: A backend name that does not exist, or of a block that has to stay stock.
        FlashConfigError: A pattern in `layers` that matches no layer, or a window in pixels in a part of a model.
    """
    choices = layer_choices(module, config)
    windows = layer_windows(module, config, choices)
    blocks = targets(module)
    _tell_strangers(known_blocks(module))
    dispatcher = dispatcher or Dispatcher(config)
    unpatch_modules(module)  # blocks that were changed since have to stay stock now
    for name, block in blocks.items():
        cls = BLOCKS[type(block)]
        own = {"layer": name, "choice": choices[name], "window": windows.get(name)}
        become(block, cls, **own, dispatcher=dispatcher, verdict=(cls.code(), ""))
    return dispatcher


def unpatch_modules(module: nn.Module) -> None:
    """Give every patched block its stock class back; stock ones are left alone."""
    for block in known_blocks(module).values():
        if isinstance(block, FlashBlock):
            restore(block)


def layer_choices(module: nn.Module, config: FlashConfig) -> dict[str, str]:
    """Layer name -> `auto` or a backend's name, for all known blocks.

    Raises:
        BackendNotSupportedError: A backend name that does not exist, or of a block that has to stay stock.
        FlashConfigError: A pattern in `layers` that matches no layer, with the layers that there are.
    """
    blocks = known_blocks(module)
    choices = dict.fromkeys(blocks, check_name(config.backend))
    for pattern, choice in config.layers.items():
        matching = [name for name in blocks if fnmatch.fnmatchcase(name, pattern)]
        if blocks and not matching:
            raise FlashConfigError(
                f"flash.layers: {pattern!r} matches no attention layer. This model has {', '.join(blocks)}."
            )
        choices.update(dict.fromkeys(matching, check_name(choice)))
    for name, choice in choices.items():
        if choice not in ("auto", "stock") and (reason := _strangeness(blocks[name])):
            raise BackendNotSupportedError(unknown_block(blocks[name], name, choice, reason))
    return choices


def layer_windows(module: nn.Module, config: FlashConfig, choices: Mapping[str, str]) -> dict[str, int]:
    """Layer name -> side of its window in tokens, for the layers whose backend is approximate.

    Args:
        module: Patched or stock.
        config: The settings.
        choices: What `layer_choices` gave.

    Raises:
        FlashConfigError: The window is in pixels, and the module is no whole model, which alone tells the strides.
    """
    # Queries of nn.MultiheadAttention have no place in an image: there the backend refuses.
    wanted = [
        name
        for name, block in known_blocks(module).items()
        if is_approximate(choices[name]) and not isinstance(block, nn.MultiheadAttention)
    ]
    strides: dict[str, int] = {}
    whole = isinstance(getattr(module, "student_model", module), BaseModel)  # else it takes something else than images
    if wanted and whole and isinstance(config.window, str):
        with contextlib.suppress(Exception):  # of a model that cannot run on the meta device
            inputs = layer_inputs(module, targets(module), 1, _SIDE, _SIDE)
            strides = {name: _SIDE // found.grid[0] for name, found in inputs.items() if found.grid}
    return {name: config.window_tokens(strides.get(name)) for name in wanted}


def _tell_strangers(blocks: Mapping[str, nn.Module]) -> None:
    """One log line, once a process, for all known blocks that stay stock."""
    strangers = {name: reason for name, block in blocks.items() if (reason := _strangeness(block))}
    if not strangers:
        return
    name, reason = next(iter(strangers.items()))
    others = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
    if is_authors(blocks[name]):
        _warn_once(f"yolo-flash: {name}{others} will fail: {reason}.")
        return
    _warn_once(
        f"yolo-flash: stock attention stays in {name}{others}: this {blocks[name].__class__.__name__} "
        f"(ultralytics {ultralytics.__version__}, torch {torch.__version__}) is not the one that this version knows: "
        f"{reason}. All else works; a newer yolo-flash may know it."
    )


@functools.cache
def _warn_once(line: str) -> None:
    LOGGER.warning(line)
