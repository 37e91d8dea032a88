"""What the documents say holds: tests and modules that they name are there, links lead somewhere."""

from __future__ import annotations

import functools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("**/*.md")]
STATES = ("works", "works, not faster", "off")


# Compatibility --------------------------------------------------------------------------------------------------------
def test_the_tests_that_the_tables_name_exist() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", text_of(DOCS / "compatibility.md"))
    assert len(named) > 40
    for file, name in named:
        source = text_of(Path(__file__).parent / file)
        assert not name or re.search(rf"def {name}\(", source), f"{file}::{name}"


def test_every_feature_has_a_state_and_a_test() -> None:
    text = text_of(DOCS / "compatibility.md")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(?:\w+/)?test_\w+\.py", text, re.MULTILINE)
    assert len(rows) > 40
    for feature, state in rows:
        assert state.startswith(STATES), feature


# Modules, links and pictures ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("page", "least"), [("data-flow.svg", 14), ("how-it-works.md", 15)])
def test_the_modules_that_the_drawing_and_its_page_name_exist(page: str, least: int) -> None:
    named = set(re.findall(r"(?<![\w/])(\w+/\w+\.py)\b", text_of(DOCS / page)))
    assert len(named) >= least
    assert [name for name in named if not any((ROOT / base / name).is_file() for base in ("yolo_flash", "."))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links_of(page):
        assert target.exists(), f"{target} of a link"
        assert not anchor or anchor in anchors_of(target), f"#{anchor} of {target.name}"


def test_every_document_and_result_is_linked_from_another_page() -> None:
    linked = {target for page in PAGES for target, _ in links_of(page) if target != page}
    files = {file for file in DOCS.rglob("*") if file.is_file()}
    assert sorted(str(file.relative_to(ROOT)) for file in files - linked) == []


def test_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) < 200


def test_the_picture_is_drawn_from_the_results_and_has_the_gains_that_readme_names() -> None:
    figures: list[Any] = []
    draw = runpy.run_path(str(ROOT / "scripts" / "draw_at_a_glance.py"))["draw"]
    draw.__globals__["as_png"] = figures.append
    draw()
    shown = [text.get_text() for axis in figures[0].axes for text in axis.texts]
    gains = [text for text in shown if text.endswith("x")]
    assert len(gains) == 6
    readme = text_of(ROOT / "README.md")
    assert [gain for gain in gains if gain not in readme] == []


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
    """The files in this repository that a page links, with the anchor."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            yield ((page.parent / file).resolve() if file else page), anchor


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
