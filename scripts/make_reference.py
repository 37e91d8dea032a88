"""Write docs/configuration.md and configs/default.yaml from FlashConfig. Usage: python scripts/make_reference.py"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

from yolo_flash.backends.registry import BACKENDS
from yolo_flash.config import ENV, FlashConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES: dict[str, Any] = {  # a value of each setting that is not its default
    "enabled": False,
    "backend": "sdpa_flash",
    "layers": {"model.6.*": "stock"},
    "window": "512px",
    "deterministic": "strict",
    "autotune": False,
    "graphs": "off",
    "log": False,
}
DEFAULT_YAML = """\
# Every setting of yolo-flash with its default. The same keys work as `flash.key=value` on the command line, as
# YOLO_FLASH_KEY in the environment, as keyword arguments of patch_model and in a `flash:` section of a cfg= file.
# Written from FlashConfig in yolo_flash/config.py by scripts/make_reference.py.
"""
PAGE = """\
# Configuration

<!-- Written from FlashConfig in yolo_flash/config.py by scripts/make_reference.py: edit there, and run it. -->

Every setting has the same name in all places:

| place | how | example |
| --- | --- | --- |
| command line | `flash.KEY=VALUE` | `yolo-flash train model=yolo12n.yaml data=coco8.yaml flash.backend=sdpa_flash` |
| environment | `YOLO_FLASH_KEY`; an empty one counts as unset | `YOLO_FLASH_BACKEND=sdpa_flash` |
| YAML | a `flash:` section of the file that `cfg=` names, or a file of its own | `flash: {backend: sdpa_flash}` |
| Python | keywords of `patch_model`, `verify` and `FlashConfig` | `patch_model(model, backend="sdpa_flash")` |

Later wins: defaults, the file that `config` names, the `flash:` section, the environment, the command line, keywords in
Python. Only `YOLO_FLASH=0` wins over all: it switches everything off. A key that does not exist, or a value that a key
cannot have, is an error which names what is valid.

`config` (`flash.config=strict`, `YOLO_FLASH_CONFIG`, `config="strict"` in Python) reads the settings of a YAML file:
yours by its path, or a shipped one by its name. [`strict`](../configs/strict.yaml) is bitwise reproducible,
[`high_resolution`](../configs/high_resolution.yaml) leaves the memory to pixels, [`default`](../configs/default.yaml)
has every setting with its default.

| setting | values | default |
| --- | --- | --- |
"""


def descriptions() -> dict[str, str]:
    """Setting -> what the docstring of FlashConfig says about it, on one line."""
    section = (inspect.getdoc(FlashConfig) or "").partition("Attributes:\n")[2].partition("\n\nRaises:")[0]
    entries = re.split(r"^ {4}(?=\w+: )", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def values(key: str, kind: Any) -> str:
    """What a setting can have, as Markdown."""
    if key == "backend":
        return ", ".join(f"`{name}`" for name in ("auto", *BACKENDS))
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{name}`" for name in typing.get_args(kind))
    return {"layers": "pattern: backend", "window": 'tokens, or pixels as `"256px"`'}.get(key, "`true`, `false`")


def spellings(key: str) -> dict[str, str]:
    """Place -> the example of a setting as one writes it there."""
    value = EXAMPLES[key]
    text = json.dumps(value).strip('"')
    in_shell = f"'{','.join(map(':'.join, value.items()))}'" if isinstance(value, dict) else text
    return {
        "command line": f"flash.{key}={in_shell}",
        "environment": f"{ENV}_{key.upper()}={in_shell}",
        "YAML": f"{key}: {text}",
        "Python": f"{key}={value!r}".replace("'", '"'),
    }


def configuration_page() -> str:
    """The content of docs/configuration.md."""
    told, kinds = descriptions(), typing.get_type_hints(FlashConfig)
    defaults = dataclasses.asdict(FlashConfig())
    rows = [f"| [`{key}`](#{key}) | {values(key, kinds[key])} | `{json.dumps(defaults[key])}` |" for key in defaults]
    sections = []
    for key in defaults:
        places = [f"{place} `{text}`" for place, text in spellings(key).items()]
        sections.append(f"\n## {key}\n\n{told[key]}\n\nFor example: {'; '.join(places)}.")
    return PAGE + "\n".join([*rows, *sections]) + "\n"


def default_yaml() -> str:
    """The content of configs/default.yaml."""
    told = descriptions()
    blocks = [
        "\n".join([*textwrap.wrap(told[key], 120, initial_indent="# ", subsequent_indent="# "), f"{key}: {text}"])
        for key, value in dataclasses.asdict(FlashConfig()).items()
        for text in [json.dumps(value).strip('"')]
    ]
    return "\n\n".join([DEFAULT_YAML.strip(), *blocks]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (ROOT / "configs" / "default.yaml").write_text(default_yaml(), encoding="utf-8")
