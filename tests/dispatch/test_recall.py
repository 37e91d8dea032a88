"""Who goes by what was measured: later runs and predictions, never one rank alone; and cards without numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO

from tests.machines import MACHINES
from tests.planning.test_autotune import CPU, PSA, forbid
from yolo_flash import FlashConfig, patch_model, plan
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch import dispatcher, trial_cache
from yolo_flash.dispatch.decision import Trial, select
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.machine import Machine, detect
from yolo_flash.patching.blocks import FlashBlock

pytestmark = pytest.mark.measures
FAST = {"stock": Trial(ms=2.0, ms_low=1.9), "sdpa_flash": Trial(ms=1.0, ms_low=0.9)}
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")


# What files lack ---------------------------------------------------------------------------------------------------
WHOLE = PSA._replace(batch=64, seq_len_q=400, seq_len_k=400)  # for which the rules take flash
SLOW = {"stock": Trial(ms=1.0, ms_low=0.9), "sdpa_flash": Trial(ms=3.0, ms_low=2.9)}


def test_a_file_without_what_failed_does_not_make_stock_the_fastest() -> None:
    """Kept is what went well; where that is stock alone, nothing was compared."""
    assert Dispatcher(FlashConfig()).decide(WHOLE, "auto", CPU).backend == "sdpa_flash"
    failed = Trial(why_not="failed in its trial: transient")
    trial_cache.store({WHOLE: {"stock": Trial(ms=5.0, ms_low=4.9), "sdpa_flash": failed}}, detect(CPU))
    assert list(trial_cache.folder().iterdir())
    for batch in (64, 48):
        decision = Dispatcher(FlashConfig()).decide(WHOLE._replace(batch=batch), "auto", CPU)
        assert (decision.backend, decision.by_rules) == ("sdpa_flash", True)


def test_files_of_other_runs_change_nothing_near_what_this_run_has_measured() -> None:
    mine, near = WHOLE._replace(batch=64), WHOLE._replace(batch=20)
    trial_cache.store({WHOLE._replace(batch=16): SLOW}, detect(CPU))
    run = Dispatcher(FlashConfig())
    run.learn({mine: FAST}, detect(CPU))
    run.recall(CPU)
    assert run.decide(near, "auto", CPU).why == f"as measured for 64 x {WHOLE.seq_len_q} tokens"
    assert Dispatcher(FlashConfig()).decide(near, "auto", CPU).why == f"as measured for 16 x {WHOLE.seq_len_q} tokens"


@pytest.mark.parametrize(
    ("tokens", "trials", "backend", "by_rules"),
    [
        (16384, {"stock": Trial(ms=1.0, ms_low=0.9), "sdpa_flash": Trial(ms=1.1, ms_low=1.0)}, "sdpa_flash", False),
        (16384, {"stock": Trial(ms=1.0, ms_low=0.9)}, "sdpa_flash", True),
        (16384, {"stock": Trial(ms=1.0), "sdpa_flash": Trial(why_not="wrong: out is off")}, "stock", True),
        (8192, {"stock": Trial(ms=1.0, ms_low=0.9), "sdpa_flash": Trial(ms=1.1, ms_low=1.0)}, "stock", False),
    ],
    ids=["measured fused", "by the rules", "nothing else is left", "smaller"],
)
def test_stock_is_not_carried_over_to_images_whose_scores_would_fill_the_memory(
    tokens: int, trials: dict[str, Trial], backend: str, by_rules: bool
) -> None:
    """Twice as wide an image has sixteen times the scores: where stock was the fastest, they were no matter."""
    measured = PSA._replace(batch=1, seq_len_q=4096, seq_len_k=4096)
    run = Dispatcher(FlashConfig())
    run.learn({measured: trials}, detect(CPU))
    assert run.decide(measured, "auto", CPU).backend == ("stock" if "stock" in trials else "sdpa_flash")
    large = run.decide(measured._replace(seq_len_q=tokens, seq_len_k=tokens), "auto", CPU)
    assert (large.backend, large.by_rules) == (backend, by_rules)


def test_a_plan_knows_what_the_steps_will_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_flash.planning.autotune.measure", lambda specs, device: {})  # it failed, say
    model = patch_model(YOLO("yolo12n.yaml"))
    rows = plan(model, imgsz=64, batch=2, device="cpu")
    trial_cache.store({row.decision.spec: SLOW for row in rows}, detect(CPU))
    model = patch_model(YOLO("yolo12n.yaml"))
    rows = plan(model, imgsz=64, batch=2, device="cpu")
    mine = model.model.model[6].m[0][0].attn._flash_dispatcher
    assert {row.decision.why for row in rows} == {"the fastest measured"}
    for row in rows:
        assert mine.decide(row.decision.spec, "auto", CPU).backend == row.decision.backend == "stock"


# Earlier runs ---------------------------------------------------------------------------------------------------------
TINY = PSA._replace(seq_len_q=9, seq_len_k=9)  # for which the rules take stock


def test_a_prediction_goes_by_what_an_earlier_run_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    assert Dispatcher(FlashConfig()).decide(TINY, "auto", CPU).backend == "stock"
    trial_cache.store({TINY: FAST}, detect(CPU))
    decision = Dispatcher(FlashConfig()).decide(TINY, "auto", CPU)
    assert (decision.backend, decision.ms) == ("sdpa_flash", {"stock": 2.0, "sdpa_flash": 1.0})
    near = TINY._replace(seq_len_q=12, seq_len_k=12)
    assert Dispatcher(FlashConfig()).decide(near, "auto", CPU).why == "as measured for 2 x 9 tokens"
    assert Dispatcher(FlashConfig(autotune=False)).decide(TINY, "auto", CPU).backend == "stock"


def test_a_predicting_model_reads_the_cache_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    model = patch_model(YOLO("yolo12n.yaml"))
    model.predict(torch.zeros(1, 3, 64, 64), device="cpu", verbose=False)
    met = {spec for spec, *_ in model.model.model[6].m[0][0].attn._flash_dispatcher._decisions}
    assert met
    trial_cache.store(dict.fromkeys(met, FAST), detect(CPU))
    model = patch_model(YOLO("yolo12n.yaml"))
    model.predict(torch.zeros(1, 3, 64, 64), device="cpu", verbose=False)
    decisions = model.model.model[6].m[0][0].attn._flash_dispatcher._decisions.values()
    assert {decision.backend for decision in decisions} == {"sdpa_flash"}


def test_the_cache_is_read_once_and_not_at_the_wrong_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Machine] = []

    def known(machine: Machine) -> dict[AttentionSpec, Any]:
        reads.append(machine)
        return {TINY: FAST}

    monkeypatch.setattr(trial_cache, "known", known)
    mine = Dispatcher(FlashConfig())
    mine.decide(TINY, "sdpa_flash", CPU)  # asked for
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert mine.decide(TINY, "auto", CPU).backend == "stock"
    mine.decide_for_compile("", "auto", TINY.without_sizes(), "cpu")
    for name, value in (("RANK", 0), ("dist", Ranks)):
        with monkeypatch.context() as rank:  # whose files may be others
            rank.setattr(dispatcher, name, value)
            mine.decide(TINY._replace(batch=3), "auto", CPU)
    assert not reads
    assert mine.decide(TINY._replace(batch=1), "auto", CPU).backend == "sdpa_flash"
    assert mine.decide(TINY, "auto", CPU).backend == "sdpa_flash"  # and not as before
    mine.decide(TINY._replace(batch=4), "auto", CPU)
    assert len(reads) == 1


class Ranks:
    """In the place of `torch.distributed`, in a process group."""

    is_available = is_initialized = staticmethod(lambda: True)


def test_what_a_run_has_learnt_comes_before_what_is_known() -> None:
    trial_cache.store({TINY: FAST}, detect(CPU))
    mine = Dispatcher(FlashConfig())
    mine.learn({TINY: {"stock": Trial(ms=1.0), "sdpa_flash": Trial(ms=9.0, ms_low=9.0)}}, detect(CPU))
    assert mine.decide(TINY, "auto", CPU).backend == "stock"
    other = Dispatcher(FlashConfig())
    other.take_over(mine)
    assert other.decide(TINY, "auto", CPU).ms["sdpa_flash"] == 9.0  # fresher than the file


def test_a_trained_model_predicts_by_the_trials_of_its_run(
    tiny_args: dict[str, Any], tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where nothing can be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "file")
    model = patch_model(YOLO(tiny_model))
    model.train(**tiny_args)
    forbid(monkeypatch)
    mine = next(block._flash_dispatcher for block in model.model.modules() if isinstance(block, FlashBlock))
    assert mine is not model.trainer.flash_run.dispatcher
    for row in model.trainer.flash_plan:
        again = mine.decide(row.decision.spec, "auto", CPU)
        assert (again.backend, again.trials) == (row.decision.backend, row.decision.trials)


# Other cards ----------------------------------------------------------------------------------------------------------
SMALL = AttentionSpec(4, 2, 100, 100, 32, 32, torch.float32, "nchw", training=False)


@pytest.mark.parametrize("card", ["P100", "T4", "A100", "RTX 3090", "RTX 4090", "B200", "RTX 5090", "MI300"])
def test_the_rules_of_one_card_do_not_speak_of_another(card: str) -> None:
    assert select(SMALL, MACHINES[card]).why == (
        "below 4,000,000 scores fused attention gained nothing on an H100; not measured on this card"
    )
    assert select(SMALL, MACHINES["H100"]).why == "below 4,000,000 scores fused attention gains nothing here"


def predicting(
    card: str, monkeypatch: pytest.MonkeyPatch, result: Any = None
) -> tuple[Dispatcher, list[AttentionSpec]]:
    """A Dispatcher on a card that is not there, and the specs that it has had measured."""
    measured: list[AttentionSpec] = []

    def measure(specs: list[AttentionSpec], device: torch.device) -> Any:
        measured.extend(specs)
        if isinstance(result, Exception):
            raise result
        return {spec: {"stock": Trial(ms=2.0), "sdpa_efficient": Trial(ms=1.0)} for spec in specs}

    monkeypatch.setattr(dispatcher, "detect", lambda device: MACHINES[card])
    mine = Dispatcher(FlashConfig())
    mine.measure = measure
    return mine, measured


def test_a_shape_that_comes_again_in_prediction_is_measured_on_a_card_without_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, measured = predicting("T4", monkeypatch)
    backends = [mine.decide(SMALL, "auto", CARD).backend for _ in range(5)]
    assert backends == ["stock", "stock", "sdpa_efficient", "sdpa_efficient", "sdpa_efficient"]
    assert measured == [SMALL]


def test_layers_of_one_forward_are_not_taken_for_a_shape_that_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    mine.layers = 4
    for _ in range(8):  # two forwards
        mine.decide(SMALL, "auto", CARD)
    assert not measured
    mine.decide(SMALL, "auto", CARD)
    assert measured == [SMALL]
    assert patch_model(YOLO("yolo12n.yaml")).model.model[6].m[0][0].attn._flash_dispatcher.layers == 8


def test_nothing_is_measured_within_a_training_or_on_the_card_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, AttentionSpec, str, torch.device]] = [
        ("H100", SMALL, "auto", CARD),
        ("T4", SMALL._replace(training=True), "auto", CARD),
        ("T4", SMALL, "sdpa_efficient", CARD),
        ("CPU", SMALL, "auto", CPU),
    ]
    for card, spec, choice, device in cases:
        mine, measured = predicting(card, monkeypatch)
        for _ in range(9):
            mine.decide(spec, choice, device)
        assert not measured
        assert not mine._met
    assert Dispatcher(FlashConfig()).measure is None  # that of a trainer
    mine, measured = predicting("T4", monkeypatch)
    mine.config = FlashConfig(autotune=False)
    for _ in range(9):
        mine.decide(SMALL, "auto", CARD)
    assert not measured


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    with monkeypatch.context() as capturing:
        capturing.setattr(dispatcher, "_is_traced", lambda device: True)
        for _ in range(9):
            mine.decide(SMALL, "auto", CARD)
        assert not measured
    mine.decide(SMALL, "auto", CARD)
    assert measured == [SMALL]


@pytest.mark.parametrize("result", [RuntimeError("boom")])
def test_a_measurement_that_fails_is_not_repeated_and_ends_no_prediction(
    result: Any, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    mine, measured = predicting("T4", monkeypatch, result)
    assert {mine.decide(SMALL, "auto", CARD).backend for _ in range(9)} == {"stock"}
    assert measured == [SMALL]
    assert len([line for line in log if "could not be measured: RuntimeError: boom" in line]) == 1


def test_a_folder_of_many_shapes_has_few_of_them_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    monkeypatch.setattr(Dispatcher, "_nearest", staticmethod(lambda spec, known: None))
    for batch in range(1, 41):
        for _ in range(4):
            mine.decide(SMALL._replace(batch=batch), "auto", CARD)
    assert len(measured) == 16
    assert not mine._met
