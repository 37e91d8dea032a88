"""Arguments as users type them: `key=value`, words and `flash.*` settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ultralytics.cfg import merge_equals_args, parse_key_value_pair
from ultralytics.utils.checks import check_model_file_from_stem

from ..assets import offline
from ..checkpoints.reading import names_authors_layout
from ..config import FlashConfigError


class UsageError(ValueError):
    """A command that cannot work, with what to type instead."""


def merge(args: Iterable[str]) -> list[str]:
    """Join what a shell splits around `=` and inside brackets, as Ultralytics does."""
    try:
        return merge_equals_args(list(args))
    except SyntaxError as error:
        raise UsageError(str(error)) from error


def _bare(arg: str) -> str:
    """An argument without the leading dashes and the trailing comma that Ultralytics forgives."""
    return arg.removeprefix("--").removesuffix(",")


def read(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The `key=value` arguments, as Ultralytics reads them, and the words without `=`."""
    values: dict[str, Any] = {}
    words = []
    for arg in map(_bare, args):
        if not arg.partition("=")[2].strip():  # no `=`; or nothing behind it, which Ultralytics explains
            words.append(arg)
            continue
        values.update([parse_key_value_pair(arg)])
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
        name, _, value = _bare(arg).lstrip("-").partition("=")
        if name.strip() == "flash":
            raise FlashConfigError(f"{arg} does not name a setting: flash.enabled=..., flash.backend=...")
        if not name.startswith("flash."):
            rest.append(arg)
            continue
        key = name.removeprefix("flash.").strip()
        if not value.strip():
            raise FlashConfigError(f"{arg} needs a value: flash.{key or 'backend'}=...")
        settings[key] = parse_key_value_pair(f"{key}={value}")[1]
    return settings, rest


def refuse_unusable(weights: str, what: str, mode: str | None) -> None:
    """Raise at once for weights with which Ultralytics would fail.

    Those are official weights that it would try to download for minutes, in vain, and checkpoints of YOLOv12's authors.
    """
    file = weights if "://" in weights else check_model_file_from_stem(weights)
    path = Path(file)
    if path.suffix == ".pt" and path.is_file() and names_authors_layout(path):
        converted = path.with_name(f"{path.stem}-ultralytics.pt")
        then = "use" if converted.exists() else f"type `yolo-flash convert {shlex.quote(str(path))}`, then use"
        raise UsageError(
            f"{what} has the layout of YOLOv12's authors (attention with qk and v), which Ultralytics cannot run: "
            f"{then} {converted} instead."
        )
    if not offline.out_of_reach(file):
        return
    scratch = f", or train from scratch with model={Path(file).stem}.yaml" if mode == "train" else ""
    raise UsageError(
        f"{what} is not on this machine and cannot be downloaded: {offline.why_not()}. Copy the file here{scratch}."
    )
