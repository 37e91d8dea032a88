"""Patch the attention blocks of a module in place, and undo it: an instance changes its class and nothing else."""

from __future__ import annotations

import fnmatch

from torch import nn

from .backends import check_name
from .blocks import FlashAAttn, FlashAttention, FlashBlock
from .config import FlashConfig, FlashConfigError
from .multihead import FlashMultiheadAttention, unread_weights
from .runtime import Runtime
from .stock_pickle import become, restore

BLOCKS: dict[type, type[FlashBlock]] = {
    cls._stock: cls for cls in (FlashAAttn, FlashAttention, FlashMultiheadAttention)
}


def targets(module: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> attention block, stock or patched, in the order of the model. Subclasses of users are not ours.

    Of `nn.MultiheadAttention`, which is everybody's, those are ours whose weights nobody reads.

    A student under distillation keeps the names that it has alone; its teacher's begin with `teacher_model.`.
    """
    unread = unread_weights(module)
    return {
        name.removeprefix("student_model."): block
        for name, block in module.named_modules()
        if isinstance(block, FlashBlock)
        or (id(block) in unread if type(block) is nn.MultiheadAttention else type(block) in BLOCKS)
    }


def patch_modules(module: nn.Module, config: FlashConfig, runtime: Runtime | None = None) -> Runtime:
    """Swap every attention block of `module` for ours, or bring patched ones to new settings.

    Args:
        module: Any module; blocks are found at every depth.
        config: The settings.
        runtime: Share the decisions of another patched module with the same settings.

    Returns:
        What the patched blocks share.

    Raises:
        BackendNotSupportedError: A backend name that does not exist.
        FlashConfigError: A pattern in `layers` that matches no layer.
    """
    blocks = targets(module)
    choices = layer_choices(list(blocks), config)
    runtime = runtime or Runtime(config)
    for name, block in blocks.items():
        if isinstance(block, FlashBlock):
            restore(block)
        become(block, BLOCKS[type(block)], layer=name, choice=choices[name], runtime=runtime)
    return runtime


def unpatch_modules(module: nn.Module) -> None:
    """Give every patched block its stock class back; stock ones are left alone."""
    for block in targets(module).values():
        if isinstance(block, FlashBlock):
            restore(block)


def layer_choices(names: list[str], config: FlashConfig) -> dict[str, str]:
    """Layer name -> `auto` or a backend's name.

    Raises:
        BackendNotSupportedError: A backend name that does not exist.
        FlashConfigError: A pattern in `layers` that matches no layer, with the layers that there are.
    """
    choices = dict.fromkeys(names, check_name(config.backend))
    for pattern, choice in config.layers.items():
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if names and not matching:
            raise FlashConfigError(
                f"flash.layers: {pattern!r} matches no attention layer. This model has {', '.join(names)}."
            )
        choices.update(dict.fromkeys(matching, check_name(choice)))
    return choices
