"""Stock against ours against float64: runs of one attention block and of a whole model, and the rule that judges them.

No tolerance is absolute. Float64 is the truth; the error of stock shows what rounding does in this layer, with these
weights and images; the error of ours may be at most twice that, plus rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, RTDETRDecoder

from ..patching.multihead import denoising_mask, denoising_queries
from ..patching.patch import BLOCKS, targets
from ..utils.numerics import allowed_error, relative_error

_NOTHING = 1e-9  # a gradient that much smaller than the largest is zero but for rounding, in float64 too

Outputs = dict[str, Tensor]
Given = dict[str, Tensor]  # what reaches a block: `input`, or `query`, `key`, `value` and maybe `attn_mask`


@dataclass(frozen=True)
class Mode:
    """How a model runs: in training as its trainer does, in prediction as its predictor does.

    Attributes:
        name: `train` or `predict`.
        dtype: What convolutions compute in: by autocast in training, by the dtype of the weights in prediction.
        nhwc: Whether images and weights are channels_last.
        deterministic: Whether torch is asked for deterministic algorithms, as a trainer does by default; torch warns
            where there is none.
    """

    name: str
    dtype: torch.dtype
    nhwc: bool
    deterministic: bool = False

    @property
    def training(self) -> bool:
        """Whether BatchNorm takes the statistics of the batch, and a backward follows."""
        return self.name == "train"


@dataclass(frozen=True)
class Comparison:
    """One quantity of ours, and of stock, against float64.

    Attributes:
        what: `output`, `gradient of the input`, `gradient of qkv.conv.weight (q)`, ...
        ours: Relative error by the Frobenius norm.
        stock: The same of stock.
        allowed: What `ours` may be.
    """

    what: str
    ours: float
    stock: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether ours is as exact as stock; False where a number is not finite."""
        return self.used <= 1

    @property
    def used(self) -> float:
        """The share of the allowed error that is used; infinite where a number is not finite."""
        return self.ours / self.allowed if math.isfinite(self.ours) and math.isfinite(self.allowed) else math.inf


def compare(truth: Outputs, stock: Outputs, ours: Outputs, dtype: torch.dtype, pixels: int = 0) -> list[Comparison]:
    """Judge every quantity of `truth`.

    A gradient that is zero in exact arithmetic (of a bias in front of BatchNorm) has no relative error, and is measured
    against the largest gradient.

    Args:
        truth: Outputs in float64.
        stock: Of the stock module.
        ours: Of the patched module.
        dtype: What convolutions computed in.
        pixels: Of all images, where a single block is compared. Sums over pixels are kept in float32 at best, and in
            another order than stock's: rounding that grows with the root of their number is allowed.
    """
    largest = max((float(t.norm()) for name, t in truth.items() if name.startswith("gradient")), default=0.0)
    sums = math.sqrt(pixels) * torch.finfo(torch.float32).eps
    rows = []
    for what, wanted in truth.items():
        unit = 1.0
        if what.startswith("gradient") and float(wanted.norm()) < _NOTHING * largest:
            wanted, unit = torch.zeros_like(wanted), largest
        error, of_stock = (relative_error(outputs[what] / unit, wanted) for outputs in (ours, stock))
        rows.append(Comparison(what, error, of_stock, allowed_error(of_stock, dtype) + sums))
    return rows


def forgive_loss(rows: list[Comparison]) -> list[Comparison]:
    """Allow the loss the error of the outputs that it is made of: stock may hit that single number by luck."""
    allowed = max((row.allowed for row in rows if row.what.startswith("outputs")), default=0.0)
    return [replace(row, allowed=max(row.allowed, allowed)) if row.what == "loss" else row for row in rows]


def run_block(block: nn.Module, given: Given, upstream: Tensor, mode: Mode, *, exact: bool = False) -> Outputs:
    """Run a copy of an attention block.

    Args:
        block: Stock or patched, with float32 weights.
        given: Its input, as `block_inputs` found it in the model.
        upstream: Gradient of its output, of the same shape.
        mode: How the model runs.
        exact: In float64.

    Returns:
        The output; in training also the gradients of the input and of every parameter. Those of the rows of
        `qkv.conv.weight`, or of an in-projection, that make q, k and v stand apart: the first two are small beside the
        third.
    """
    twin: Any = _dressed(block, mode, exact)
    leaves: dict[int, Tensor] = {}  # a query that is the key stays the key
    for x in given.values():
        leaf = x.detach().clone()
        if leaf.is_floating_point():
            leaf = (leaf.double() if exact else leaf).requires_grad_(mode.training)
        leaves.setdefault(id(x), leaf)
    inputs = {name: leaves[id(x)] for name, x in given.items()}
    with _as_run(mode, upstream.device, exact):
        out = twin(**inputs)[0] if "query" in inputs else twin(inputs["input"])
        if not mode.training:
            return {"output": out}
        out.backward(upstream.to(out.dtype))
    results = {"output": out.detach()}
    results |= {f"gradient of the {name}": x.grad for name, x in inputs.items() if x.grad is not None}
    for name, parameter in twin.named_parameters():
        if name == "qkv.conv.weight":
            _, _, dim, dim_v, _ = BLOCKS[twin.__class__].problem(twin, 1, 0) or (0, 0, 0, 0, 0)
            parts = parameter.grad.unflatten(0, (twin.num_heads, -1)).split((dim, dim, dim_v), dim=1)
        elif name.startswith("in_proj_"):
            parts = parameter.grad.chunk(3)
        else:
            results |= {f"gradient of {name}": parameter.grad} if parameter.grad is not None else {}
            continue
        results |= {f"gradient of {name} ({part})": grad for part, grad in zip("qkv", parts, strict=True)}
    return results


def run_model(model: nn.Module, images: Tensor, mode: Mode, *, exact: bool = False) -> Outputs:
    """Run a copy of a whole model.

    A training step here has a loss without labels, so that every image and task will do, and a smooth one: the loss of
    a detector assigns boxes to anchors, and rounding alone can change an assignment and with it the gradients. It is
    half the squared distance of the outputs to fixed random numbers. A model is given fused for prediction, as
    Ultralytics' predictor has it, and the other arguments as to `run_block`.

    Returns:
        Every tensor of the output. In training also `loss` and `gradients`, those of all parameters in one vector. In
        prediction an end-to-end head gives all its candidates, in the order of its anchors and not of their scores.
        RT-DETR's queries too are the first of the image and not those with the best scores, which rounding would swap.
    """
    twin = _dressed(model, mode, exact)
    head = head_of(twin)
    if head is not None and not mode.training:
        head.postprocess = lambda candidates: candidates
    for decoder in twin.modules():
        if isinstance(decoder, RTDETRDecoder):
            decoder.enc_score_head.register_forward_hook(_in_order)
            decoder.postprocess = lambda boxes, scores: torch.cat([boxes, scores], dim=-1)
    dtype = torch.float64 if exact else torch.float32 if mode.training else mode.dtype
    images = images.to(dtype).contiguous(memory_format=_format(mode.nhwc and not exact))
    with _as_run(mode, images.device, exact):
        results = dict(_named_tensors(twin(images), "outputs"))
        if not mode.training:
            return results
        loss = torch.stack([_distance(out) for out in results.values()]).sum()
        loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    return {name: out.detach() for name, out in results.items()} | {"loss": loss.detach(), "gradients": gradients}


def block_inputs(model: nn.Module, images: Tensor, mode: Mode) -> dict[str, Given]:
    """Layer name -> what reaches its attention block in a forward of a copy of the stock model.

    In training, RT-DETR's decoder gets a mask as labels would give it; its first queries count as denoising ones.
    """
    seen: dict[str, Given] = {}
    masked = denoising_queries(model) if mode.training else {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            if not isinstance(module, nn.MultiheadAttention):
                seen[name] = {"input": args[0].detach().clone()}
                return
            given: Given = dict(zip(("query", "key", "value"), args, strict=False)) | keywords
            copies = {id(x): x.detach().clone() for x in given.values() if isinstance(x, Tensor)}
            seen[name] = {what: copies[id(x)] for what, x in given.items() if isinstance(x, Tensor)}
            if name in masked:
                tokens = given["query"].shape[1 if module.batch_first else 0]
                seen[name]["attn_mask"] = denoising_mask(tokens, 2 * tokens // 5, max(1, tokens // 20), images.device)

        return hook

    twin = _dressed(model, mode)
    for name, block in targets(twin).items():
        block.register_forward_pre_hook(note(name), with_kwargs=True)
    with _as_run(mode, images.device), torch.no_grad():
        twin(images.to(next(twin.parameters()).dtype).contiguous(memory_format=_format(mode.nhwc)))
    return seen


def without_attention(model: nn.Module, layer: str, images: Tensor, mode: Mode) -> Outputs:
    """`run_model` where the attention of one layer gives zero, and what the block adds to it is what it was."""
    twin = copy.deepcopy(model)
    block: Any = targets(twin)[layer]
    if isinstance(block, nn.MultiheadAttention):
        block.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]) + module.out_proj.bias, None))
        return run_model(twin, images, mode)
    kept: list[Tensor] = []
    block.pe.register_forward_hook(lambda module, args, out: kept.append(out))
    block.proj.register_forward_pre_hook(lambda module, args: (kept.pop(),))
    return run_model(twin, images, mode)


def _in_order(module: nn.Module, args: tuple[Tensor, ...], scores: Tensor) -> Tensor:
    """Scores `[batch, tokens, classes]` that fall from token to token, the same in every precision."""
    falling = torch.arange(scores.shape[1], 0, -1, device=scores.device, dtype=torch.float32) / scores.shape[1]
    return falling.to(torch.promote_types(scores.dtype, torch.float32))[None, :, None].expand_as(scores)


def _format(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format


def _dressed(module: nn.Module, mode: Mode, exact: bool = False) -> nn.Module:
    """A copy of a module as it runs in a mode."""
    twin = copy.deepcopy(module).train(mode.training).requires_grad_(mode.training)
    twin = twin.to(torch.float64 if exact else torch.float32 if mode.training else mode.dtype)
    return twin.to(memory_format=_format(mode.nhwc and not exact))


@contextlib.contextmanager
def _as_run(mode: Mode, device: torch.device, exact: bool = False) -> Iterator[None]:
    """Gradients, autocast and deterministic algorithms as a mode has them."""
    half = mode.training and not exact and mode.dtype is not torch.float32
    autocast = torch.autocast(device.type, dtype=mode.dtype if half else None, enabled=half)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.set_grad_enabled(mode.training), autocast, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not deterministic, which the plan of a run tells
        torch.use_deterministic_algorithms(mode.deterministic, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _distance(out: Tensor) -> Tensor:
    """Half the squared distance to fixed random numbers; gradients small enough for float16."""
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    return (wide - target).square().sum() / (2 * out.numel() ** 0.5)


def _named_tensors(out: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest of tuples, lists and dicts, each with its way through the nest as its name."""
    if isinstance(out, Tensor) and out.is_floating_point():
        yield name, out
    elif isinstance(out, (list, tuple, dict)):
        for key, part in out.items() if isinstance(out, dict) else enumerate(out):
            yield from _named_tensors(part, f"{name}.{key}")


def head_of(model: Any) -> Any:
    """The head of a detector and of its relatives for masks, key points and rotated boxes; else None."""
    head = getattr(model, "model", [None])[-1]
    return head if isinstance(head, Detect) else None
