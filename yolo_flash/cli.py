"""The command line: every mode and argument of `yolo`, plus `flash.*` settings and commands of our own."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics.cfg import TASK2MODEL, TASKS, entrypoint, merge_equals_args, parse_key_value_pair
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.checks import check_model_file_from_stem, check_yaml

from . import offline
from .backends import BackendNotSupportedError
from .blocks import FlashKernelError
from .config import FlashConfig, FlashConfigError
from .report import checks
from .trainer import patch_from_sources

HELP = """
yolo-flash {version}: the `yolo` command with exact, fused attention for YOLO10, 11, 12 and 26.

  yolo-flash MODE ARGS            any `yolo` command: train, val, predict, export, track, benchmark, settings, cfg, ...
  yolo-flash checks [device=0] [--json]      what this device can run, and why not the rest
  yolo-flash help                 this screen; `yolo help` explains Ultralytics' own arguments

Examples
  yolo-flash train data=coco8.yaml epochs=3 imgsz=640
  yolo-flash train model=yolo12n.yaml data=coco8.yaml flash.backend=sdpa_flash
  yolo-flash predict model=runs/detect/train/weights/best.pt source=image.jpg

Settings (flash.KEY=VALUE; also YOLO_FLASH_KEY in the environment, or a `flash:` section in a cfg= file)
  flash.backend=auto              or stock, sdpa_math, sdpa_flash, sdpa_efficient, sdpa_cudnn
  flash.layers=model.6.*:stock    another backend for some layers
  flash.deterministic=prefer      or strict: only bitwise reproducible backends
  flash.config=strict             a shipped or own YAML file of settings
  flash.enabled=false             stock attention; so does YOLO_FLASH=0
  flash.log=false                 no plan in the log

In Python: from yolo_flash import patch_model; patch_model(YOLO("yolo12n.yaml")).train(data="coco8.yaml")
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Raises:
        SystemExit: A mistake in what the user typed, with the message.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command = args[0].lstrip("-").lower() if args else "help"
    try:
        if command in ("help", "h"):
            LOGGER.info(HELP.format(version=version("yolo-flash")))
        elif command == "checks":
            _checks(args[1:])
        else:
            if command == "version":
                LOGGER.info(f"yolo-flash {version('yolo-flash')}, ultralytics:")
            _run_yolo(args)
    except (FlashConfigError, BackendNotSupportedError, FlashKernelError, _UsageError) as error:
        raise SystemExit(f"yolo-flash: {error}") from error


class _UsageError(ValueError):
    """A command that cannot work, with what to type instead."""


def _checks(args: list[str]) -> None:
    as_json = "--json" in args
    rest = [arg for arg in args if arg != "--json"]
    values = dict(parse_key_value_pair(arg) for arg in merge_equals_args(rest) if "=" in arg)
    if unknown := [arg for arg in rest if "=" not in arg] + [key for key in values if key != "device"]:
        raise _UsageError(f"checks takes device=... and --json, found {', '.join(unknown)}.")
    try:
        checks(values.get("device"), as_json=as_json)
    except ValueError as error:
        raise _UsageError(f"device={values.get('device')}: {error}") from error


def _run_yolo(args: list[str]) -> None:
    """Hand the arguments to Ultralytics' own entry point, without ours and with a model that is there."""
    settings, rest = split_settings(merge_equals_args(args))
    with _without_section(rest) as (rest, section):
        sources = {"cli": settings, "section": section}
        FlashConfig.resolve(**sources)  # a typo is told before anything is loaded
        rest = choose_model(rest)
        with _as_yolo(rest), _patched_classes(sources, once="solutions" not in rest):
            entrypoint()


def split_settings(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the `flash.key=value` arguments out of a command line.

    Args:
        args: Arguments with spaces around `=` already merged.

    Returns:
        The settings, keys without `flash.`, values as Ultralytics reads them; and all other arguments, untouched.

    Raises:
        FlashConfigError: `flash.key` without a value.
    """
    settings: dict[str, Any] = {}
    rest = []
    for arg in args:
        if not arg.lstrip("-").startswith("flash."):
            rest.append(arg)
            continue
        key, equals, value = arg.lstrip("-").removeprefix("flash.").partition("=")
        if not equals or not value.strip():
            raise FlashConfigError(f"{arg} needs a value: flash.{key or 'backend'}=...")
        settings[key.strip()] = parse_key_value_pair(f"{key}={value}")[1]
    return settings, rest


def choose_model(args: list[str]) -> list[str]:
    """Name a model for `train` when the user named none, and spare the wait for weights that cannot be downloaded.

    Args:
        args: The command line for Ultralytics.

    Returns:
        The same, with `model=` appended where it was missing.

    Raises:
        _UsageError: `model=` names official weights that are neither on disk nor to be downloaded.
    """
    values = dict(arg.lstrip("-").split("=", 1) for arg in args if "=" in arg)
    words = {arg.lstrip("-") for arg in args if "=" not in arg}
    model, resume = values.get("model"), values.get("resume")
    if model is not None:
        weights = check_model_file_from_stem(model)
        if offline.missing_asset(weights) and not offline.can_download():
            raise _UsageError(
                f"model={model} is not on this machine, and {offline.DOWNLOAD_HOST} did not answer within "
                f"{offline.PROBE_SECONDS:.0f} s. Copy the file here, or train from scratch with "
                f"model={Path(model).stem}.yaml."
            )
        return args
    if "train" not in words and values.get("mode") != "train":
        return args
    if resume is not None and Path(resume).suffix == ".pt":  # Ultralytics would load yolo26n.pt only to drop it
        return [*args, f"model={resume}"]
    if resume is not None or "resume" in words:
        return args
    if (cfg := values.get("cfg")) is not None and YAML.load(check_yaml(cfg)).get("model"):
        return args
    task = values.get("task") or next((word for word in words if word in TASKS), "detect")
    weights = "yolo12n.pt" if task == "detect" else TASK2MODEL[task]
    if offline.missing_asset(weights) and not offline.can_download():
        weights = Path(weights).stem + ".yaml"
        LOGGER.info(f"yolo-flash: no model= given and nothing can be downloaded: training {weights} from scratch")
    else:
        LOGGER.info(f"yolo-flash: no model= given: training from {weights}")
    return [*args, f"model={weights}"]


@contextlib.contextmanager
def _without_section(args: list[str]) -> Iterator[tuple[list[str], dict[str, Any] | None]]:
    """Split the `flash:` section off a `cfg=` file: Ultralytics refuses it, and reads a copy without it."""
    position = next((i for i, arg in enumerate(args) if arg.lstrip("-").startswith("cfg=")), None)
    values = {} if position is None else YAML.load(check_yaml(args[position].split("=", 1)[1]))
    if position is None or "flash" not in values:
        yield args, None
        return
    section = values.pop("flash")
    with tempfile.TemporaryDirectory(prefix="yolo-flash-") as folder:
        stripped = Path(folder) / Path(args[position]).name.removeprefix("cfg=")
        YAML.save(stripped, values)
        yield [*args[:position], f"cfg={stripped}", *args[position + 1 :]], section or {}


@contextlib.contextmanager
def _as_yolo(args: list[str]) -> Iterator[None]:
    """Ultralytics reads `sys.argv` itself, and saves predictions only for a program that is called yolo."""
    original = sys.argv[:]
    sys.argv[:] = ["yolo", *args]
    try:
        yield
    finally:
        sys.argv[:] = original


@contextlib.contextmanager
def _patched_classes(sources: dict[str, Any], once: bool) -> Iterator[None]:
    """`ultralytics.YOLO` and `RTDETR` make patched objects, as long as the context lasts.

    Args:
        sources: Keyword arguments of `FlashConfig.resolve`.
        once: Only for the first object: the trainer's AMP check builds another YOLO, which is none of our business.
    """
    names = ("YOLO", "RTDETR")
    own = {name: vars(ultralytics)[name] for name in names if name in vars(ultralytics)}

    def undo() -> None:
        for name in names:
            vars(ultralytics).pop(name, None)
        vars(ultralytics).update(own)

    def factory(cls: Any) -> Any:
        def build(*args: Any, **kwargs: Any) -> Any:
            if once:
                undo()
            return patch_from_sources(cls(*args, **kwargs), sources)

        return build

    vars(ultralytics).update({name: factory(getattr(ultralytics, name)) for name in names})
    try:
        yield
    finally:
        undo()
