"""docs/configuration.md and configs/default.yaml are what scripts/make_reference.py writes, and its examples hold."""

from __future__ import annotations

import dataclasses
import runpy
import shlex
from pathlib import Path

import pytest

from yolo_flash import FlashConfig
from yolo_flash.cli.arguments import split_settings
from yolo_flash.cli.main import HELP

ROOT = Path(__file__).parents[1]
SETTINGS = [field.name for field in dataclasses.fields(FlashConfig)]
reference = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("docs/configuration.md", "configuration_page"), ("configs/default.yaml", "default_yaml")],
)
def test_the_written_files_are_not_stale(file: str, content: str) -> None:
    assert (ROOT / file).read_text(encoding="utf-8") == reference[content](), "run python scripts/make_reference.py"


def test_every_setting_is_explained_and_nothing_else_is() -> None:
    told = reference["descriptions"]()
    assert list(told) == SETTINGS
    assert all(text.endswith((".", ":")) and len(text) > 30 for text in told.values())


@pytest.mark.parametrize("key", SETTINGS)
def test_an_example_means_the_same_in_every_place(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = FlashConfig(**{key: reference["EXAMPLES"][key]})
    assert wanted != FlashConfig()
    spelled = reference["spellings"](key)
    settings, rest = split_settings(shlex.split(spelled["command line"]))
    assert rest == []
    assert FlashConfig.resolve(cli=settings) == wanted
    Path("mine.yaml").write_text(spelled["YAML"])
    assert FlashConfig.resolve(config="mine.yaml") == wanted
    assert eval(f"FlashConfig({spelled['Python']})") == wanted
    name, _, value = shlex.split(spelled["environment"])[0].partition("=")
    monkeypatch.setenv(name, value)
    assert FlashConfig.resolve() == wanted


def test_the_help_screen_names_every_setting() -> None:
    assert [key for key in (*SETTINGS, "config") if f"flash.{key}=" not in HELP] == []
