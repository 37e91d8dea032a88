"""One verification: each attention layer alone, then the whole model, in training and in prediction."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.registry import BACKENDS, label
from ..backends.spec import AttentionSpec, Window
from ..patching.blocks import block_spec
from ..patching.fallback import FlashKernelError
from ..patching.multihead import images_and_tokens
from ..patching.patch import patch_modules, targets
from ..planning import autotune
from ..utils.numerics import relative_error
from .case import Case
from .compare import (
    Comparison,
    Given,
    Mode,
    Outputs,
    block_inputs,
    compare,
    forgive_loss,
    run_block,
    run_model,
    without_attention,
)
from .detections import compare_detections
from .executed import observe
from .report import Report

_SEEN = 10  # the outputs show a layer's attention if they change by that many times the allowed error without it


@dataclass(frozen=True)
class _Stage:
    """A mode with the models that run in it."""

    mode: Mode
    stock: nn.Module  # fused for prediction, as the predictor does
    ours: nn.Module  # the same, patched
    inputs: dict[str, Given]  # layer -> what reaches it

    def blocks(self, layer: str) -> tuple[Any, Any, AttentionSpec | None]:
        """The stock and the patched block of a layer, and the problem that it poses to the backends."""
        block: Any = targets(self.ours)[layer]
        given = self.inputs[layer]
        window = None
        if block._flash_window is not None:
            _, _, height, width = given["input"].shape
            window = Window(height, width, block._flash_window)
        spec = block_spec(
            *(block, type(block), *images_and_tokens(block, next(iter(given.values())))),
            dtype=self.mode.dtype,
            nhwc=self.mode.nhwc,
            training=self.mode.training,
            deterministic=self.mode.deterministic,
            mask="attn_mask" in given,
            window=window,
        )
        return targets(self.stock)[layer], block, spec


def run_case(case: Case) -> Report:
    """Run everything and judge it; raises as `verify` does, and OutOfMemoryError."""
    report = Report(case)
    if case.fresh:
        report.notes.append(
            "fresh weights, in which attention does not reach the outputs: a copy was verified whose BatchNorm "
            "has the statistics of these images and whose layer scales are 1"
        )
    stages = [_stage(case, mode) for mode in case.modes]
    _measure_unknown(case, stages)
    for stage in stages:
        mode, stock = stage.mode, stage.stock
        for layer in stage.inputs:
            _run_layer(report, stage, layer)
        truth = run_model(stock, case.images, mode, exact=True)
        plain = run_model(stock, case.images, mode)
        patched = run_model(stage.ours, case.images, mode)
        rows = forgive_loss(compare(truth, plain, patched, mode.dtype))
        where, judged = f"the whole model ({mode.name})", not report.approximate
        report.model += [{"mode": mode.name, **report.entry(where, row, judged)} for row in rows]
        if not mode.training:
            imgsz = case.images.shape[-1]
            report.detections = compare_detections(stock, truth, plain, patched, imgsz, mode.dtype)
            _note_unseen(report, stage, plain, rows)
    if report.detections and not report.detections.ok and not report.approximate:
        report.off.append("detections: they differ by more than rounding")
    report.off += [f"{backend} {error}" for backend, error in case.dispatcher.failed.items()]
    stock_rows = sum(entry["backend"] == "stock" for entry in report.layers)
    if not report.on_fused:
        report.off.append(_nothing_fused(case, stages))
    elif not any(entry["observed"] for entry in report.on_fused):
        report.off.append(
            "what ran could not be observed, so that nothing is proved: torch's profiler is at work elsewhere in "
            "this process, or missing from this torch"
        )
    elif stock_rows and not case.every:
        rows_here = f"{stock_rows} of {len(report.layers)} rows"
        report.notes.append(f"stock is what a run here takes in {rows_here}: all=true compares the rest too")
    return report


def _stage(case: Case, mode: Mode) -> _Stage:
    stock: Any = copy.deepcopy(case.stock)
    if not mode.training and hasattr(stock, "fuse"):
        stock = stock.fuse(verbose=False)
    ours = copy.deepcopy(stock)
    patch_modules(ours, case.config, case.dispatcher)
    return _Stage(mode, stock, ours, block_inputs(stock, case.images, mode))


def _measure_unknown(case: Case, stages: list[_Stage]) -> None:
    """Measure the specs of which nothing near was measured before, so that backends are chosen as in a run here."""
    if not case.config.autotune:
        return
    device, specs = case.images.device, []
    for stage in stages:
        for layer in stage.inputs:
            _, block, spec = stage.blocks(layer)
            if spec is None or block._flash_choice != "auto":
                continue
            if case.dispatcher.decide(spec, "auto", device).by_rules:
                specs.append(spec)
    if specs:
        case.dispatcher.learn(autotune.measure(specs, device), case.machine)


def _run_layer(report: Report, stage: _Stage, layer: str) -> None:
    """Run a layer on the backend of the plan, and with `every` on all others: an entry in `layers` each."""
    case, mode, given = report.case, stage.mode, stage.inputs[layer]
    block, patched, spec = stage.blocks(layer)
    x = next(iter(given.values()))  # the image, or the queries
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    truth = run_block(block, given, upstream, mode, exact=True)
    plain = run_block(block, given, upstream, mode)
    planned = case.dispatcher.decide(spec, patched._flash_choice, x.device).backend if spec else "stock"
    where = f"{layer} ({mode.name})"
    for backend in [planned, *(_others(case, spec, planned) if case.every else [])]:
        ours = patched
        if backend != planned:
            ours = copy.deepcopy(patched)
            ours._flash_choice = backend
        entry = {"layer": layer, "mode": mode.name, "planned": backend, "of_plan": backend == planned}
        rows: list[Comparison] = []
        windowed: list[Comparison] = []
        exact = entry["exact"] = BACKENDS[backend].exact
        try:
            found, ran = observe(partial(run_block, ours, given, upstream, mode))
            pixels = x.numel() // x.shape[1 if x.ndim == 4 else 2]
            rows = compare(truth, plain, found, mode.dtype, pixels)
            if not exact:
                windowed = _against_window(ours, given, upstream, mode, (truth, plain, found), pixels)
            entry["backend"] = _backend_that_ran(report, where, block, backend, ran)
            entry["observed"] = ran is not None
        except FlashKernelError as error:
            if backend == planned:
                raise
            report.off.append(f"{where}: {error}")
            entry["backend"], entry["observed"] = backend, False
        judged = rows if exact else windowed
        entry["ok"] = entry["backend"] == backend and bool(judged) and all(row.ok for row in judged)
        place = f"{where} on {label(backend)}" if case.every or not exact else where
        entry["compared"] = [report.entry(place, row, exact) for row in rows]
        entry["windowed"] = [report.entry(f"{place}, against its window in float64", row) for row in windowed]
        report.layers.append(entry)


def _against_window(
    block: nn.Module, given: Given, upstream: Tensor, mode: Mode, results: tuple[Outputs, ...], pixels: int
) -> list[Comparison]:
    """What an approximate backend gave, against attention within its window in float64, which the CPU computes.

    It may round as stock does: what stock is off by, of attention to all keys, is laid on attention within the window.
    """
    truth, plain, found = results
    moved: dict[int, Tensor] = {}
    inputs = {name: moved.setdefault(id(x), x.cpu()) for name, x in given.items()}
    wanted = run_block(copy.deepcopy(block).cpu(), inputs, upstream.cpu(), mode, exact=True)
    wanted = {what: t.to(truth[what]) for what, t in wanted.items()}
    rounded = {what: t + (plain[what] - truth[what]) for what, t in wanted.items()}
    return compare(wanted, rounded, found, mode.dtype, pixels)


def _backend_that_ran(report: Report, where: str, block: nn.Module, planned: str, ran: frozenset[str] | None) -> str:
    """The names of the backends that a layer ran, joined; a sentence in `off` where that is not the plan."""
    if ran is None:
        note = "what ran could not be observed: the rows name the plan"
        report.notes += [] if note in report.notes else [note]
        return planned
    if planned == "stock" and isinstance(block, nn.MultiheadAttention):
        return planned  # torch's own module, which may call any of the operators
    name = " + ".join(sorted(ran)) or "stock"
    if name != planned:
        report.off.append(f"{where}: the plan says {planned}, and {name} ran")
    return name


def _others(case: Case, spec: AttentionSpec | None, planned: str) -> list[str]:
    """The backends beside that of the plan that can run a layer, without stock, with which all are compared."""
    if spec is None:
        return []
    strict = case.config.deterministic == "strict" and spec.training
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.exact
        and name not in ("stock", planned)
        and not backend.reasons_here(spec, case.machine)
        and not (strict and not backend.reproducible(spec, case.machine))
    ]


def _nothing_fused(case: Case, stages: list[_Stage]) -> str:
    """What to type where stock was compared with stock."""
    specs = [stage.blocks(layer)[2] for stage in stages for layer in stage.inputs]
    able = [name for spec in specs for name in _others(case, spec, "") if BACKENDS[name].fused]
    batch, _, _, imgsz = case.images.shape
    found = f"nothing fused was compared: a run here takes none at imgsz={imgsz} batch={batch}"
    if not able:
        return f"{found}, since none can run on {case.machine}; `yolo-flash checks` says why"
    return (
        f"{found}. all=true compares every backend that can run, flash.backend={able[0]} this one, "
        f"and a larger imgsz= may take one by itself"
    )


def _note_unseen(report: Report, stage: _Stage, whole: Outputs, rows: list[Comparison]) -> None:
    """Note the layers whose attention the outputs do not show: for them, the whole model proves nothing."""
    allowed = {row.what: row.allowed for row in rows}
    for entry in report.layers:
        if entry["mode"] != stage.mode.name or not entry["of_plan"]:
            continue
        without = without_attention(stage.stock, entry["layer"], report.case.images, stage.mode)
        change, limit = max(
            ((relative_error(without[what], whole[what]), _SEEN * allowed[what]) for what in whole),
            key=lambda pair: pair[0] / pair[1],
        )
        entry["without_attention"] = change if math.isfinite(change) else None
        if not change > limit:
            report.notes.append(
                f"{entry['layer']}: without its attention the outputs change by {change:.1e} only (less than "
                f"{limit:.1e}), so that they would not show an error there; the layer's own rows do"
            )
