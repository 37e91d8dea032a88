"""The one place that runs a backend to judge it: is it exact, how fast is it, how much memory does it take.

A backend is run in the real block (`FlashBlock` or the stock class), whose convolutions are replaced: the first gives a
tensor that is there, the positional one scales it, the last does nothing. What is timed is therefore attention with all
the layout work that the block does around it. `nn.MultiheadAttention` is in `trial_multihead.py`.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM

from . import trial_cache, trial_multihead
from .backends import BACKENDS, AttentionSpec
from .config import FlashConfig
from .guard import is_out_of_memory
from .machine import Machine, detect
from .measuring import (
    Results,
    allowed_error,
    extra_bytes,
    first_line,
    free_bytes,
    readable,
    reference,
    relative_error,
    sampler_of,
    wait,
)
from .patch import BLOCKS
from .runtime import Runtime
from .selector import Trial
from .stock_pickle import become

_SCORES_TO_CHECK = 2**22  # exactness does not depend on the number of groups: as many as make this, one at least
_SECONDS = 1.0  # spent on the samples of one backend at most, once it has two
_CPU_SECONDS, _CPU_REPEATS = 0.3, 60  # a clock among other processes needs more samples than a GPU: as many as fit
_NEW = Trial()
_PARTS = ("output", "gradient of q", "gradient of k", "gradient of v")


# The block ------------------------------------------------------------------------------------------------------------
class _Given(nn.Module):
    """In the place of the first convolution: a tensor that is there."""

    tensor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.tensor


class _Faint(nn.Module):
    """In the place of the positional convolution: v, as small as the average that attention makes of it.

    Else the values would hide the errors of attention, in the output and in the gradients.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.factor = tokens**-0.5

    def forward(self, v: Tensor) -> Tensor:
        return v * self.factor


class _Arm:
    """One backend in a block of its own, for inputs of a certain number of groups."""

    def __init__(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        self.spec, self.device = spec, device
        with torch.device("meta"):  # takes no memory and no random number
            block: Any = (
                AAttn(spec.num_heads * spec.head_dim, spec.num_heads, spec.area)
                if spec.head_dim == spec.head_dim_v
                else Attention(
                    spec.num_heads * spec.head_dim_v, spec.num_heads, (spec.head_dim + 0.5) / spec.head_dim_v
                )
            )
        block.qkv, block.pe, block.proj = _Given(), _Faint(spec.seq_len_k), nn.Identity()
        if BACKENDS[backend].forward is not None:
            runtime = Runtime(FlashConfig(backend=backend))
            become(block, BLOCKS[type(block)], layer="", choice=backend, runtime=runtime)
        self.block = block.train(spec.training)

    def call(self, image: Tensor, upstream: Tensor) -> Results:
        """`(output,)`, or `(output, gradient of the image)` when the spec trains.

        Args:
            image: What the first convolution gives, `[images, channels, height, width]`.
            upstream: Gradient of the output.
        """
        spec = self.spec
        channels = spec.num_heads * spec.head_dim_v
        leaf = image.detach().requires_grad_(spec.training)
        x = image[:, :channels].detach()  # of the block's input nothing but its shape and layout is asked
        half = spec.dtype in (torch.float16, torch.bfloat16)
        self.block.qkv.tensor = leaf
        try:
            amp = torch.autocast(self.device.type, dtype=spec.dtype if half else None, enabled=half)
            with amp, torch.set_grad_enabled(spec.training):
                out = self.block(x)
        finally:
            del self.block.qkv.tensor
        if not spec.training:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaf, upstream.to(out.dtype)))


def _image(spec: AttentionSpec, groups: int, device: torch.device, channels: int, seed: int) -> Tensor:
    """Random `[images, channels, height, width]` in the layout of a spec."""
    tokens = spec.area * spec.seq_len_k
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    source = torch.Generator(device).manual_seed(seed)  # its own: the global one stays as it is
    size = (groups // spec.area, channels, height, tokens // height)
    image = torch.randn(size, device=device, dtype=spec.dtype, generator=source)
    return image.contiguous(memory_format=torch.channels_last if spec.layout == "nhwc" else torch.contiguous_format)


def _channels(spec: AttentionSpec) -> tuple[int, int]:
    """Of the block's packed tensor, and of its output."""
    return spec.num_heads * (2 * spec.head_dim + spec.head_dim_v), spec.num_heads * spec.head_dim_v


def _arm(spec: AttentionSpec, backend: str, device: torch.device) -> Any:
    return (trial_multihead.MultiheadArm if spec.layout == "separate" else _Arm)(spec, backend, device)


def _inputs(spec: AttentionSpec, groups: int, device: torch.device) -> tuple[Any, Tensor]:
    if spec.layout == "separate":
        return trial_multihead.inputs(spec, groups, device)
    packed, out = _channels(spec)
    return _image(spec, groups, device, packed, 0), _image(spec, groups, device, out, 1)


def _exact(spec: AttentionSpec, given: Any, upstream: Tensor) -> list[Tensor]:
    """Output of the block, and the gradients of q, k and v, in high precision."""
    large = upstream.device.type == "cpu" and spec.scores // spec.batch > 2**27  # float64 would take half a minute
    dtype = torch.float32 if large else torch.float64
    if spec.layout == "separate":
        return trial_multihead.exact(spec, given, upstream, dtype)

    def grouped(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(-1, spec.seq_len_k, spec.num_heads, t.shape[1] // spec.num_heads)

    packed, dout = grouped(given), grouped(upstream)
    faint = spec.seq_len_k**-0.5
    out, grad = reference(packed, dout, dout.to(dtype) * faint, head_dim=spec.head_dim, dtype=dtype)
    out = out + packed[..., 2 * spec.head_dim :].to(dtype) * faint
    return [out, *grad.split([spec.head_dim, spec.head_dim, spec.head_dim_v], dim=-1)]


def _errors(spec: AttentionSpec, results: Results, truth: list[Tensor]) -> list[float]:
    """Relative errors of the output and, in training, of the gradients of q, k and v.

    Raises:
        ArithmeticError: A result has another shape than it should have.
    """
    dims = [[spec.head_dim_v], [spec.head_dim, spec.head_dim, spec.head_dim_v]]
    packed, out = _channels(spec)
    separate = spec.layout == "separate"
    found: list[Tensor] = trial_multihead.parts(spec, results) if separate else []
    for t, sizes, channels in zip(() if separate else results, dims, (out, packed), strict=False):
        if t.ndim != 4 or t.shape[1] != channels:
            raise ArithmeticError(f"a result has shape {list(t.shape)} where {channels} channels were expected")
        found += t.permute(0, 2, 3, 1).reshape(-1, spec.seq_len_k, spec.num_heads, sum(sizes)).split(sizes, dim=-1)
    if any(a.shape != b.shape for a, b in zip(found, truth, strict=False)):
        raise ArithmeticError("a result has another shape than the reference")
    errors = [relative_error(*pair) for pair in zip(found, truth, strict=False)]
    if spec.seq_len_k == 1:  # the gradients of q and k are zero but for rounding
        errors[1:3] = [error if math.isnan(error) else 0.0 for error in errors[1:3]]
    return errors


def measure(specs: Iterable[AttentionSpec], device: torch.device) -> dict[AttentionSpec, dict[str, Trial]]:
    """Trials of all backends that can run, from earlier runs where there are any; says how long it took. Never raises.

    Args:
        specs: The problems; equal ones are measured once.
        device: A CUDA device or a CPU; on others there is nothing to choose from, and nothing is measured.

    Returns:
        Spec -> backend -> Trial; specs that could not be measured are left out.
    """
    if device.type not in ("cuda", "cpu"):
        return {}
    start = time.perf_counter()
    machine = detect(device)
    wanted = list(dict.fromkeys(specs))
    trials: dict[AttentionSpec, dict[str, Trial]] = dict(trial_cache.load(wanted, machine))
    new = [spec for spec in wanted if spec not in trials]
    silent = not new or LOGGER.disabled  # the bar goes to standard output, where JSON may be expected
    for spec in TQDM(new, desc="yolo-flash: measuring attention", disable=silent, leave=False):
        try:
            trials[spec] = judge(spec, device, candidates(spec, machine))
            trial_cache.store({spec: trials[spec]}, machine)
        except Exception as error:
            LOGGER.warning(f"yolo-flash: {spec}: by the rules, for measuring failed: {first_line(error)}")
    if device.type == "cuda" and new:
        with contextlib.suppress(RuntimeError):  # after a fault of a kernel every call of CUDA raises
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    first = sum(trial.first_seconds for spec in new for trial in trials.get(spec, {}).values())
    if new:
        LOGGER.info(
            f"yolo-flash: measured {len(new)} attention problems in {seconds:.1f} s, {first:.1f} s of it first calls, "
            f"which compile; {len(wanted) - len(new)} were known"
        )
    elif wanted:
        LOGGER.info(f"yolo-flash: {len(wanted)} attention problems known from earlier, read in {seconds * 1e3:.0f} ms")
    return trials


def candidates(spec: AttentionSpec, machine: Machine) -> list[str]:
    """The backends worth a trial: all that can run, but torch's unfused one only where nothing fused can."""
    able = [name for name, backend in BACKENDS.items() if not backend.not_supported_reasons(spec, machine)]
    fused = any(BACKENDS[name].fused for name in able)
    return [name for name in able if name != "sdpa_math" or not fused]


# Judging --------------------------------------------------------------------------------------------------------------
def judge(spec: AttentionSpec, device: torch.device, names: Iterable[str], repeats: int = 5) -> dict[str, Trial]:
    """Run backends on a spec: exact first, then how fast and with how much memory.

    The random generator, flags of torch and the switches of its attention are left as found; of CUDA's allocator only
    the high-water mark changes. All together may use half of the memory that is free: stock attention, whose score
    matrices may need more than its share, is measured on fewer groups then, and its time scaled.

    Args:
        spec: The problem.
        device: Where to run it.
        names: Backends that can run it by their own account.
        repeats: Samples of each.

    Returns:
        Backend -> Trial. One that raised, ran out of memory or is wrong has the reason, and no time.

    Raises:
        torch.OutOfMemoryError: There is no memory for a reference to hold the backends against.
    """
    trials: dict[str, Trial] = {}
    with _as_found(spec, device):
        exact = _check(spec, device, list(names), trials)
        _time(spec, device, exact, trials, repeats)
    return trials


def _check(spec: AttentionSpec, device: torch.device, names: list[str], trials: dict[str, Trial]) -> list[str]:
    """Hold every backend against float64 on a few groups; those that are exact."""
    cap = free_bytes(device) // 4
    fitting = cap // min(_bytes_a_group(spec, name) for name in names) // spec.area
    wanted = math.ceil(_SCORES_TO_CHECK * spec.batch / spec.scores / spec.area)
    groups = min(spec.batch, max(1, min(fitting, wanted)) * spec.area)
    given, upstream = _inputs(spec, groups, device)
    truth = _exact(spec, given, upstream)
    errors: dict[str, list[float]] = {}
    for name in dict.fromkeys(["stock", *names]):  # stock is the yardstick, even if it is no candidate
        if _bytes_a_group(spec, name) * groups > cap:
            trials[name] = _too_large(spec, name, cap)
            continue
        start = time.perf_counter()
        try:
            results = _arm(spec, name, device).call(given, upstream)
            wait(device)
            seconds = time.perf_counter() - start
            errors[name] = _errors(spec, results, truth)
        except Exception as error:  # a kernel raises whatever it likes
            trials[name] = _failed(error)
            if name == "stock" and not trials[name].no_memory:  # without a yardstick no backend is better than another
                raise
            continue
        trials[name] = Trial(error=max(errors[name]), first_seconds=seconds)
    # Where the score matrices of stock do not fit: what is usual in this dtype, whose sums are in float32 at the least.
    usual = [max(torch.finfo(spec.dtype).eps, 4 * torch.finfo(torch.float32).eps)] * len(truth)
    allowed = [allowed_error(error, spec.dtype) for error in errors.get("stock", usual)]
    exact = []
    for name in names:
        parts = zip(_PARTS, errors.get(name, ()), allowed, strict=False)
        wrong = [
            f"{part} is off by {found:.2g}, {limit:.2g} is allowed"
            for part, found, limit in parts
            if not found <= limit  # NaN too
        ]
        if wrong:
            trials[name] = replace(trials[name], why_not="wrong: " + "; ".join(wrong))
        elif name in errors:
            exact.append(name)
    if "stock" not in names:
        del trials["stock"]
    return exact


def _time(spec: AttentionSpec, device: torch.device, names: list[str], trials: dict[str, Trial], repeats: int) -> None:
    """Time the exact backends in turns, each on as many groups as its memory allows."""
    cap = free_bytes(device) // (2 * max(1, len(trials)))  # all keep their memory until all are timed
    samplers: dict[str, Callable[[], float]] = {}
    scales: dict[str, float] = {}
    for name in names:
        groups = min(spec.batch, cap // _bytes_a_group(spec, name))
        if device.type == "cpu":  # which has no use for many groups, but minutes of work with them
            groups = min(groups, max(spec.area, _SCORES_TO_CHECK * spec.batch // spec.scores))
        groups = groups // spec.area * spec.area
        if not groups:
            trials[name] = _too_large(spec, name, cap, trials[name])
            continue
        try:
            call = _bound(_arm(spec, name, device), *_inputs(spec, groups, device))
            call()
            extra = extra_bytes(call, device)
            samplers[name], method = sampler_of(call, device)
        except Exception as error:
            trials[name] = _failed(error, trials[name])
            continue
        scales[name] = spec.batch / groups
        trials[name] = replace(
            trials[name],
            extra_bytes=None if extra is None else round(extra * scales[name]),
            note=f"measured on {groups} of {spec.batch} groups" if groups < spec.batch else "",
            method=method,
        )
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(_CPU_REPEATS if device.type == "cpu" else repeats):
        for name, sample in list(samplers.items()):
            mine = samples[name]
            budget = _SECONDS if len(mine) < repeats else _CPU_SECONDS
            if len(mine) >= 2 and sum(mine) >= budget * 1e3:
                continue
            try:
                mine.append(sample())
            except Exception as error:  # late, but no reason to lose the others
                trials[name] = _failed(error, trials[name])
                del samplers[name]
    for name in samplers:
        ms = [value * scales[name] for value in samples[name]]
        trials[name] = replace(trials[name], ms=statistics.median(ms), ms_low=min(ms), ms_high=max(ms))


def _bound(arm: Any, given: Any, upstream: Tensor) -> Callable[[], Results]:
    return lambda: arm.call(given, upstream)


def _failed(error: Exception, trial: Trial = _NEW) -> Trial:
    """The trial of a backend that raised."""
    reason = f"failed in its trial: {first_line(error)}"
    return replace(trial, why_not=reason, no_memory=is_out_of_memory(error))


def _too_large(spec: AttentionSpec, name: str, cap: int, trial: Trial = _NEW) -> Trial:
    """The trial of a backend that is not run, since it would take the memory of a model that is there."""
    need = readable(_bytes_a_group(spec, name) * spec.area)
    reason = f"not measured: one image takes about {need}, a trial may take {readable(cap)}"
    return replace(trial, why_not=reason, no_memory=True)


def _bytes_a_group(spec: AttentionSpec, name: str) -> int:
    """An upper estimate of what a backend allocates for one group."""
    packed, out = _channels(spec)
    linear = spec.seq_len_k * (packed + out) * spec.dtype.itemsize * (5 if spec.training else 3)
    if BACKENDS[name].fused:
        return linear
    return linear + spec.scores // spec.batch * (20 if spec.training else 12)


@contextlib.contextmanager
def _as_found(spec: AttentionSpec, device: torch.device) -> Iterator[None]:
    """For the time of a trial: the device, threads as Ultralytics sets them, deterministic mode as in the spec."""
    threads = torch.get_num_threads()
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    on_gpu = device.type == "cuda"
    with warnings.catch_warnings(), torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        warnings.simplefilter("ignore")  # of what is not deterministic, which is the run's concern
        torch.use_deterministic_algorithms(spec.deterministic, warn_only=True)
        if not on_gpu:
            torch.set_num_threads(NUM_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
