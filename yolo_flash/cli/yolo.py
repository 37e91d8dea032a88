"""Any command of `yolo`, with a patched model."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics import cfg as ultralytics_cfg
from ultralytics import utils as ultralytics_utils
from ultralytics.cfg import MODES, TASK2MODEL, TASKS, entrypoint
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.checks import check_yaml

from .._version import __version__
from ..assets import offline
from ..backends.registry import check_name
from ..config import FlashConfig
from .arguments import UsageError, merge, read, refuse_unusable, split_settings


def run_yolo(args: list[str]) -> None:
    """Hand the arguments to Ultralytics' own entry point, without the `flash.*` ones and with a model."""
    if args[0].lstrip("-").lower() in ("version", "v"):
        LOGGER.info(f"yolo-flash {__version__}, ultralytics:")
    settings, rest = split_settings(merge(args))
    with _without_section(rest) as (rest, section):
        sources = {"cli": settings, "section": section}
        config = FlashConfig.resolve(**sources)  # a typo is told before anything is loaded
        for backend in (config.backend, *config.layers.values()):
            check_name(backend)
        rest = choose_model(rest)
        solutions = any(arg.lstrip("-").lower() in ("solutions", "solution") for arg in rest)
        with _as_yolo(rest), _patched_classes(sources, solutions):
            entrypoint()


def choose_model(args: list[str]) -> list[str]:
    """Name a model for `train` when the user named none, and spare the wait for weights that cannot be downloaded.

    Args:
        args: The command line for Ultralytics.

    Returns:
        The same, with `model=` appended where it was missing.

    Raises:
        UsageError: The model is official weights that are neither on disk nor to be downloaded, or a
            checkpoint in the layout of YOLOv12's authors.
    """
    values, words = read(args)
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
    task, resume = values.get("task") or "detect", values.get("resume")
    for key in ("model", "pretrained"):
        if isinstance(values.get(key), str):
            refuse_unusable(values[key], f"{key}={values[key]}", values.get("mode"))
    if (
        values.get("model") is not None or not args or not all(map(_is_yolo_word, words))
    ):  # else settings, help, ..., or a mistake
        return args
    if mode == "train" and isinstance(resume, str) and Path(resume).suffix == ".pt":
        return choose_model([*args, f"model={resume}"])  # Ultralytics would load yolo26n.pt only to drop it
    if mode != "train" or resume:
        weights = TASK2MODEL.get(task, "yolo26n.pt")
        if resume and offline.out_of_reach(weights):
            raise UsageError(f"resume needs the run to resume: model=path/to/last.pt ({offline.why_not()}).")
        refuse_unusable(weights, f"no model= given: {weights}, which Ultralytics takes,", mode)
        return args
    weights = (TASK2MODEL | {"detect": "yolo12n.pt"}).get(task, "yolo12n.pt")
    if offline.out_of_reach(weights):
        weights = Path(weights).stem + ".yaml"
        LOGGER.info(f"yolo-flash: no model= given and nothing can be downloaded: training {weights} from scratch")
    else:
        LOGGER.info(f"yolo-flash: no model= given: training from {weights}")
    return [*args, f"model={weights}"]


def _is_yolo_word(word: str) -> bool:
    """Whether a word without `=` belongs to a mode; the others are commands of their own, or mistakes."""
    flag = isinstance(DEFAULT_CFG_DICT.get(word), bool) or word in ("half", "int8", "end2end", "nms")
    return flag or word in MODES or word in TASKS


def _load_cfg(file: Any) -> dict[str, Any]:
    """Read the file of a `cfg=` argument."""
    if Path(str(file)).suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"cfg={file}: it must be a YAML file, with the suffix .yaml or .yml.")
    try:
        return YAML.load(check_yaml(file))
    except (OSError, ValueError) as error:  # no such file; no YAML
        raise UsageError(f"cfg={file}: {error}") from error


@contextlib.contextmanager
def _without_section(args: list[str]) -> Iterator[tuple[list[str], dict[str, Any] | None]]:
    """Split the `flash:` section off a `cfg=` file: Ultralytics refuses it, and reads a copy without it."""
    files = {i: file for i, arg in enumerate(args) if (file := read([arg])[0].get("cfg")) is not None}
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
    """Make the arguments of the process those of `yolo`: Ultralytics saves predictions only for a program of that name.

    Ultralytics' modules bind the list at their import, and `sys.argv` may be another list by now.
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
    """Make `ultralytics.YOLO` and `RTDETR` build a patched object, the first time within the context.

    Later objects are stock, such as the YOLO that the trainer's AMP check builds.

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
            from ..engine.model import patch_from_sources

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
