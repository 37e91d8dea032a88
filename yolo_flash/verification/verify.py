"""`yolo-flash verify`: the patched model against the stock one, on the user's own weights and images."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from .._version import __version__
from ..assets.models import open_model
from ..backends.registry import BACKENDS
from ..backends.spec import AttentionSpec, dtype_name
from ..config import FlashConfig, known_keys
from ..dispatch.dispatcher import Dispatcher
from ..machine import detect, resolve_device
from ..patching.blocks import FlashBlock, block_spec
from ..patching.fallback import FlashKernelError
from ..patching.multihead import images_and_tokens
from ..patching.patch import patch_modules, targets, unpatch_modules
from ..planning import autotune
from ..planning.inputs import precisions, rounded_size
from ..utils.log import quiet
from ..utils.numerics import relative_error
from .compare import (
    Comparison,
    Given,
    Mode,
    Outputs,
    compare,
    forgive_loss,
    layer_inputs,
    run_block,
    run_model,
    without_attention,
)
from .detections import Detections, compare_detections
from .executed import observe
from .inputs import is_fresh, load_images, settle
from .table import as_plain, as_text

_SEEN = 10  # attention reaches the outputs if they change by so many times the allowed error without it


def verify(
    model: str | Path | nn.Module,
    source: str | Path | None = None,
    imgsz: int = 640,
    batch: int = 2,
    device: str | int | None = None,
    amp: bool | str = True,
    all: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Compare the patched with the stock model, both against float64, and log a table with a verdict.

    Every attention layer is run alone on the input that it has in the model, in training and in prediction; then the
    whole model. Ours passes where it lies at most twice as far from float64 as stock does, plus the rounding of the
    dtype. Copies are run: the model, random numbers and flags of torch stay as they are.

    The backends are those of a run on this machine: measured, now or earlier, unless `autotune=False`. Torch's profiler
    tells which one each layer really ran.

    Args:
        model: Checkpoint or YAML, as in Ultralytics; or a `YOLO` object or its module, stock or patched.
        source: Picture, video, folder, list or data YAML, of which the first pictures are taken; without it synthetic
            ones.
        imgsz: Side of the images in pixels.
        batch: Images; pictures of the source are repeated where there are fewer.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Precision on a GPU, as in Ultralytics: float16 where True, `bf16` trains in bfloat16; False is float32, as
            on a CPU.
        all: Run each layer on every backend that can run it, and not on that of the plan alone.
        **settings: As in `patch_model`; without them, a patched model keeps its own.

    Returns:
        `ok`, `off` (what is off, one sentence each; also where nothing fused was compared, `fused` then being False),
        `notes`, `layers`, `model`, `detections` and what was run, ready for JSON; a number that is not finite is None.

    Raises:
        ValueError: The model has no attention layer of ours, the plugin is off, the batch is below 2, there is too
            little memory, or there is no such device or precision.
        FileNotFoundError: No such model or source.
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        FlashKernelError: A backend asked for by name raised.
    """
    run: dict[str, Any] = {"source": source, "imgsz": imgsz, "batch": batch, "device": device, "amp": amp, "every": all}
    return verify_from_sources(model, known_keys(settings, "the keyword arguments"), **run)


def verify_from_sources(model: Any, sources: Mapping[str, Any], as_json: bool = False, **run: Any) -> dict[str, Any]:
    """`verify` for settings that still have to be resolved.

    Args:
        model: As in `verify`.
        sources: Settings, as keyword arguments of `FlashConfig.resolve`.
        as_json: Print JSON on standard output, and nothing else.
        **run: `source`, `imgsz`, `batch`, `device`, `amp` and `every`, as in `verify`, where the last is `all`.
    """
    with quiet(as_json), torch.inference_mode(False), torch.enable_grad():
        device = resolve_device(run.pop("device", None))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.random.default_generator.manual_seed(0)  # of fresh weights
            try:
                facts = _Verification(model, sources, device, **run).facts()
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory on {detect(device)}: float64 writes the score matrices of every layer. "
                    f"A smaller imgsz= or batch= helps."
                ) from error
        LOGGER.info(as_text(facts))
    if as_json:
        print(json.dumps(facts, indent=2))
    return facts


@dataclass(frozen=True)
class _Stage:
    """A mode with the models that run in it.

    Attributes:
        mode: How they run.
        stock: Fused for prediction, as the predictor does.
        ours: The same, patched.
        inputs: Layer -> what reaches it.
    """

    mode: Mode
    stock: nn.Module
    ours: nn.Module
    inputs: dict[str, Given]


class _Verification:
    """One verification: the stock model, its images, and both modes."""

    def __init__(
        self,
        model: Any,
        sources: Mapping[str, Any],
        device: torch.device,
        source: str | Path | None = None,
        imgsz: int = 640,
        batch: int = 2,
        amp: bool | str = True,
        every: bool = False,
    ) -> None:
        if batch < 2:
            raise ValueError(
                f"batch must be at least 2, found {batch}: torch's BatchNorm is wrong on the CPU for one image."
            )
        if device.type == "mps":
            raise ValueError("device=mps has no float64 to compare with, and runs stock attention anyway.")
        on_gpu = device.type == "cuda"
        train_dtype, dtype = precisions(amp, on_gpu)
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        given: Any = open_model(model) if isinstance(model, (str, Path)) else model
        inner = given.model if isinstance(given, Model) else given
        if not (isinstance(inner, nn.Module) and targets(inner)):
            raise ValueError(
                f"{self.name} has no attention layer that the plugin knows (of YOLO10, 11, 12, 26 or RT-DETR): "
                f"nothing to verify."
            )
        self.config, self.device, self.batch, self.every = _config_of(inner, sources), device, batch, every
        if not self.config.enabled:
            raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to verify.")
        self.dispatcher, self.machine = Dispatcher(self.config), detect(device)
        self.stock: Any = copy.deepcopy(unwrap_model(inner))
        unpatch_modules(self.stock)
        self.stock.to(device, torch.float32)
        self.imgsz = rounded_size(self.stock, imgsz)
        channels = (getattr(self.stock, "yaml", None) or {}).get("channels", 3)
        images, self.source = load_images(source, channels, self.imgsz, batch)
        self.images = images.to(device)
        self.notes: list[str] = []
        self.off: list[str] = []
        if is_fresh(self.stock):
            settle(self.stock, self.images)
            self.notes.append(
                "fresh weights, in which attention does not reach the outputs: a copy was verified whose BatchNorm "
                "has the statistics of these images and whose layer scales are 1"
            )
        self.modes = (
            Mode("train", train_dtype, on_gpu, deterministic=bool(DEFAULT_CFG_DICT["deterministic"])),
            Mode("predict", dtype, False),
        )

    def facts(self) -> dict[str, Any]:
        """Run everything."""
        layers: list[dict[str, Any]] = []
        whole: list[dict[str, Any]] = []
        detections: Detections | None = None
        stages = [self._stage(mode) for mode in self.modes]
        self._measure(stages)
        for stage in stages:
            mode, stock = stage.mode, stage.stock
            layers += [entry for layer in stage.inputs for entry in self._layer(stage, layer)]
            truth = run_model(stock, self.images, mode, exact=True)
            plain = run_model(stock, self.images, mode)
            patched = run_model(stage.ours, self.images, mode)
            rows = forgive_loss(compare(truth, plain, patched, mode.dtype))
            whole += [{"mode": mode.name, **self._entry(f"the whole model ({mode.name})", row)} for row in rows]
            if not mode.training:
                detections = compare_detections(stock, truth, plain, patched, self.imgsz, mode.dtype)
                self._check_sight(stock, plain, rows, layers, mode)
        if detections is not None and not detections.ok:
            self.off.append("detections: they differ by more than rounding")
        self.off += [f"{backend} {error}" for backend, error in self.dispatcher.failed.items()]
        fused_names = [name for name, backend in BACKENDS.items() if backend.fused]
        compared = [entry for entry in layers if entry["backend"] in fused_names and entry["compared"]]
        fused = any(entry["observed"] for entry in compared)
        stock_rows = sum(entry["backend"] == "stock" for entry in layers)
        if compared and not fused:
            self.off.append(
                "what ran could not be observed, so that nothing is proved: torch's profiler is at work elsewhere in "
                "this process, or missing from this torch"
            )
        elif not fused:
            self.off.append(self._nothing_fused(stages))
        elif stock_rows and not self.every:
            self.notes.append(
                f"stock is what a run here takes in {stock_rows} of {len(layers)} rows: all=true compares the rest too"
            )
        return {
            "yolo_flash": __version__,
            "ok": not self.off,
            "off": self.off,
            "fused": fused,
            "notes": self.notes,
            "model_name": self.name,
            "source": self.source,
            "imgsz": self.imgsz,
            "batch": self.batch,
            "dtype": " and ".join(dict.fromkeys(dtype_name(mode.dtype) for mode in self.modes)),
            "device": str(self.machine),
            "machine": dataclasses.asdict(self.machine),
            "layers": layers,
            "model": whole,
            "detections": None if detections is None else as_plain(detections, "ok"),
        }

    def _stage(self, mode: Mode) -> _Stage:
        stock = copy.deepcopy(self.stock)
        if not mode.training and hasattr(stock, "fuse"):
            stock = stock.fuse(verbose=False)
        ours = copy.deepcopy(stock)
        patch_modules(ours, self.config, self.dispatcher)
        return _Stage(mode, stock, ours, layer_inputs(stock, self.images, mode))

    def _measure(self, stages: list[_Stage]) -> None:
        """Decide as a run here would: by what is known of this machine, and by measuring what is not."""
        if not self.config.autotune:
            return
        specs = []
        for stage in stages:
            for layer, given in stage.inputs.items():
                block: Any = targets(stage.ours)[layer]
                spec = _spec(block, given, stage.mode)
                if spec is None or block._flash_choice != "auto":
                    continue
                decision = self.dispatcher.decide(spec, "auto", self.device)
                if decision.by_rules:  # nothing that was measured is near
                    specs.append(spec)
        if specs:
            self.dispatcher.learn(autotune.measure(specs, self.device), self.machine)

    def _layer(self, stage: _Stage, layer: str) -> list[dict[str, Any]]:
        """What a layer computes on the backend of the plan, and with `every` on all others: an entry each."""
        mode, given = stage.mode, stage.inputs[layer]
        block: Any = targets(stage.stock)[layer]
        patched: Any = targets(stage.ours)[layer]
        x = next(iter(given.values()))  # the image, or the queries
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        truth = run_block(block, given, upstream, mode, exact=True)
        plain = run_block(block, given, upstream, mode)
        spec = _spec(patched, given, mode)
        planned = "stock"
        if spec is not None:
            planned = self.dispatcher.decide(spec, patched._flash_choice, self.device).backend
        where = f"{layer} ({mode.name})"
        entries = []
        for backend in [planned, *(self._others(spec, planned) if self.every else [])]:
            ours = patched
            if backend != planned:
                ours = copy.deepcopy(patched)
                ours._flash_choice = backend
            entry = {"layer": layer, "mode": mode.name, "planned": backend, "of_plan": backend == planned}
            rows: list[Comparison] = []
            try:
                found, ran = observe(partial(run_block, ours, given, upstream, mode))
                pixels = x.numel() // x.shape[1 if x.ndim == 4 else 2]
                rows = compare(truth, plain, found, mode.dtype, pixels)
                entry["backend"] = self._name(where, block, backend, ran)
                entry["observed"] = ran is not None
            except FlashKernelError as error:
                if backend == planned:
                    raise
                self.off.append(f"{where}: {error}")
                entry["backend"], entry["observed"] = backend, False
            entry["ok"] = entry["backend"] == backend and bool(rows) and all(row.ok for row in rows)
            entry["compared"] = [self._entry(f"{where} on {backend}" if self.every else where, row) for row in rows]
            entries.append(entry)
        return entries

    def _name(self, where: str, block: nn.Module, planned: str, ran: frozenset[str] | None) -> str:
        """What a layer ran, in a word; off where that is not the plan."""
        if ran is None:
            note = "what ran could not be observed: the rows name the plan"
            self.notes += [] if note in self.notes else [note]
            return planned
        if planned == "stock" and isinstance(block, nn.MultiheadAttention):
            return planned  # torch's own module, which calls the same operators as it likes
        name = " + ".join(sorted(ran)) or "stock"
        if name != planned:
            self.off.append(f"{where}: the plan says {planned}, and {name} ran")
        return name

    def _others(self, spec: AttentionSpec | None, planned: str) -> list[str]:
        """The backends beside that of the plan that can run a layer; stock is what all are compared with."""
        if spec is None:
            return []
        strict = self.config.deterministic == "strict" and spec.training
        return [
            name
            for name, backend in BACKENDS.items()
            if name not in ("stock", planned)
            and not backend.not_supported_reasons(spec, self.machine)
            and not (strict and not backend.reproducible(self.machine))
        ]

    def _nothing_fused(self, stages: list[_Stage]) -> str:
        """What to type where stock was compared with stock."""
        able = {
            name: None
            for stage in stages
            for layer, given in stage.inputs.items()
            for name in self._others(_spec(targets(stage.ours)[layer], given, stage.mode), "")
            if BACKENDS[name].fused
        }
        found = f"nothing fused was compared: a run here takes none at imgsz={self.imgsz} batch={self.batch}"
        if not able:
            return f"{found}, since none can run on {self.machine}; `yolo-flash checks` says why"
        return (
            f"{found}. all=true compares every backend that can run, flash.backend={next(iter(able))} this one, "
            f"and a larger imgsz= may take one by itself"
        )

    def _entry(self, where: str, row: Comparison) -> dict[str, Any]:
        """A comparison as plain data; what is off is also told in a sentence."""
        if not row.ok:
            stock = f"stock {row.stock:.1e}, allowed {row.allowed:.1e}"
            if not math.isfinite(row.stock):
                stock = "the stock model is not finite itself"
            self.off.append(f"{where}: {row.what} is off by {row.ours:.1e}; {stock}")
        return as_plain(row, "ok", "used")

    def _check_sight(
        self, stock: nn.Module, whole: Outputs, rows: list[Comparison], layers: list[dict[str, Any]], mode: Mode
    ) -> None:
        """Tell the layers whose attention the outputs do not show: there, the whole model proves nothing."""
        allowed = {row.what: row.allowed for row in rows}
        for entry in layers:
            if entry["mode"] != mode.name or not entry["of_plan"]:
                continue
            without = without_attention(stock, entry["layer"], self.images, mode)
            change, limit = max(
                ((relative_error(without[what], whole[what]), _SEEN * allowed[what]) for what in whole),
                key=lambda pair: pair[0] / pair[1],
            )
            entry["without_attention"] = change if math.isfinite(change) else None
            if not change > limit:
                self.notes.append(
                    f"{entry['layer']}: without its attention the outputs change by {change:.1e} only (less than "
                    f"{limit:.1e}), so that they would not show an error there; the layer's own rows do"
                )


def _spec(block: Any, given: Given, mode: Mode) -> AttentionSpec | None:
    """The problem that a patched block poses to the backends."""
    return block_spec(
        *(block, type(block), *images_and_tokens(block, next(iter(given.values())))),
        dtype=mode.dtype,
        nhwc=mode.nhwc,
        training=mode.training,
        deterministic=mode.deterministic,
        mask="attn_mask" in given,
    )


def _config_of(model: nn.Module, sources: Mapping[str, Any]) -> FlashConfig:
    """The settings: those given, else those of a patched model, else the defaults."""
    block = next((b for b in model.modules() if isinstance(b, FlashBlock)), None)
    if block is not None and all(value is None or value == {} for value in sources.values()):
        return block._flash_dispatcher.config
    return FlashConfig.resolve(**sources)
