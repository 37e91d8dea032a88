"""docs/adding-a-backend.md: who follows the page gets a backend and a block that the whole package knows."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ultralytics.nn.modules.block import Attention

import yolo_flash
from tests.counting import AttentionCalls, randomise
from yolo_flash import FlashConfig
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.patching import blocks, patch

PACKAGE = Path(yolo_flash.__file__).parent
DOCS = PACKAGE.parent / "docs"
MODULE, TABLE, SEE_IT, BLOCK = re.findall(
    r"^```python\n(.*?)^```", (DOCS / "adding-a-backend.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_a_backend_that_is_added_as_the_page_says_is_listed_and_proved(tmp_path: Path, tiny_model: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "yolo_flash", ignore=shutil.ignore_patterns("__pycache__"))
    backends = tmp_path / "yolo_flash" / "backends"
    (backends / "chunked.py").write_text(MODULE, encoding="utf-8")
    table = (backends / "registry.py").read_text(encoding="utf-8")
    imported, *_, row = TABLE.splitlines()
    before = row.replace("CHUNKED, ", "")
    assert table.count(before) == 1  # else the page shows a line that is no longer there
    table = table.replace(before, row).replace("from .installed", f"{imported}\nfrom .installed")
    (backends / "registry.py").write_text(table, encoding="utf-8")
    assert "yolo12n.yaml" in SEE_IT
    (tmp_path / "see_it.py").write_text(SEE_IT.replace("yolo12n.yaml", tiny_model), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "see_it.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    text = run.stdout + run.stderr
    assert run.returncode == 0, text
    assert len(re.findall(r"^  chunked +ready$", text, re.MULTILINE)) == 2  # of YOLO12's and YOLO26's layers
    assert re.search(r"^  chunked +takes the packed output", text, re.MULTILINE)  # of RT-DETR's
    assert re.search(r"^model\.3\.m\.0\.0\.attn chunked 8 x 2 heads x 16 tokens x 32, float32", text, re.MULTILINE)
    assert re.search(r"^error \d\.\de-\d\d, [\d.]+ ms$", text, re.MULTILINE)
    assert "True {'chunked'}" in text


def test_a_block_that_is_added_as_the_page_says_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCK in (PACKAGE / "patching" / "blocks.py").read_text(encoding="utf-8")
    block = randomise(Attention(128, 2))
    x = torch.randn(2, 128, 5, 6)
    with monkeypatch.context() as without:
        without.delitem(patch.BLOCKS, Attention)
        assert patch.known_blocks(block) == {}
        space = dict(vars(blocks))
        exec(BLOCK, space)
        without.setitem(patch.BLOCKS, Attention, space["FlashAttention"])
        patched = copy.deepcopy(block)
        patch.patch_modules(patched, FlashConfig(backend="sdpa_flash"))
        with AttentionCalls() as calls:
            found = patched(x)
    assert calls.forward == {"sdpa_flash": 1}
    torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-5)


def test_every_backend_has_a_row_in_the_table_of_what_it_refuses() -> None:
    text = (DOCS / "backends.md").read_text(encoding="utf-8")
    table = text.partition("## What each backend refuses")[2].partition("\n\n| backend | separate")[0]
    named = [name for row in re.findall(r"^\|([^|]+)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(BACKENDS)
