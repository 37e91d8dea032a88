"""The settings of the plugin: one frozen dataclass, filled from files, environment, command line and keywords."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ultralytics.cfg import smart_value
from ultralytics.utils import YAML

from .utils.errors import did_you_mean

ENV = "YOLO_FLASH"
_OTHER_ENV = {"YOLO_FLASH_DATASETS"}  # the folder of data sets, see assets/offline.py; no setting


class FlashConfigError(ValueError):
    """A setting that does not exist or has a value it cannot have. The message names what is valid.

    Examples:
        >>> FlashConfig.resolve(backnd="stock")
        Traceback (most recent call last):
        yolo_flash.config.FlashConfigError: the keyword arguments: there is no setting 'backnd'. Did you mean ...
    """


@dataclass(frozen=True)
class FlashConfig:
    """What the user asked of the plugin.

    `scripts/make_reference.py` writes docs/configuration.md and configs/default.yaml from this text.

    Attributes:
        enabled: Use the plugin at all; false leaves every model stock. `YOLO_FLASH=0` in the environment does the same.
        backend: The backend of every attention layer: auto, the fastest exact one that the device can run, or one by
            its name, which is an error where that one cannot run. flash_attn_2, flash_attn_3, flash_attn_4 and xformers
            are packages that have to be installed; a training holds the first three against float64 before its first
            step, also where they are asked for by name. sparse_window is approximate, for very large images, and never
            taken by auto: a query sees the keys near it alone.
        layers: Layers that shall differ from `backend`: a pattern of their names to the backend. The plan in the log
            names the stages, and a pattern that matches nothing is an error that lists all layers. The last pattern
            that matches a layer wins.
        window: What a query of sparse_window sees: the keys in a square of so many tokens around it, in the grid of its
            layer; an even number counts as the next odd one. Or of so many pixels of the image, rounded up to tokens:
            "256px".
        deterministic: strict trains with backends only whose backward is bitwise reproducible. prefer trains with the
            fastest, and the log says when that one is not reproducible although Ultralytics trains with
            deterministic=True.
        autotune: Choose by measuring: before the first step, every backend that can run is held against float64 and
            timed on the layers of this run. The numbers are kept for later runs; `yolo-flash checks --clear-cache`
            forgets them. false chooses by rules.
        graphs: Run forward, loss and backward from CUDA graphs: what a training step takes on the clock is then the
            GPU's time and no longer Python's. Of tasks other than detection and segmentation the loss stays outside.
            auto does so where steps are measured to be 5 % faster and the memory for it is there; on does so or fails
            with the reason. The graphs hold as much memory as a step, beside that of the last, smaller batch. The
            network of validation, in a training and in val, runs from graphs too, for shapes of images that come again:
            under auto those that are measured to be 5 % faster, under on all of them, and those of predict. Metrics and
            predictions keep every bit; what cannot be captured, or has too little memory, runs as ever, and the log
            says why.
        log: Say what runs: the plan, the kernels that really ran, memory and speed of every epoch. In the log, in
            flash.jsonl and flash.png of the run folder, as two columns of results.csv and in Ultralytics' loggers.

    Raises:
        FlashConfigError: A value has the wrong type or is not among the valid ones.

    Examples:
        >>> FlashConfig(backend="sdpa_flash").graphs
        'auto'
        >>> FlashConfig.resolve(config="strict", cli={"layers": "model.6.*:stock"}).layers
        {'model.6.*': 'stock'}
    """

    enabled: bool = True
    backend: str = "auto"
    layers: dict[str, str] = field(default_factory=dict)
    window: int | str = 33
    deterministic: Literal["prefer", "strict"] = "prefer"
    autotune: bool = True
    graphs: Literal["off", "on", "auto"] = "auto"
    log: bool = True

    def __post_init__(self) -> None:
        """Convert every value to its type, or raise."""
        for key, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, key, _coerce(key, getattr(self, key), kind))

    def window_tokens(self, stride: int | None) -> int:
        """Side of the window of a layer in tokens, odd: a query sees half of it to each side, rounded down.

        Args:
            stride: Pixels of the image to a token of the layer; None where they are not known.

        Raises:
            FlashConfigError: The window is in pixels, and the stride is not known.
        """
        tokens = self.window
        if isinstance(tokens, str):
            if stride is None:
                raise FlashConfigError(
                    f"window={self.window!r}: how many pixels a token of this layer has is not known, since only a "
                    f"whole model tells. Give the window in tokens, as in window=33."
                )
            tokens = -(-int(tokens.removesuffix("px")) // stride)
        return 2 * (tokens // 2) + 1

    @classmethod
    def resolve(
        cls, *, section: Mapping[str, Any] | None = None, cli: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> FlashConfig:
        """Merge all sources, later wins: defaults, config file, `flash:` section, environment, command line, keywords.

        Args:
            section: The `flash:` section of an Ultralytics `cfg=` file.
            cli: The `flash.key=value` arguments, without `flash.`.
            **kwargs: Keys given in Python.

        Any source may hold `config`: the path of a YAML file, or the name of a shipped one, read before all others.

        Raises:
            FlashConfigError: An unknown key, a wrong type, or a config file that does not exist.
        """
        environment, switch = _from_environment()
        merged: dict[str, Any] = {}
        for source, values in (
            ("the flash: section", section),
            ("the environment", environment),
            ("the command line", cli),
            ("the keyword arguments", kwargs),
        ):
            if not isinstance(values, Mapping) and values is not None:
                raise FlashConfigError(f"{source} must map keys to values, found {values!r}.")
            merged |= known_keys(values or {}, source)
        file = merged.pop("config", None)
        base = {} if file is None else read_config_file(file)
        return cls(**(base | merged | switch))


def read_config_file(name: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        name: Path of the file, or the name of a shipped one (`strict`).

    Raises:
        FlashConfigError: No such file, with the shipped names; no YAML in it; or a key in it that does not exist.
    """
    shipped = {file.stem: file for file in sorted(config_folder().glob("*.yaml"))}
    path = shipped.get(str(name), Path(str(name)))
    if not path.is_file():
        raise FlashConfigError(
            f"flash.config={name}: no such file, and not a shipped one.{did_you_mean(str(name), shipped)}"
        )
    try:
        values = YAML.load(path)
    except (AssertionError, ValueError) as error:  # another suffix than .yaml; no YAML, or no mapping
        raise FlashConfigError(f"flash.config={name}: {error}") from error
    values = values.get("flash", values)  # a file of settings may be the flash: section of a larger one
    if not isinstance(values, Mapping):
        raise FlashConfigError(f"{path} must map keys to values, found {values!r}.")
    if "config" in values:
        raise FlashConfigError(f"{path}: a file of settings cannot name another one, config={values['config']!r}.")
    return known_keys(values, str(path))


def config_folder() -> Path:
    """Where the shipped YAML files lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _from_environment() -> tuple[dict[str, Any], dict[str, Any]]:
    """`YOLO_FLASH_<KEY>` values, and `{"enabled": False}` when `YOLO_FLASH` itself switches all off."""
    prefix = f"{ENV}_"
    values = {
        name.removeprefix(prefix).lower(): smart_value(value)
        for name, value in os.environ.items()
        if name.startswith(prefix) and name not in _OTHER_ENV and value.strip()  # empty counts as unset
    }
    switch = os.environ.get(ENV, "").strip()
    on = not switch or _coerce(ENV, smart_value(switch), bool)
    return values, {} if on else {"enabled": False}


def known_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings of a source as a dict.

    Raises:
        FlashConfigError: A key is no setting; the message names the nearest valid one.
    """
    valid = [*FlashConfig.__dataclass_fields__, "config"]
    for key in values:
        if key not in valid:
            raise FlashConfigError(f"{source}: there is no setting {key!r}.{did_you_mean(str(key), valid)}")
    return dict(values)


def _coerce(key: str, value: Any, kind: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise FlashConfigError(f"{key} must be true or false, found {value!r}.")
    if key == "window":
        return _window(value)
    if typing.get_origin(kind) is Literal:
        valid = typing.get_args(kind)
        if isinstance(value, bool) and "on" in valid:  # as YAML reads a bare on or off
            value = "on" if value else "off"
        if value not in valid:
            raise FlashConfigError(f"{key}={value!r} is not valid.{did_you_mean(str(value), valid)}")
        return value
    if typing.get_origin(kind) is dict:
        if isinstance(value, str):
            value = _parse_layers(key, value)
        if not (isinstance(value, Mapping) and all(isinstance(s, str) for pair in value.items() for s in pair)):
            raise FlashConfigError(f"{key} must map layer patterns to backend names, found {value!r}.")
        return dict(value)
    if not isinstance(value, kind):
        raise FlashConfigError(f"{key} must be {kind.__name__}, found {value!r}.")
    return value


def _window(value: Any) -> int | str:
    """A number of tokens, or of pixels as in `256px`."""
    found = re.fullmatch(r"(\d{1,9})\s*(px)?", str(value).strip())
    if isinstance(value, bool) or not isinstance(value, (int, str)) or found is None or not int(found[1]):
        raise FlashConfigError(
            f"window must be a whole number of tokens (33) or of pixels (256px), of at least 1, found {value!r}."
        )
    return f"{int(found[1])}px" if found[2] else int(found[1])


def _parse_layers(key: str, text: str) -> dict[str, str]:
    """Read `model.6*:stock, model.8*:sdpa_math`, as typed in a shell; braces and quotes as in YAML are allowed."""
    inner = text.strip().removeprefix("{").removesuffix("}")
    items = [item.rpartition(":") for item in inner.split(",") if item.strip()]
    pairs = [(pattern.strip(" '\""), backend.strip(" '\"")) for pattern, _, backend in items]
    if not all(pattern and backend for pattern, backend in pairs):
        raise FlashConfigError(
            f"{key} must map layer patterns to backend names, as in 'model.6.*:stock', found {text!r}."
        )
    return dict(pairs)
