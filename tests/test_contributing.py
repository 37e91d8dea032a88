"""What a contributor is told to run and to read is there, and CI runs the same checks as the one command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ultralytics.utils import YAML

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/testing.md", "docs/adding-a-backend.md", "examples/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_scripts_files_and_links_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    scripts = re.findall(r"\b(?:scripts|tests|docs)/[\w/.-]+\.(?:sh|py|md)\b", text)
    modules = re.findall(r"`(?:yolo_flash/)?((?:backends|patching|planning|dispatch|kernels)/\w+\.py)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert scripts or links
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    new = {"backends/chunked.py"}  # what the page about backends adds
    assert [name for name in modules if name not in new and not (ROOT / "yolo_flash" / name).is_file()] == []
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_ci_runs_the_one_command_on_the_oldest_and_the_newest_python() -> None:
    job = YAML.load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert "bash scripts/check.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    said = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in said
    assert "Python :: 3.13" in said


def test_the_one_command_is_lint_types_packages_and_tests() -> None:
    text = (ROOT / "scripts" / "check.sh").read_text(encoding="utf-8")
    steps = [line for line in text.splitlines() if line and not line.startswith(("#", "set ", ". "))]
    assert steps == [
        *("ruff check .", "ruff format --check .", "mypy", "bash scripts/smoke.sh", 'exec bash scripts/test.sh "$@"')
    ]


def test_the_template_of_an_issue_asks_for_what_explains_it() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.md").read_text(encoding="utf-8")
    assert "yolo-flash checks --json" in text
    assert "flash.jsonl" in text
    assert "YOLO_FLASH=0" in text
