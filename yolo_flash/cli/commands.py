"""The commands that Ultralytics does not have: checks, plan, verify and bench; each imports its wing when it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ultralytics.utils import LOGGER

from ..backends.registry import BackendNotSupportedError
from ..config import FlashConfigError
from ..dispatch import trial_cache
from .arguments import UsageError, merge, read, refuse_missing, split_settings
from .checks import checks


def _check_counts(command: str, values: dict[str, Any]) -> None:
    for key in ("imgsz", "batch"):
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{command}: {key} must be a whole number of at least 1, found {value!r}.")


def run_checks(args: list[str]) -> None:
    """What a device can run; or, with --clear-cache, what was measured is forgotten."""
    values, words = read(merge(arg for arg in args if arg not in ("--json", "--clear-cache")))
    if unknown := words + [key for key in values if key != "device"]:
        raise UsageError(f"checks takes device=..., --json and --clear-cache, found {', '.join(unknown)}.")
    if "--clear-cache" in args:
        _clear_cache()
        return
    try:
        checks(values.get("device"), as_json="--json" in args)
    except ValueError as error:
        raise UsageError(f"checks: {error}") from error


def _clear_cache() -> None:
    try:
        count = trial_cache.clear()
    except OSError as error:
        raise UsageError(f"checks --clear-cache: {error}") from error
    LOGGER.info(f"yolo-flash: {count} measurements forgotten ({trial_cache.folder()})")


def run_plan(args: list[str]) -> None:
    """What a run would use, without running it."""
    from .plan import show_plan

    settings, rest = split_settings(merge(arg for arg in args if arg not in ("--json", "--fit")))
    values, words = read(rest)
    keys = ("model", "imgsz", "batch", "device", "amp")
    if unknown := [word for word in words if word not in ("train", "val")] + [key for key in values if key not in keys]:
        takes = ", ".join(f"{key}=..." for key in keys)
        raise UsageError(f"plan takes {takes}, flash.*, train or val, --fit and --json; found {', '.join(unknown)}.")
    _check_counts("plan", values)
    model = str(values.pop("model", "yolo12n.yaml"))
    refuse_missing(model, f"model={model}", "train")
    flags = {"as_json": "--json" in args, "fit": "--fit" in args}
    try:
        show_plan(model, {"cli": settings}, tuple(words) or ("train", "val"), **flags, **values)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"plan: {error}") from error


def run_verify(args: list[str]) -> None:
    """Ours against stock; exit status 1 where something is off."""
    from ..verification.verify import verify_from_sources

    settings, rest = split_settings(merge(arg for arg in args if arg != "--json"))
    values, words = read(rest)
    keys = ("model", "source", "imgsz", "batch", "device", "amp", "all")
    if unknown := words + [key for key in values if key not in keys]:
        takes = ", ".join(f"{key}=..." for key in keys)
        raise UsageError(f"verify takes {takes}, flash.* and --json; found {', '.join(unknown)}.")
    _check_counts("verify", values)
    if not isinstance(values.setdefault("all", False), bool):
        raise UsageError(f"verify: all must be true or false, found {values['all']!r}.")
    values["every"] = values.pop("all")
    if "model" not in values:
        raise UsageError("verify needs a model: model=path/to/best.pt, or model=yolo12n.yaml for fresh weights.")
    model = str(values.pop("model"))
    refuse_missing(model, f"model={model}", "train")
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
    from ..bench.step import StepJob
    from ..bench.train import TrainJob, bench_train

    benches: dict[str, tuple[Any, Callable[[Any], object]]] = {
        "step": (StepJob, bench),
        "predict": (PredictJob, bench_predict),
        "train": (TrainJob, bench_train),
        "op": (OpJob, bench_op),
        "plot": (PlotJob, bench_plot),
    }
    if not args or args[0] not in benches:
        raise UsageError(f"bench takes one of {', '.join(benches)}. Found {args[0] if args else 'nothing'}.")
    what = args[0]
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
        refuse_missing(values["model"], f"model={values['model']}", None)
    try:
        job = make_job(**values)
    except ValueError as error:
        raise UsageError(f"bench {what}: {error}") from error
    try:
        results = run(job)
    except (OSError, ValueError) as error:  # a file that cannot be read or written, or that holds something else
        raise UsageError(f"bench {what}: {error}") from error
    if reason := _why_nothing_was_measured(results):
        raise UsageError(f"bench {what}: every arm failed: {reason}")


def _why_nothing_was_measured(results: Any) -> str:
    """What the first arm said, where no arm of a bench gave a figure; else empty.

    Args:
        results: Of `bench`, an entry a size, or of `bench op`, rows.
    """
    if not isinstance(results, list) or not results or not isinstance(results[0], dict):
        return ""  # of pictures
    if "arms" in results[0]:
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
}
