"""`yolo-flash verify`: the patched model against the stock one, on the user's own weights and images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from ultralytics.data.augment import LetterBox
from ultralytics.data.loaders import LoadImagesAndVideos
from ultralytics.data.utils import check_det_dataset
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import unwrap_model

from . import offline
from ._version import __version__
from .backends import BACKENDS, short
from .blocks import FlashBlock, block_spec
from .comparison import (
    CONF,
    Comparison,
    Detections,
    Given,
    Mode,
    Results,
    compare,
    compare_detections,
    layer_inputs,
    run_block,
    run_model,
    without_attention,
)
from .config import FlashConfig, known_keys
from .machine import detect, resolve_device
from .measuring import relative_error
from .models import open_model
from .multihead import images_and_tokens
from .patch import patch_modules, targets, unpatch_modules
from .report import quiet
from .runtime import Runtime

_SEEN = 10  # attention reaches the outputs if they change by so many times the allowed error without it


def verify(
    model: str | Path | nn.Module,
    source: str | Path | None = None,
    imgsz: int = 640,
    batch: int = 2,
    device: str | int | None = None,
    amp: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Compare the patched with the stock model, both against float64, and log a table with a verdict.

    Every attention layer is run alone on the input that it has in the model, in training and in prediction; then the
    whole model. Ours passes where it lies at most twice as far from float64 as stock does, plus the rounding of the
    dtype. Copies are run: the model, random numbers and flags of torch stay as they are.

    Args:
        model: Checkpoint or YAML, as in Ultralytics; or a `YOLO` object or its module, stock or patched.
        source: Picture, video, folder, list or data YAML, of which the first pictures are taken; without it synthetic
            ones.
        imgsz: Side of the images in pixels.
        batch: Images; pictures of the source are repeated where there are fewer.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Compute in float16 on a GPU, in training and in prediction; else in float32.
        **settings: As in `patch_model`; without them, a patched model keeps its own.

    Returns:
        `ok`, `off` (what is off, one sentence each), `notes`, `layers`, `model`, `detections` and what was run, ready
        for JSON; a number that is not finite is None.

    Raises:
        ValueError: The model has no attention layer of ours, the plugin is off, the batch is below 2, there is too
            little memory, or the device does not exist.
        FileNotFoundError: No such model or source.
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        FlashKernelError: A backend asked for by name raised.
    """
    run: dict[str, Any] = {"source": source, "imgsz": imgsz, "batch": batch, "device": device, "amp": amp}
    return verify_from_sources(model, known_keys(settings, "the keyword arguments"), **run)


def verify_from_sources(model: Any, sources: Mapping[str, Any], as_json: bool = False, **run: Any) -> dict[str, Any]:
    """`verify` for settings that still have to be resolved.

    Args:
        model: As in `verify`.
        sources: Settings, as keyword arguments of `FlashConfig.resolve`.
        as_json: Print JSON on standard output, and nothing else.
        **run: `source`, `imgsz`, `batch`, `device` and `amp`, as in `verify`.
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
        LOGGER.info(_text(facts))
    if as_json:
        print(json.dumps(facts, indent=2))
    return facts


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
        amp: bool = True,
    ) -> None:
        if batch < 2:
            raise ValueError(
                f"batch must be at least 2, found {batch}: torch's BatchNorm is wrong on the CPU for one image."
            )
        if device.type == "mps":
            raise ValueError("device=mps has no float64 to compare with, and runs stock attention anyway.")
        self.name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        given: Any = open_model(model) if isinstance(model, (str, Path)) else model
        inner = given.model if isinstance(given, Model) else given
        if not (isinstance(inner, nn.Module) and targets(inner)):
            raise ValueError(
                f"{self.name} has no attention layer that the plugin knows (of YOLO10, 11, 12, 26 or RT-DETR): "
                f"nothing to verify."
            )
        self.config, self.device, self.batch = _config_of(inner, sources), device, batch
        if not self.config.enabled:
            raise ValueError("flash.enabled=false, or YOLO_FLASH=0: stock runs, and there is nothing to verify.")
        self.runtime = Runtime(self.config)
        self.stock: Any = copy.deepcopy(unwrap_model(inner))
        unpatch_modules(self.stock)
        self.stock.to(device, torch.float32)
        strides = getattr(self.stock, "stride", torch.tensor([32]))
        self.imgsz = int(check_imgsz(imgsz, stride=max(int(strides.max()), 32)))
        channels = (getattr(self.stock, "yaml", None) or {}).get("channels", 3)
        images, self.source = _images(source, channels, self.imgsz, batch)
        self.images = images.to(device)
        self.notes: list[str] = []
        self.off: list[str] = []
        if _is_fresh(self.stock):
            _settle(self.stock, self.images)
            self.notes.append(
                "fresh weights, in which attention does not reach the outputs: a copy was verified whose BatchNorm "
                "has the statistics of these images and whose layer scales are 1"
            )
        on_gpu = device.type == "cuda"
        self.dtype = torch.float16 if on_gpu and amp else torch.float32
        self.modes = (Mode("train", self.dtype, on_gpu), Mode("predict", self.dtype, False))

    def facts(self) -> dict[str, Any]:
        """Run everything."""
        layers: list[dict[str, Any]] = []
        whole: list[dict[str, Any]] = []
        detections: Detections | None = None
        for mode in self.modes:
            stock = copy.deepcopy(self.stock)
            if not mode.training and hasattr(stock, "fuse"):
                stock = stock.fuse(verbose=False)  # as the predictor does
            ours = copy.deepcopy(stock)
            patch_modules(ours, self.config, self.runtime)
            layers += self._layers(stock, ours, mode)
            truth = run_model(stock, self.images, mode, exact=True)
            plain = run_model(stock, self.images, mode)
            patched = run_model(ours, self.images, mode)
            rows = _forgive_loss(compare(truth, plain, patched, self.dtype))
            whole += [{"mode": mode.name, **self._entry(f"the whole model ({mode.name})", row)} for row in rows]
            if not mode.training:
                detections = compare_detections(stock, truth, plain, patched, self.imgsz, self.dtype)
                self._check_sight(stock, plain, rows, layers, mode)
        if detections is not None and not detections.ok:
            self.off.append("detections: they differ by more than rounding")
        self.off += [f"{backend} {error}" for backend, error in self.runtime.failed.items()]
        if not any(BACKENDS[layer["backend"]].fused for layer in layers):
            self.notes.append(
                "no fused backend was taken at this size, so that little was compared; a larger imgsz= or batch=, or "
                "flash.backend=sdpa_flash, does"
            )
        machine = detect(self.device)
        return {
            "yolo_flash": __version__,
            "ok": not self.off,
            "off": self.off,
            "notes": self.notes,
            "model_name": self.name,
            "source": self.source,
            "imgsz": self.imgsz,
            "batch": self.batch,
            "dtype": short(self.dtype),
            "device": str(machine),
            "machine": dataclasses.asdict(machine),
            "layers": layers,
            "model": whole,
            "detections": None if detections is None else _plain(detections, "ok"),
        }

    def _layers(self, stock: nn.Module, ours: nn.Module, mode: Mode) -> list[dict[str, Any]]:
        """One entry a layer: its backend and all that was compared."""
        entries = []
        for layer, given in layer_inputs(stock, self.images, mode).items():
            block, patched = targets(stock)[layer], targets(ours)[layer]
            x = next(iter(given.values()))  # the image, or the queries
            upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            truth = run_block(block, given, upstream, mode, exact=True)
            plain = run_block(block, given, upstream, mode)
            found = run_block(patched, given, upstream, mode)
            rows = compare(truth, plain, found, self.dtype, pixels=x.numel() // x.shape[1 if x.ndim == 4 else 2])
            entries.append(
                {
                    "layer": layer,
                    "mode": mode.name,
                    "backend": self._backend(patched, given, mode),
                    "ok": all(row.ok for row in rows),
                    "compared": [self._entry(f"{layer} ({mode.name})", row) for row in rows],
                }
            )
        return entries

    def _backend(self, block: Any, given: Given, mode: Mode) -> str:
        """What the block took for this input; asked afterwards, when a backend that raised is out."""
        x = next(iter(given.values()))
        spec = block_spec(
            *(block, type(block), *images_and_tokens(block, x)),
            dtype=mode.dtype,
            nhwc=mode.nhwc,
            training=mode.training,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            mask="attn_mask" in given,
        )
        return "stock" if spec is None else self.runtime.decide(spec, block._flash_choice, x.device).backend

    def _entry(self, where: str, row: Comparison) -> dict[str, Any]:
        """A comparison as plain data; what is off is also told in a sentence."""
        if not row.ok:
            stock = f"stock {row.stock:.1e}, allowed {row.allowed:.1e}"
            if not math.isfinite(row.stock):
                stock = "the stock model is not finite itself"
            self.off.append(f"{where}: {row.what} is off by {row.ours:.1e}; {stock}")
        return _plain(row, "ok", "used")

    def _check_sight(
        self, stock: nn.Module, whole: Results, rows: list[Comparison], layers: list[dict[str, Any]], mode: Mode
    ) -> None:
        """Tell the layers whose attention the outputs do not show: there, the whole model proves nothing."""
        allowed = {row.what: row.allowed for row in rows}
        for entry in layers:
            if entry["mode"] != mode.name:
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


def _config_of(model: nn.Module, sources: Mapping[str, Any]) -> FlashConfig:
    """The settings: those given, else those of a patched model, else the defaults."""
    block = next((b for b in model.modules() if isinstance(b, FlashBlock)), None)
    if block is not None and all(value is None or value == {} for value in sources.values()):
        return block._flash_runtime.config
    return FlashConfig.resolve(**sources)


def _forgive_loss(rows: list[Comparison]) -> list[Comparison]:
    """The loss is one number, which stock may hit by luck: it may be off as much as the outputs that it is made of."""
    allowed = max((row.allowed for row in rows if row.what.startswith("outputs")), default=0.0)
    return [dataclasses.replace(row, allowed=max(row.allowed, allowed)) if row.what == "loss" else row for row in rows]


def _plain(facts: Any, *properties: str) -> dict[str, Any]:
    """A dataclass, and properties of it, as a dict; JSON knows no NaN."""
    values = dataclasses.asdict(facts) | {name: getattr(facts, name) for name in properties}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# Weights and images ---------------------------------------------------------------------------------------------------
def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def _is_fresh(model: nn.Module) -> bool:
    """Whether the model comes from a YAML: no BatchNorm has seen a batch. A fused model has none, and was trained."""
    norms = _norms(model)
    return bool(norms) and all(norm.num_batches_tracked == 0 for norm in norms)


@torch.no_grad()
def _settle(model: nn.Module, images: Tensor) -> None:
    """Make attention matter in fresh weights.

    Untrained statistics let activations fade from layer to layer, and the layer scales of A2C2f begin at 0.01.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)
    with contextlib.ExitStack() as undo:
        for norm in _norms(model):
            undo.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = 1.0
        model.train()(images)


def _images(source: str | Path | None, channels: int, imgsz: int, batch: int) -> tuple[Tensor, str]:
    """Images `[batch, channels, imgsz, imgsz]` from 0 to 1, and what they are."""
    if source is None:
        random = torch.Generator().manual_seed(0)
        sizes = [max(imgsz // scale, 1) for scale in (1, 8, 32)]
        layers = [interpolate(torch.rand(batch, channels, s, s, generator=random), (imgsz, imgsz)) for s in sizes]
        return torch.stack(layers).mean(0), "synthetic images"
    path: Any = str(source)
    if Path(path).suffix in (".yaml", ".yml"):
        data = check_det_dataset(offline.training_data(path))
        path = data.get("val") or data["train"]
    loader = LoadImagesAndVideos(path, batch=batch, channels=channels)
    try:
        _, pictures, _ = next(iter(loader))
    except StopIteration:
        raise ValueError(f"source={source}: none of {loader.nf} files could be read.") from None
    finally:
        getattr(loader, "close", bool)()  # ultralytics 8.4.140 has none
    letterbox = LetterBox((imgsz, imgsz), auto=False)
    boxed = [np.atleast_3d(letterbox(image=picture)) for picture in pictures]
    if boxed[0].shape[2] != channels:
        raise ValueError(f"source={source}: {boxed[0].shape[2]} channels, and the model takes {channels}.")
    images = torch.from_numpy(np.stack([boxed[i % len(boxed)] for i in range(batch)])).permute(0, 3, 1, 2)
    images = images.flip(1) if channels == 3 else images  # BGR to RGB
    return images.contiguous().float() / 255, f"{len(pictures)} of {source}"


# Text -----------------------------------------------------------------------------------------------------------------
def _text(facts: dict[str, Any]) -> str:
    lines = [
        f"yolo-flash verify: {facts['model_name']}, imgsz {facts['imgsz']}, batch {facts['batch']}, "
        f"{facts['dtype']} on {facts['device']}",
        f"  images: {facts['source']}",
        *(f"  note: {note}" for note in facts["notes"]),
        "  relative errors against float64, the worst of each row; ours may be twice that of stock, plus rounding",
        f"  {'mode':<9}{'layer':<28}{'backend':<16}{'ours':>10}{'stock':>12}  {'ok':<5}worst",
        *(_row(entry["mode"], entry["layer"], entry["backend"], entry["compared"]) for entry in facts["layers"]),
    ]
    for mode in ("train", "predict"):
        for name in ("outputs", "loss", "gradients"):
            rows = [row for row in facts["model"] if row["mode"] == mode and row["what"].startswith(name)]
            if rows:
                lines.append(_row(mode, f"whole model, {name}", "", rows))
    lines.append(f"  detections: {_found(facts['detections'])}")
    lines += [f"  OFF: {sentence}" for sentence in facts["off"]]
    count = len({entry["layer"] for entry in facts["layers"]})
    verdict = f"{count} attention layers compute what stock computes" if facts["ok"] else "something is OFF, see above"
    return "\n".join([*lines, f"yolo-flash verify: {verdict}"])


def _row(mode: str, layer: str, backend: str, rows: list[dict[str, Any]]) -> str:
    worst = max(rows, key=lambda row: math.inf if row["used"] is None else row["used"])
    ok = "ok" if all(row["ok"] for row in rows) else "OFF"
    errors = f"{_number(worst['ours']):>10}{_number(worst['stock']):>12}"
    return f"  {mode:<9}{layer:<27} {backend:<16}{errors}  {ok:<5}{worst['what']}"


def _found(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not of this task; the raw outputs above have to do"
    if not found["stock"] and not found["ours"]:
        return f"none with a score above {CONF}, by stock and by ours"
    score, box, allowed_score, allowed_box = (
        _number(found[key]) for key in ("score", "box", "allowed_score", "allowed_box")
    )
    return (
        f"stock {found['stock']}, ours {found['ours']}, the same {found['matched']}; scores differ by {score} "
        f"(allowed {allowed_score}), boxes by {box} pixels (allowed {allowed_box}): {'ok' if found['ok'] else 'OFF'}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
