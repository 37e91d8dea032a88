"""The command line: every mode and argument of `yolo`, plus `flash.*` settings and commands of our own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics import cfg as ultralytics_cfg
from ultralytics import utils as ultralytics_utils
from ultralytics.cfg import MODES, TASK2MODEL, TASKS, entrypoint, merge_equals_args, parse_key_value_pair
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.checks import check_model_file_from_stem, check_yaml

from . import offline, trial_cache
from ._version import __version__
from .backends import BackendNotSupportedError, check_name
from .bench_op import OpJob, bench_op
from .bench_plot import PlotJob, bench_plot
from .bench_predict import PredictJob, bench_predict
from .bench_rounds import bench
from .bench_step import StepJob
from .bench_train import TrainJob, bench_train
from .config import FlashConfig, FlashConfigError
from .guard import FlashKernelError
from .report import checks, show_plan
from .verification import verify_from_sources
from .wrapper import patch_from_sources

HELP = """
yolo-flash {version}: the `yolo` command with exact, fused attention for YOLO10, 11, 12 and 26.

  yolo-flash MODE ARGS            any `yolo` command: train, val, predict, export, track, benchmark, settings, cfg, ...
  yolo-flash checks [device=0] [--json]      what this device can run, and why not the rest
  yolo-flash checks --clear-cache            forget what was measured: the next run measures again
  yolo-flash plan model=yolo12n.yaml imgsz=640 batch=16 [train|val] [--fit] [--json]      what a run would use
  yolo-flash verify model=best.pt [source=images] [imgsz=640] [batch=2] [--json]      ours against stock and float64
  yolo-flash bench step model=yolo12n.yaml imgsz=640 batch=16      a training step, stock against ours
  yolo-flash bench predict model=yolo12n.yaml imgsz=640,1280       a prediction, stock against every backend
  yolo-flash bench train model=yolo12n.yaml data=coco8.yaml        iterations of real training, stock against ours
  yolo-flash bench op             every fused attention alone, on the layers of the models
  yolo-flash bench plot FILE.csv ...         pictures of what these measured with csv=FILE.csv
  yolo-flash help                 this screen; `yolo help` explains Ultralytics' own arguments

Examples
  yolo-flash train data=coco8.yaml epochs=3 imgsz=640
  yolo-flash train model=yolo12n.yaml data=coco8.yaml flash.backend=sdpa_flash
  yolo-flash predict model=runs/detect/train/weights/best.pt source=image.jpg

Settings (flash.KEY=VALUE; also YOLO_FLASH_KEY in the environment, or a `flash:` section in a cfg= file)
  flash.backend=auto              or stock, sdpa_math, sdpa_flash, sdpa_efficient, sdpa_cudnn, triton_area
  flash.layers='model.6.*:stock'  another backend for some layers
  flash.deterministic=prefer      or strict: only bitwise reproducible backends
  flash.config=strict             a shipped or own YAML file of settings
  flash.enabled=false             stock attention; so does YOLO_FLASH=0
  flash.autotune=false            choose by rules instead of measuring before the first step
  flash.graphs=auto               training steps from CUDA graphs; predict: flash.graphs_predict=true
  flash.log=false                 no plan in the log

In Python: from yolo_flash import patch_model; patch_model(YOLO("yolo12n.yaml")).train(data="coco8.yaml")
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Raises:
        SystemExit: A mistake in what the user typed, with the message; 1 where `verify` finds something off.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command = args[0].lstrip("-").lower() if args else "help"
    try:
        if command in ("help", "h"):
            LOGGER.info(HELP.format(version=__version__))
        elif command in ("checks", "check"):
            _checks(args[1:])
        elif command == "bench":
            _bench(args[1:])
        elif command == "plan":
            _plan(args[1:])
        elif command == "verify":
            _verify(args[1:])
        else:
            if command in ("version", "v"):
                LOGGER.info(f"yolo-flash {__version__}, ultralytics:")
            _run_yolo(args)
    except (FlashConfigError, BackendNotSupportedError, FlashKernelError, _UsageError) as error:
        raise SystemExit(f"yolo-flash: {error}") from error


class _UsageError(ValueError):
    """A command that cannot work, with what to type instead."""


def _checks(args: list[str]) -> None:
    values, words = _read(_merge(arg for arg in args if arg not in ("--json", "--clear-cache")))
    if unknown := words + [key for key in values if key != "device"]:
        raise _UsageError(f"checks takes device=..., --json and --clear-cache, found {', '.join(unknown)}.")
    if "--clear-cache" in args:
        _clear_cache()
        return
    try:
        checks(values.get("device"), as_json="--json" in args)
    except ValueError as error:
        raise _UsageError(f"device={values.get('device')}: {error}") from error


def _clear_cache() -> None:
    try:
        count = trial_cache.clear()
    except OSError as error:
        raise _UsageError(f"checks --clear-cache: {error}") from error
    LOGGER.info(f"yolo-flash: {count} measurements forgotten ({trial_cache.folder()})")


def _plan(args: list[str]) -> None:
    settings, rest = split_settings(_merge(arg for arg in args if arg not in ("--json", "--fit")))
    values, words = _read(rest)
    keys = ("model", "imgsz", "batch", "device", "amp")
    if unknown := [word for word in words if word not in ("train", "val")] + [key for key in values if key not in keys]:
        takes = ", ".join(f"{key}=..." for key in keys)
        raise _UsageError(f"plan takes {takes}, flash.*, train or val, --fit and --json; found {', '.join(unknown)}.")
    for key in ("imgsz", "batch"):
        if not isinstance(values.get(key, 1), int) or values.get(key, 1) < 1:
            raise _UsageError(f"plan: {key} must be a whole number of at least 1, found {values[key]!r}.")
    model = str(values.pop("model", "yolo12n.yaml"))
    _refuse_missing(model, f"model={model}", "train")
    flags = {"as_json": "--json" in args, "fit": "--fit" in args}
    try:
        show_plan(model, {"cli": settings}, tuple(words) or ("train", "val"), **flags, **values)
    except (ValueError, FileNotFoundError) as error:
        raise _UsageError(f"plan: {error}") from error


def _verify(args: list[str]) -> None:
    settings, rest = split_settings(_merge(arg for arg in args if arg != "--json"))
    values, words = _read(rest)
    keys = ("model", "source", "imgsz", "batch", "device", "amp")
    if unknown := words + [key for key in values if key not in keys]:
        takes = ", ".join(f"{key}=..." for key in keys)
        raise _UsageError(f"verify takes {takes}, flash.* and --json; found {', '.join(unknown)}.")
    for key in ("imgsz", "batch"):
        if not isinstance(values.get(key, 2), int) or values.get(key, 2) < 1:
            raise _UsageError(f"verify: {key} must be a whole number of at least 1, found {values[key]!r}.")
    if "model" not in values:
        raise _UsageError("verify needs a model: model=path/to/best.pt, or model=yolo12n.yaml for fresh weights.")
    model = str(values.pop("model"))
    _refuse_missing(model, f"model={model}", "train")
    try:
        facts = verify_from_sources(model, {"cli": settings}, as_json="--json" in args, **values)
    except (BackendNotSupportedError, FlashConfigError):
        raise
    except (ValueError, FileNotFoundError) as error:
        raise _UsageError(f"verify: {error}") from error
    if not facts["ok"]:
        raise SystemExit(1)


def _bench(args: list[str]) -> None:
    benches: dict[str, tuple[Any, Callable[[Any], object]]] = {
        "step": (StepJob, bench),
        "predict": (PredictJob, bench_predict),
        "train": (TrainJob, bench_train),
        "op": (OpJob, bench_op),
        "plot": (PlotJob, bench_plot),
    }
    if not args or args[0] not in benches:
        raise _UsageError(f"bench takes one of {', '.join(benches)}. Found {args[0] if args else 'nothing'}.")
    what = args[0]
    make_job, run = benches[what]
    values, words = _read(_merge(args[1:]))
    if make_job is PlotJob:
        values["files"], words = tuple(words), []
    fields = [field.name for field in dataclasses.fields(make_job)]
    if unknown := words + [key for key in values if key not in fields]:
        takes = ", ".join("FILE.csv ..." if name == "files" else f"{name}=..." for name in fields)
        raise _UsageError(f"bench {what} takes {takes}; found {', '.join(unknown)}.")
    for key, value in values.items():
        if key in ("arms", "shapes"):
            values[key] = tuple(name.strip() for name in str(value).split(",") if name.strip())
        elif key == "imgsz":
            values[key] = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        elif key in ("model", "device", "csv", "json", "amp", "dtype", "folder", "data"):
            values[key] = str(value)
    if "model" in values:
        _refuse_missing(values["model"], f"model={values['model']}", None)
    try:
        job = make_job(**values)
    except ValueError as error:
        raise _UsageError(f"bench {what}: {error}") from error
    try:
        run(job)
    except (OSError, ValueError) as error:  # a file that cannot be read or written, or that holds something else
        raise _UsageError(f"bench {what}: {error}") from error


def _run_yolo(args: list[str]) -> None:
    """Hand the arguments to Ultralytics' own entry point, without ours and with a model that is there."""
    settings, rest = split_settings(_merge(args))
    with _without_section(rest) as (rest, section):
        sources = {"cli": settings, "section": section}
        config = FlashConfig.resolve(**sources)  # a typo is told before anything is loaded
        for backend in (config.backend, *config.layers.values()):
            check_name(backend)
        rest = choose_model(rest)
        solutions = any(arg.lstrip("-").lower() in ("solutions", "solution") for arg in rest)
        with _as_yolo(rest), _patched_classes(sources, solutions):
            entrypoint()


def _merge(args: Iterable[str]) -> list[str]:
    """Join what a shell splits around `=` and inside brackets, as Ultralytics does."""
    try:
        return merge_equals_args(list(args))
    except SyntaxError as error:
        raise _UsageError(str(error)) from error


def _bare(arg: str) -> str:
    """An argument without the leading dashes and the trailing comma that Ultralytics forgives."""
    return arg.removeprefix("--").removesuffix(",")


def _read(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The `key=value` arguments, as Ultralytics reads them, and the words without `=`."""
    values: dict[str, Any] = {}
    words = []
    for arg in map(_bare, args):
        try:
            key, value = parse_key_value_pair(arg)
            values[key] = value
        except (ValueError, AssertionError):  # no `=`; nothing behind it, which Ultralytics explains
            words.append(arg)
    return values, words


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
        name, equals, value = _bare(arg).lstrip("-").partition("=")
        if name.strip() == "flash":
            raise FlashConfigError(f"{arg} does not name a setting: flash.enabled=..., flash.backend=...")
        if not name.startswith("flash."):
            rest.append(arg)
            continue
        key = name.removeprefix("flash.").strip()
        if not equals or not value.strip():
            raise FlashConfigError(f"{arg} needs a value: flash.{key or 'backend'}=...")
        settings[key] = parse_key_value_pair(f"{key}={value}")[1]
    return settings, rest


def choose_model(args: list[str]) -> list[str]:
    """Name a model for `train` when the user named none, and spare the wait for weights that cannot be downloaded.

    Args:
        args: The command line for Ultralytics.

    Returns:
        The same, with `model=` appended where it was missing.

    Raises:
        _UsageError: The model is official weights that are neither on disk nor to be downloaded.
    """
    values, words = _read(args)
    if (cfg := values.get("cfg")) is not None:  # below the arguments, as in Ultralytics
        values = _load_cfg(cfg) | values
    for word in words:
        if word in MODES:
            values["mode"] = word
        elif word in TASKS:
            values["task"] = word
        elif isinstance(DEFAULT_CFG_DICT.get(word), bool):  # `resume` is resume=True
            values[word] = True
    mode = values.get("mode") or DEFAULT_CFG_DICT["mode"]  # which is train
    task, model, resume = values.get("task") or "detect", values.get("model"), values.get("resume")
    for key in ("model", "pretrained"):
        if isinstance(values.get(key), str):
            _refuse_missing(values[key], f"{key}={values[key]}", values.get("mode"))
    if model is not None or not args or not all(map(_is_yolo_word, words)):  # else settings, help, ..., or a mistake
        return args
    if mode == "train" and isinstance(resume, str) and Path(resume).suffix == ".pt":
        return choose_model([*args, f"model={resume}"])  # Ultralytics would load yolo26n.pt only to drop it
    if mode != "train" or resume:
        weights = TASK2MODEL.get(task, "yolo26n.pt")
        if resume and offline.missing_asset(weights) and not offline.can_download():
            raise _UsageError(f"resume needs the run to resume: model=path/to/last.pt ({offline.why_not()}).")
        _refuse_missing(weights, f"no model= given: {weights}, which Ultralytics takes,", mode)
        return args
    weights = (TASK2MODEL | {"detect": "yolo12n.pt"}).get(task, "yolo12n.pt")
    if offline.missing_asset(weights) and not offline.can_download():
        weights = Path(weights).stem + ".yaml"
        LOGGER.info(f"yolo-flash: no model= given and nothing can be downloaded: training {weights} from scratch")
    else:
        LOGGER.info(f"yolo-flash: no model= given: training from {weights}")
    return [*args, f"model={weights}"]


def _is_yolo_word(word: str) -> bool:
    """Whether a word without `=` belongs to a mode; the others are commands of their own, or mistakes."""
    flag = isinstance(DEFAULT_CFG_DICT.get(word), bool) or word in ("half", "int8", "end2end", "nms")
    return flag or word in MODES or word in TASKS


def _refuse_missing(weights: str, what: str, mode: str | None) -> None:
    """Raise at once for official weights that Ultralytics would try to download for minutes, in vain."""
    file = weights if "://" in weights else check_model_file_from_stem(weights)
    if not offline.missing_asset(file) or offline.can_download():
        return
    scratch = f", or train from scratch with model={Path(file).stem}.yaml" if mode == "train" else ""
    raise _UsageError(
        f"{what} is not on this machine and cannot be downloaded: {offline.why_not()}. Copy the file here{scratch}."
    )


def _load_cfg(file: Any) -> dict[str, Any]:
    """Read the file of a `cfg=` argument."""
    try:
        return YAML.load(check_yaml(file))
    except (OSError, ValueError, AssertionError) as error:  # no such file; no YAML; another suffix than .yaml
        raise _UsageError(f"cfg={file}: {error}") from error


@contextlib.contextmanager
def _without_section(args: list[str]) -> Iterator[tuple[list[str], dict[str, Any] | None]]:
    """Split the `flash:` section off a `cfg=` file: Ultralytics refuses it, and reads a copy without it."""
    files = {i: file for i, arg in enumerate(args) if (file := _read([arg])[0].get("cfg")) is not None}
    position, file = next(iter(files.items()), (0, None))
    values = {} if file is None else _load_cfg(file)
    if "flash" not in values:
        yield args, None
        return
    section = values.pop("flash")
    with tempfile.TemporaryDirectory(prefix="yolo-flash-") as folder:
        stripped = Path(folder) / f"{Path(str(file)).stem}.yaml"
        YAML.save(stripped, values)
        yield [*args[:position], f"cfg={stripped}", *args[position + 1 :]], {} if section is None else section


@contextlib.contextmanager
def _as_yolo(args: list[str]) -> Iterator[None]:
    """Ultralytics reads `sys.argv` itself, and saves predictions only for a program that is called yolo.

    It does so through names bound at its import, which another list may have taken the place of since.
    """
    lists = {id(argv): argv for argv in (sys.argv, ultralytics_cfg.ARGV, ultralytics_utils.ARGV)}.values()
    originals = [argv[:] for argv in lists]
    for argv in lists:
        argv[:] = ["yolo", *args]
    try:
        yield
    finally:
        for argv, original in zip(lists, originals, strict=True):
            argv[:] = original


@contextlib.contextmanager
def _patched_classes(sources: dict[str, Any], solutions: bool) -> Iterator[None]:
    """`ultralytics.YOLO` and `RTDETR` make a patched object, the first time within the context.

    Only the first time: the trainer's AMP check builds another YOLO, which is none of our business.

    Args:
        sources: Keyword arguments of `FlashConfig.resolve`.
        solutions: Whether a solution builds the object, by a name that its own module binds when it is imported.
    """
    names = ("YOLO", "RTDETR")
    spaces = [vars(ultralytics)]
    if solutions:  # imported before the swap, or it would keep our factory for good
        spaces.append(vars(importlib.import_module("ultralytics.solutions.solutions")))
    own = [{name: space[name] for name in names if name in space} for space in spaces]

    def undo() -> None:
        for space, classes in zip(spaces, own, strict=True):
            for name in names:
                space.pop(name, None)
            space.update(classes)

    def factory(cls: Any) -> Any:
        def build(*args: Any, **kwargs: Any) -> Any:
            undo()
            return patch_from_sources(cls(*args, **kwargs), sources)

        return build

    factories = {name: factory(getattr(ultralytics, name)) for name in names}
    for space, classes in zip(spaces, own, strict=True):
        space.update(factories if space is vars(ultralytics) else {name: factories[name] for name in classes})
    try:
        yield
    finally:
        undo()
