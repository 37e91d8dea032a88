"""What docs/compatibility.md says is what tests show: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

DOC = Path(__file__).parents[1] / "docs" / "compatibility.md"
STATES = ("works", "works, not faster", "off")


def test_the_tests_that_the_tables_name_exist() -> None:
    text = DOC.read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 40
    for file, name in named:
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"def {name}\(", source), f"{file}::{name}"


def test_every_feature_has_a_state_and_a_test() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(?:\w+/)?test_\w+\.py", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 40
    for feature, state in rows:
        assert state.startswith(STATES), feature
