"""The commands that Ultralytics does not have, from checks to convert; each imports its wing when it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ultralytics.utils import LOGGER

from ..backends.registry import BackendNotSupportedError
from ..config import FlashConfigError
from ..dispatch import trial_cache
from .arguments import UsageError, merge, read, refuse_unusable, split_settings
from .checks import checks


def _read_run(
    command: str, args: Iterable[str], keys: tuple[str, ...], takes: str, modes: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Settings, values and words of a command about a run; `takes` names what it takes besides its keys."""
    settings, rest = split_settings(merge(args))
    values, words = read(rest)
    if unknown := [word for word in words if word not in modes] + [key for key in values if key not in keys]:
        named = ", ".join(f"{key}=..." for key in keys)
        raise UsageError(f"{command} takes {named}, {takes} found {', '.join(unknown)}.")
    for key in ("imgsz", "batch"):
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{command}: {key} must be a whole number of at least 1, found {value!r}.")
    return settings, values, words


def run_checks(args: list[str]) -> None:
    """What a device can run; or, with --clear-cache, what was measured is forgotten."""
    values, words = read(merge(arg for arg in args if arg not in ("--json", "--clear-cache")))
    if unknown := words + [key for key in values if key != "device"]:
        raise UsageError(f"checks takes device=..., --json and --clear-cache, found {', '.join(unknown)}.")
    clear = "--clear-cache" in args
    mistake: type[Exception] = OSError if clear else ValueError
    try:
        if clear:
            LOGGER.info(f"yolo-flash: {trial_cache.clear()} measurements forgotten ({trial_cache.folder()})")
        else:
            checks(values.get("device"), as_json="--json" in args)
    except mistake as error:
        raise UsageError(f"checks{' --clear-cache' if clear else ''}: {error}") from error


def run_plan(args: list[str]) -> None:
    """What a run would use, without running it."""
    from .plan import show_plan

    keys, modes = ("model", "imgsz", "batch", "device", "amp"), ("train", "val")
    rest = (arg for arg in args if arg not in ("--json", "--fit"))
    settings, values, words = _read_run("plan", rest, keys, "flash.*, train or val, --fit and --json;", modes)
    model = str(values.pop("model", "yolo12n.yaml"))
    refuse_unusable(model, f"model={model}", "train")
    flags = {"as_json": "--json" in args, "fit": "--fit" in args}
    try:
        show_plan(model, {"cli": settings}, tuple(words) or modes, **flags, **values)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"plan: {error}") from error


def run_verify(args: list[str]) -> None:
    """Ours against stock; exit status 1 where something is off."""
    from ..verification.verify import verify_from_sources

    keys = ("model", "source", "imgsz", "batch", "device", "amp", "all")
    rest = (arg for arg in args if arg != "--json")
    settings, values, _ = _read_run("verify", rest, keys, "flash.* and --json;")
    if not isinstance(values.setdefault("all", False), bool):
        raise UsageError(f"verify: all must be true or false, found {values['all']!r}.")
    values["every"] = values.pop("all")
    if "model" not in values:
        raise UsageError("verify needs a model: model=path/to/best.pt, or model=yolo12n.yaml for fresh weights.")
    model = str(values.pop("model"))
    refuse_unusable(model, f"model={model}", "train")
    try:
        facts = verify_from_sources(model, {"cli": settings}, as_json="--json" in args, **values)
    except (BackendNotSupportedError, FlashConfigError):
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"verify: {error}") from error
    if not facts["ok"]:
        raise SystemExit(1)


def run_bench(args: list[str]) -> None:
    """One of the benchmarks, or the pictures of what they measured."""
    from ..bench.op import OpJob, bench_op
    from ..bench.plot import PlotJob, bench_plot
    from ..bench.predict import PredictJob, bench_predict
    from ..bench.rounds import bench
    from ..bench.run import RunJob
    from ..bench.step import StepJob
    from ..bench.train import TrainJob, bench_train

    benches: dict[str, tuple[Any, Callable[[Any], object]]] = {
        "step": (StepJob, bench),
        "predict": (PredictJob, bench_predict),
        "train": (TrainJob, bench_train),
        "run": (RunJob, bench_train),
        "op": (OpJob, bench_op),
        "plot": (PlotJob, bench_plot),
    }
    what = args[0] if args else "nothing"
    if what not in benches:
        raise UsageError(f"bench takes one of {', '.join(benches)}. Found {what}.")
    make_job, run = benches[what]
    values, words = read(merge(args[1:]))
    if make_job is PlotJob:
        values["files"], words = tuple(words), []
    fields = [field.name for field in dataclasses.fields(make_job)]
    if unknown := words + [key for key in values if key not in fields]:
        takes = ", ".join("FILE.csv ..." if name == "files" else f"{name}=..." for name in fields)
        raise UsageError(f"bench {what} takes {takes}; found {', '.join(unknown)}.")
    for key, value in values.items():
        if key in ("arms", "shapes"):
            values[key] = tuple(name.strip() for name in str(value).split(",") if name.strip())
        elif key == "imgsz":
            values[key] = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        elif key in ("model", "device", "csv", "json", "amp", "dtype", "folder", "data"):
            values[key] = str(value)
    if "model" in values:
        refuse_unusable(values["model"], f"model={values['model']}", None)
    try:
        results = run(make_job(**values))
    except (OSError, ValueError) as error:  # a file that cannot be read or written, or that holds something else
        raise UsageError(f"bench {what}: {error}") from error
    if reason := _why_nothing_was_measured(results):
        raise UsageError(f"bench {what}: every arm failed: {reason}")


def run_convert(args: list[str]) -> None:
    """A checkpoint of YOLOv12's authors in Ultralytics' layout, or back."""
    from ..checkpoints.convert import convert
    from ..checkpoints.reading import CheckpointError

    options: dict[str, str] = {}
    files = []
    rest = iter(args)  # read by hand: a path may hold `=`
    for arg in rest:
        key, equals, value = arg.removeprefix("--").partition("=")
        if key in ("to", "out") and (equals or arg.startswith("--")):
            options[key] = value if equals else next(rest, "")
        else:
            files.append(arg)
    if len(files) != 1 or files[0].startswith("-") or not all(options.values()):
        found = ", ".join(args) or "nothing"
        raise UsageError(f"convert takes one checkpoint, --to authors|ultralytics and --out FILE.pt; found {found}.")
    try:
        convert(files[0], **options)
    except (CheckpointError, OSError) as error:
        raise UsageError(f"convert: {error}") from error


def _why_nothing_was_measured(results: Any) -> str:
    """What the first arm said, where no arm of a bench gave a figure; else empty."""
    if not isinstance(results, list) or not results or not isinstance(results[0], dict):
        return ""  # of pictures
    if "arms" in results[0]:  # of `bench`, an entry a size; else of `bench op`, rows
        reasons = [arm["median"].get("error", "") for size in results for arm in size["arms"].values()]
    else:
        reasons = [row["note"] if row["us"] is None else "" for row in results]
    return str(reasons[0]) if all(reasons) else ""


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "checks": run_checks,
    "check": run_checks,
    "plan": run_plan,
    "verify": run_verify,
    "bench": run_bench,
    "convert": run_convert,
}
