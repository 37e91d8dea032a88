"""Two ranks through Ultralytics' own launcher: both patched, by one plan, with the settings of the parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from ultralytics import YOLO

from tests.counting import LAYERS
from tests.gloo import GlooTrainer, GraphTrainer, count_epochs
from tests.patching.test_patch import patched_layers
from yolo_flash import FlashConfig, patch_model

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"), reason="gloo cannot gather what Ultralytics' validator hands it"
)


@pytest.mark.parametrize(("start", "backend"), [("yaml", "sdpa_flash"), ("pt", "auto")])
def test_both_ranks_are_patched(
    start: str,
    backend: str,
    tiny_model: str,
    tiny_args: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With auto by the numbers of rank 0: rank 1 is given some by which it would take stock."""
    monkeypatch.setenv("REPORT_FOLDER", str(tmp_path))
    if start == "pt":
        torch.manual_seed(0)
        YOLO(tiny_model).save(str(tmp_path / "start.pt"))
    model = patch_model(YOLO(tiny_model if start == "yaml" else str(tmp_path / "start.pt")), backend=backend)
    model.add_callback("on_train_epoch_end", count_epochs)
    model.train(trainer=GlooTrainer, **{**tiny_args, "batch": 4, "imgsz": 64})

    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for facts in ranks:
        assert facts["patched"] == facts["patched ema"] == LAYERS
        assert facts["backward"] == LAYERS  # layers x batches of this rank
        assert facts["config"] == str(FlashConfig(backend=backend))
        assert {name for _, _, name, _ in facts["plan"]} == {"sdpa_flash"}
        assert facts["ms"] == [{"stock": 2.0, "sdpa_flash": 1.0} if backend == "auto" else {}] * 2 * LAYERS
    assert ranks[0]["plan"] == ranks[1]["plan"]
    assert "8 x 2 heads" in ranks[0]["plan"][0][3]  # 2 images a rank x 4 areas
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert {(tmp_path / f"callback{rank}.txt").read_text() for rank in (0, 1)} == {"1"}

    assert patched_layers(model.model) == LAYERS  # the parent holds the trained checkpoint, patched
    assert Path(model.trainer.best).is_file()


def test_ranks_run_from_graphs_or_none_does(
    tiny_model: str, tiny_args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights after training are those of eager ranks, as they all are where one cannot, and the same on both."""
    weights: dict[str, list[float]] = {}
    for case, mode, without in (("graphs", "on", ""), ("one cannot", "auto", "1")):
        folder = tmp_path / case
        folder.mkdir()
        monkeypatch.setenv("REPORT_FOLDER", str(folder))
        monkeypatch.setenv("NO_GRAPHS_ON", without)
        model = patch_model(YOLO(tiny_model), graphs=mode)
        # Four images a step on two ranks: one step an epoch, of which the first runs eager, under auto the first four.
        model.train(trainer=GraphTrainer, **{**tiny_args, "batch": 4, "nbs": 4, "imgsz": 32, "epochs": 5})
        told = [json.loads((folder / f"graphs{rank}.json").read_text()) for rank in (0, 1)]
        assert [facts["replayed"] for facts in told] == {"graphs": [4, 4]}.get(case, [0, 0])
        ours = [False, *[case == "graphs"] * 4]
        assert [facts["averaged"] for facts in told] == [ours, ours]
        assert all(facts["given back"] for facts in told)
        if case == "one cannot":
            assert [facts["why_not"] for facts in told] == ["another rank cannot", "RuntimeError: not on this rank"]
        weights[case] = [json.loads((folder / f"rank{rank}.json").read_text())["weights"] for rank in (0, 1)]
        assert weights[case][0] == weights[case][1]
    assert weights["graphs"] == pytest.approx(weights["one cannot"], rel=1e-6)
