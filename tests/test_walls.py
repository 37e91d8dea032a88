"""The order of the wings: each imports those below, and none above. The syntax trees tell, late imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import yolo_flash

PACKAGE = Path(yolo_flash.__file__).parent
ORDER = (  # from the top; config.py and machine.py lie at the root, as do the files of the package itself
    *("cli", "bench", "engine", "verification", "planning", "patching", "dispatch", "backends", "kernels"),
    *("graphs", "checkpoints", "assets", "config", "machine", "utils"),
)
WALLS: dict[str, set[str]] = {  # not even what lies below
    "graphs": {"utils"},  # models without attention run from graphs too
    "checkpoints": {"utils"},  # layouts of weights, and nothing of how they are run
    "utils": set(),  # no attention in there
    "assets": set(),
    "config": {"utils"},
    "machine": set(),
    "kernels": {"machine"},
    "backends": {"kernels", "machine", "utils"},
    "engine": set(ORDER) - {"cli", "bench", "verification"},  # a run needs no proof
    "verification": set(ORDER) - {"cli", "bench", "engine", "graphs"},  # the plan of this machine, and nothing of a run
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """The wings that a file imports, its own left out."""
    *folders, _ = file.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("yolo_flash.")}
        elif isinstance(node, ast.ImportFrom):
            module = [part for part in (node.module or "").split(".") if part]
            if node.level:
                module = [*folders[: len(folders) - node.level + 1], *module]
            elif module[:1] == ["yolo_flash"]:
                module = module[1:]
            else:
                continue
            found |= {module[0]} if module else {alias.name for alias in node.names}
    return found - {wing_of(file)}


def wing_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_folder_is_a_wing() -> None:
    assert {wing_of(file) for file in FILES} == {*ORDER, "__init__", "__main__", "_version"}
    for wing in PACKAGE.iterdir():
        if wing.is_dir() and wing.name != "__pycache__":
            source = (wing / "__init__.py").read_text(encoding="utf-8")
            assert [type(node) for node in ast.parse(source).body] == [ast.Expr], wing.name  # what it is for, no import


def test_no_wing_has_a_public_name() -> None:
    """Importing `yolo_flash.verify.compare` would put the wing in the place of the function `yolo_flash.verify`."""
    assert not set(ORDER) & set(yolo_flash.__all__)


@pytest.mark.parametrize("file", [file for file in FILES if wing_of(file) in ORDER], ids=lambda file: file.stem)
def test_no_file_imports_from_a_wing_above(file: Path) -> None:
    wing = wing_of(file)
    below = set(ORDER[ORDER.index(wing) + 1 :])
    allowed = WALLS.get(wing, below) | {"_version"}
    assert imports(file) <= allowed


def test_every_module_of_tests_says_what_it_guards() -> None:
    """In a sentence about what users or other code may rely on, and not in the name of the module once more."""
    for file in Path(__file__).parent.rglob("test_*.py"):
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first, *_ = said.splitlines() or [""]
        assert len(first) > 40, file
        assert first.endswith("."), file
        assert not first.startswith("Test"), file


def test_no_file_is_longer_than_a_reader_holds() -> None:
    assert {file.name: n for file in FILES if (n := len(file.read_text(encoding="utf-8").splitlines())) > 400} == {}
