"""Attention of packages that a user may have installed, each as a torch operator `yolo_flash::NAME` with a backward.

The packages' low-level functions are called: forward and backward without autograd graphs of their own. Nothing is
imported before the first call, or before `load`. Each kernel sees what it is given: queries, keys and values
`[batch, seq_len, num_heads, channels]` of any strides that are multiples of 8 but unit last, which no package copies,
and gradients that it writes in place, such as slices of one packed tensor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import call


class Package(NamedTuple):
    """What is called of a package.

    Attributes:
        module: What is imported.
        functions: What it must have, of the module, or of `torch.ops` where its operators lie there.
        operators: Namespace in `torch.ops` that the import fills, or empty.
        forward: `(functions, q, k, v, scale) -> (out, lse)`, the logarithm of the sum of the weights being
            `[batch, num_heads, seq_len]` in float32.
        backward: `(functions, dout, q, k, v, out, lse, dq, dk, dv, scale, deterministic)`, writes dq, dk and dv.
    """

    module: str
    functions: tuple[str, str]
    operators: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., None]


# What each package wants ----------------------------------------------------------------------------------------------
_FA2_PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _fa2(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module._flash_attn_forward(q, k, v, softmax_scale=scale, return_softmax=False, **_FA2_PLAIN)
    return out, lse


def _fa2_backward(module: Any, *tensors: Tensor, scale: float, deterministic: bool) -> None:
    module._flash_attn_backward(*tensors, softmax_scale=scale, deterministic=deterministic, **_FA2_PLAIN)


def _fa3(operators: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = operators.fwd(q, k, v, softmax_scale=scale, num_splits=1)
    return out, lse


def _fa3_backward(operators: Any, *tensors: Tensor, scale: float, deterministic: bool) -> None:
    operators.bwd(*tensors, softmax_scale=scale, deterministic=deterministic)


def _fa4(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return out, lse


def _fa4_backward(module: Any, *tensors: Tensor, scale: float, deterministic: bool) -> None:
    dout, q, k, v, out, lse, dq, dk, dv = tensors
    grads = {"dq": dq, "dk": dk, "dv": dv}
    module._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, deterministic=deterministic, **grads)


def _xformers(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = module.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out, lse[..., : q.shape[1]].contiguous()  # CUTLASS' kernel pads it to a multiple of 32


def _xformers_backward(module: Any, *tensors: Tensor, scale: float, deterministic: bool) -> None:
    """It chooses by torch's own switch what is deterministic, and allocates the gradients."""
    dout, q, k, v, out, lse, *given = tensors
    grads = module.memory_efficient_attention_backward(dout, out, lse, q, k, v, scale=scale)
    for mine, grad in zip(given, grads, strict=True):
        mine.copy_(grad)


PACKAGES = {
    "flash_attn_2": Package(
        "flash_attn.flash_attn_interface", ("_flash_attn_forward", "_flash_attn_backward"), "", _fa2, _fa2_backward
    ),
    # Its operators, and not torch's `activate_flash_attention_impl("FA3")`, which sets them for the whole process.
    "flash_attn_3": Package("flash_attn_3._C", ("fwd", "bwd"), "flash_attn_3", _fa3, _fa3_backward),
    # The two functions that torch's own `activate_flash_attention_impl("FA4")` calls.
    "flash_attn_4": Package(
        "flash_attn.cute.interface", ("_flash_attn_fwd", "_flash_attn_bwd"), "", _fa4, _fa4_backward
    ),
    "xformers": Package(
        "xformers.ops.fmha",
        ("memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward"),
        "",
        _xformers,
        _xformers_backward,
    ),
}


@functools.cache
def load(name: str) -> Any:
    """Import a package, and give what has its functions.

    Raises:
        ImportError: It has not the functions that are called, or could not load its kernels.
        Exception: Whatever its import raises.
    """
    module, functions, operators, *_ = PACKAGES[name]
    found = importlib.import_module(module)
    own = sys.modules.get(f"{module.partition('.')[0]}._cpp_lib")  # xformers keeps this error, and imports all the same
    if error := getattr(own, "_cpp_library_load_exception", None):
        raise ImportError(" ".join(str(error).split())) from error
    if operators:
        found = getattr(torch.ops, operators)
    for function in functions:
        if not hasattr(found, function):
            raise ImportError(f"{module} has no {function}")
    return found


# Operators ------------------------------------------------------------------------------------------------------------
_library = torch.library.Library("yolo_flash", "FRAGMENT")


def _define(name: str) -> None:
    """The operators of a package: with fake kernels for torch.compile, and an autograd formula."""
    package = PACKAGES[name]
    _library.define(f"{name}(Tensor q, Tensor k, Tensor v, float scale, bool deterministic) -> (Tensor, Tensor)")
    _library.define(
        f"{name}_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, "
        f"Tensor(b!) dk, Tensor(c!) dv, float scale, bool deterministic) -> ()"
    )

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
        with _on(q.device):
            out, lse = package.forward(load(name), q, k, v, scale)
        return out.contiguous(), lse

    def backward(*tensors: Any) -> None:
        *given, scale, deterministic = tensors
        with _on(given[0].device):
            package.backward(load(name), *given, scale=scale, deterministic=deterministic)

    def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
        batch, seq_len, num_heads, _ = q.shape
        lse = q.new_empty((batch, num_heads, seq_len), dtype=torch.float32)
        return q.new_empty((batch, seq_len, num_heads, v.shape[-1])), lse

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *qkv, ctx.scale, ctx.deterministic = inputs
        ctx.save_for_backward(*qkv, *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{name} has no gradient of its gradient (create_graph=True); flash.backend=sdpa_math has one."
            )
        *qkv, out, lse = ctx.saved_tensors
        grads = [t.new_empty(t.shape) for t in qkv]
        call(f"{name}_backward", dout.contiguous(), *qkv, out, lse, *grads, ctx.scale, ctx.deterministic)
        return *grads, None, None

    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"yolo_flash::{name}", outputs, lib=_library)
    torch.library.register_fake(f"yolo_flash::{name}_backward", lambda *tensors: None, lib=_library)
    torch.library.register_autograd(f"yolo_flash::{name}", differentiate, setup_context=save, lib=_library)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device as the current one: flash-attn-4 looks at, and launches on, that one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


for _name in PACKAGES:
    _define(_name)
