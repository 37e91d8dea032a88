"""The settings: their sources, which of them wins, and what is said about a mistake."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from ultralytics.utils import YAML

from yolo_flash.config import FlashConfig, FlashConfigError, config_folder, read_config_file

SOURCES = ("file", "section", "environment", "cli", "keyword")  # in the order of their rank, above the defaults
SUBSETS = [subset for n in range(len(SOURCES) + 1) for subset in itertools.combinations(SOURCES, n)]


def write(text: str, name: str = "my.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def resolve(values: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> FlashConfig:
    """Resolve with `values` in their sources; the file is named on the command line."""
    cli = dict(values.get("cli", {}))
    if "file" in values:
        YAML.save("settings.yaml", values["file"])
        cli["config"] = "settings.yaml"
    for key, value in values.get("environment", {}).items():
        monkeypatch.setenv(f"YOLO_FLASH_{key.upper()}", str(value))
    return FlashConfig.resolve(section=values.get("section"), cli=cli, **values.get("keyword", {}))


def test_without_any_source_the_defaults_hold() -> None:
    assert FlashConfig.resolve() == FlashConfig(
        enabled=True, backend="auto", layers={}, deterministic="prefer", log=True
    )


@pytest.mark.parametrize("present", SUBSETS, ids=lambda subset: "+".join(subset) or "none")
def test_the_highest_source_that_names_a_key_wins(present: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve({source: {"backend": f"from_{source}"} for source in present}, monkeypatch)
    assert config.backend == (f"from_{present[-1]}" if present else "auto")


def test_sources_complete_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, dict[str, Any]] = {
        "file": {"deterministic": "strict"},
        "section": {"layers": {"model.6.*": "stock"}},
        "environment": {"log": "False"},
        "cli": {"backend": "sdpa_math"},
        "keyword": {"enabled": False},
    }
    assert resolve(values, monkeypatch) == FlashConfig(
        enabled=False, backend="sdpa_math", layers={"model.6.*": "stock"}, deterministic="strict", log=False
    )


def test_any_source_may_name_the_file_and_the_highest_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SOURCES[1:]:
        write(f"backend: of_{name}", f"{name}.yaml")
    assert FlashConfig.resolve(section={"config": "section.yaml"}).backend == "of_section"
    monkeypatch.setenv("YOLO_FLASH_CONFIG", "environment.yaml")
    assert FlashConfig.resolve(section={"config": "section.yaml"}).backend == "of_environment"
    assert FlashConfig.resolve(cli={"config": "cli.yaml"}).backend == "of_cli"
    assert FlashConfig.resolve(cli={"config": "cli.yaml"}, config="keyword.yaml").backend == "of_keyword"
    assert FlashConfig.resolve(section={"backend": "stock"}, cli={"config": "cli.yaml"}).backend == "stock"


# YOLO_FLASH ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["0", "false", "False", " 0 "])
def test_the_switch_turns_all_off_against_every_other_source(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH", value)
    on = {"enabled": True}
    assert resolve(dict.fromkeys(SOURCES, on), monkeypatch).enabled is False


@pytest.mark.parametrize("value", ["", "1", "true"])
def test_the_switch_does_not_turn_on_what_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH", value)
    assert FlashConfig.resolve().enabled is True
    assert FlashConfig.resolve(enabled=False).enabled is False


def test_a_switch_that_is_neither_on_nor_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH", "maybe")
    with pytest.raises(FlashConfigError, match="YOLO_FLASH must be true or false, found 'maybe'"):
        FlashConfig.resolve()


# The environment -----------------------------------------------------------------------------------------------------
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH_BACKEND", " ")
    assert FlashConfig.resolve().backend == "auto"


def test_the_folder_of_data_sets_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH_DATASETS", "/data")
    assert FlashConfig.resolve() == FlashConfig()


def test_layers_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH_LAYERS", "model.6.*:stock")
    assert FlashConfig.resolve().layers == {"model.6.*": "stock"}


# Layers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "model.6.*:stock,model.[89]*:sdpa_math",
        " model.6.* : stock , model.[89]*:sdpa_math, ",
        "{model.6.*: stock, model.[89]*: sdpa_math}",
        "{'model.6.*': stock, \"model.[89]*\": sdpa_math}",
    ],
)
def test_layers_as_typed_in_a_shell(text: str) -> None:
    layers = FlashConfig(layers=text).layers  # type: ignore[arg-type]
    assert list(layers.items()) == [("model.6.*", "stock"), ("model.[89]*", "sdpa_math")]  # in order: the last wins


def test_layers_are_a_copy_of_what_was_given() -> None:
    given = {"model.6.*": "stock"}
    config = FlashConfig(layers=given)
    given["model.8.*"] = "stock"
    assert config.layers == {"model.6.*": "stock"}


@pytest.mark.parametrize("wrong", ["model.6", "model.6.*=stock", "model.6.*:", ":stock", "a:stock,model.8"])
def test_a_pattern_without_backend_is_an_error_and_not_dropped(wrong: str) -> None:
    with pytest.raises(FlashConfigError, match=re.escape(f"as in 'model.6.*:stock', found {wrong!r}")):
        FlashConfig(layers=wrong)  # type: ignore[arg-type]


# Mistakes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "told_as"),
    [
        ("file", "settings.yaml"),
        ("section", "the flash: section"),
        ("environment", "the environment"),
        ("cli", "the command line"),
        ("keyword", "the keyword arguments"),
    ],
)
def test_an_unknown_key_is_told_with_its_source_and_the_nearest_name(
    source: str, told_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FlashConfigError) as error:
        resolve({source: {"backnd": "stock"}}, monkeypatch)
    assert str(error.value).startswith(f"{told_as}: there is no setting 'backnd'. Did you mean 'backend'? Valid: ")
    for field in dataclasses.fields(FlashConfig):
        assert field.name in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("enabled", "ture", "enabled must be true or false, found 'ture'"),
        ("enabled", 2, "enabled must be true or false, found 2"),
        ("enabled", None, "enabled must be true or false, found None"),
        ("log", 0.5, "log must be true or false, found 0.5"),
        ("backend", 3, "backend must be str, found 3"),
        ("backend", None, "backend must be str, found None"),
        ("layers", ["model.6.*"], "layers must map layer patterns to backend names, found ['model.6.*']"),
        ("layers", {"model.6.*": 1}, "layers must map layer patterns to backend names, found {'model.6.*': 1}"),
        ("deterministic", "stric", "deterministic='stric' is not valid. Did you mean 'strict'? Valid: prefer, strict."),
        ("deterministic", True, "deterministic=True is not valid."),
    ],
)
def test_a_wrong_value_is_told_with_what_is_valid(key: str, value: Any, told: str) -> None:
    with pytest.raises(FlashConfigError, match=re.escape(told)):
        FlashConfig.resolve(**{key: value})


@pytest.mark.parametrize("value", [0, 1])
def test_zero_and_one_are_booleans(value: int) -> None:
    assert FlashConfig(log=value).log is bool(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("section", [False, "strict", ["backend"]])
def test_a_section_that_is_no_mapping_is_an_error(section: Any) -> None:
    with pytest.raises(FlashConfigError, match="the flash: section must map keys to values, found"):
        FlashConfig.resolve(section=section)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FlashConfig().backend = "stock"  # type: ignore[misc]


# Files ---------------------------------------------------------------------------------------------------------------
def test_default_yaml_shows_every_key_with_its_default_in_order() -> None:
    assert list(read_config_file("default").items()) == list(dataclasses.asdict(FlashConfig()).items())


def test_default_yaml_explains_every_key_in_a_comment_above_it() -> None:
    blocks = (config_folder() / "default.yaml").read_text(encoding="utf-8").strip().split("\n\n")[1:]
    explained = {block.splitlines()[-1].split(":")[0]: block.splitlines()[:-1] for block in blocks}
    assert list(explained) == [field.name for field in dataclasses.fields(FlashConfig)]
    for key, comment in explained.items():
        assert comment, f"{key} has no comment"
        assert all(line.startswith("# ") for line in comment), key


def test_every_shipped_file_is_valid() -> None:
    names = [file.stem for file in config_folder().glob("*.yaml")]
    assert set(names) == {"default", "high_resolution", "strict"}
    for name in names:
        FlashConfig.resolve(config=name)


def test_strict_is_shipped_under_its_name() -> None:
    assert FlashConfig.resolve(config="strict") == FlashConfig(deterministic="strict")


def test_high_resolution_is_shipped_under_its_name() -> None:
    assert FlashConfig.resolve(config="high_resolution") == FlashConfig(graphs="off")
    assert FlashConfig.resolve(config="high_resolution", cli={"graphs": "auto"}) == FlashConfig()


def test_every_key_that_a_shipped_file_changes_is_explained_above_it() -> None:
    for file in config_folder().glob("*.yaml"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            assert not line or line.startswith("#") or lines[number - 1].startswith("# "), f"{file.name}: {line}"


def test_the_wheel_has_the_folder_of_shipped_files() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    [folder] = re.findall(r'^"(.+)" = "yolo_flash/configs"$', pyproject, re.MULTILINE)
    assert (Path(__file__).parents[1] / folder).resolve() == config_folder().resolve()


def test_a_file_may_hold_its_settings_in_a_flash_section() -> None:
    write("epochs: 3\nflash:\n  backend: stock\n")
    assert FlashConfig.resolve(config="my.yaml").backend == "stock"
    assert FlashConfig.resolve(config=Path("my.yaml").resolve()).backend == "stock"


def test_an_empty_file_sets_nothing() -> None:
    write("# nothing yet\n")
    assert FlashConfig.resolve(config="my.yaml") == FlashConfig()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("strikt", "flash.config=strikt: no such file, and not a shipped one. Did you mean 'strict'? Valid: default"),
        ("strict.yaml", "Did you mean 'strict'?"),
        ("gone/my.yaml", "flash.config=gone/my.yaml: no such file"),
        (1, "flash.config=1: no such file"),
        (".", "flash.config=.: no such file"),
    ],
)
def test_a_file_that_is_not_there_is_told_with_the_shipped_names(name: Any, told: str) -> None:
    with pytest.raises(FlashConfigError, match=re.escape(told)):
        FlashConfig.resolve(config=name)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("my.toml", "backend = 'stock'", "Not a YAML file: my.toml"),
        ("my.yaml", "[1, 2", "YAML syntax error"),
        ("my.yaml", "just words", "not a valid YAML mapping"),
        ("my.yaml", "flash: [backend]", "my.yaml must map keys to values, found ['backend']"),
        ("my.yaml", "config: strict", "my.yaml: a file of settings cannot name another one, config='strict'"),
    ],
)
def test_a_file_that_holds_no_settings_is_told(file: str, text: str, told: str) -> None:
    write(text, file)
    with pytest.raises(FlashConfigError, match=re.escape(told)):
        FlashConfig.resolve(config=file)
