"""What is kept of a measurement, what is forgotten, and who goes by it: later runs, predictions, no rank alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO

from tests.machines import MACHINES
from tests.test_autotune import AREA, CPU, PSA, break_flash, forbid, raises
from yolo_flash import FlashConfig, autotune, measuring, patch_model, plan, runtime, trial_cache
from yolo_flash.backends import BACKENDS, AttentionSpec
from yolo_flash.blocks import FlashBlock
from yolo_flash.machine import Machine, detect
from yolo_flash.planning import PlanRow, describe
from yolo_flash.report import _fate
from yolo_flash.runtime import Runtime
from yolo_flash.selector import Trial, select
from yolo_flash.telemetry import plan_entry

pytestmark = pytest.mark.measures
FAST = {"stock": Trial(ms=2.0, ms_low=1.9), "sdpa_flash": Trial(ms=1.0, ms_low=0.9)}
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")


def spy_on_judge(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names that each trial was asked for."""
    asked: list[list[str]] = []
    judge = autotune.judge

    def spy(spec: AttentionSpec, device: torch.device, names: Any) -> dict[str, Trial]:
        asked.append(list(names))
        return judge(spec, device, names)

    monkeypatch.setattr(autotune, "judge", spy)
    return asked


# A hiccup -------------------------------------------------------------------------------------------------------------
def not_a_number(packed: Tensor, spec: AttentionSpec) -> Any:
    out, image = BACKENDS["sdpa_math"].run(packed, spec)
    return out * float("nan"), image


@pytest.mark.parametrize("run", [raises(RuntimeError("no kernel image")), not_a_number], ids=["raised", "wrong"])
def test_a_backend_that_failed_once_is_tried_again_by_the_next_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        break_flash(broken, run)
        first = autotune.measure([AREA], CPU)[AREA]
    assert first["sdpa_flash"].why_not
    asked = spy_on_judge(monkeypatch)
    second = autotune.measure([AREA], CPU)[AREA]
    assert second["sdpa_flash"].ms is not None
    assert second["stock"] == first["stock"]
    assert list(second) == list(first)
    assert asked == [["sdpa_flash"]]
    assert autotune.measure([AREA], CPU)[AREA] == second
    assert len(asked) == 1


def test_after_a_fault_of_the_device_nothing_is_measured_or_kept(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """Whatever runs then fails: it is not the fault of the backends that come later."""
    trial_cache.store({PSA: {"stock": Trial(ms=1.0)}}, detect(CPU))
    faults: list[int] = []

    def run(packed: Tensor, spec: AttentionSpec) -> Any:
        faults.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait(device: torch.device) -> None:
        if faults:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    break_flash(monkeypatch, run)
    monkeypatch.setattr(autotune, "wait", wait)
    larger = dataclasses.replace(AREA, batch=16)
    trials = autotune.measure([AREA, larger, PSA], CPU)
    assert trials == {PSA: {"stock": Trial(ms=1.0)}}
    assert len(faults) == 1
    assert len(list(trial_cache.folder().iterdir())) == 1
    (line,) = [line for line in log if "no more measuring" in line]
    assert "sdpa_flash failed in its trial" in line
    assert "answers no more in this process" in line


@pytest.mark.parametrize("calm", [True, False])
def test_a_wide_spread_is_sampled_again_and_not_kept(calm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[int, int] = {}

    def sampler_of(call: Any, device: torch.device, graphs: bool = True) -> tuple[Callable[[], float], str]:
        number = len(counts)
        counts[number] = 0

        def sample() -> float:
            counts[number] += 1
            hiccup = number == 1 and counts[number] % 60 == 2 and not (calm and counts[number] > 60)
            return 1.5 if hiccup else 1.0

        return sample, "graph"

    monkeypatch.setattr(autotune, "sampler_of", sampler_of)
    trials = autotune.measure([AREA], CPU)[AREA]
    assert counts == {0: 60, 1: 120}
    assert trials["sdpa_flash"].ms == 1.0
    assert trials["sdpa_flash"].spread == (0.0 if calm else 0.5)
    kept = ["stock", "sdpa_flash"] if calm else ["stock"]
    assert list(trial_cache.load([AREA], detect(CPU))[AREA]) == kept


def test_memory_that_is_back_lets_stock_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as little:
        image = 4 * autotune._bytes_a_group(AREA, "sdpa_flash")
        little.setattr(autotune, "free_bytes", lambda device: 4 * image + 3)
        assert autotune.measure([AREA], CPU)[AREA]["stock"].no_memory
        forbid(little)
        assert autotune.measure([AREA], CPU)[AREA]["stock"].no_memory  # not in vain at every start
    assert autotune.measure([AREA], CPU)[AREA]["stock"].ms is not None


# Times that compare ---------------------------------------------------------------------------------------------------
def test_all_backends_of_a_spec_are_timed_by_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def sampler_of(call: Any, device: torch.device, graphs: bool = True) -> tuple[Callable[[], float], str]:
        made.append(graphs)
        captured = graphs and len(made) != 2  # the second backend synchronises
        return lambda: 1.0, "graph" if captured else "events"

    monkeypatch.setattr(autotune, "sampler_of", sampler_of)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert {trial.method for trial in trials.values()} == {"events"}
    assert made == [True, True, False, False]


def test_known_times_of_another_method_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trial_cache.store({AREA: {"stock": Trial(ms=1.0, method="graph")}}, detect(CPU))
    asked = spy_on_judge(monkeypatch)
    trials = autotune.measure([AREA], CPU)[AREA]
    assert asked == [["sdpa_flash"], ["stock", "sdpa_flash"]]
    assert {trial.method for trial in trials.values()} == {"clock"}


def test_a_time_that_was_scaled_is_marked_wherever_it_is_printed() -> None:
    note = "measured on 4 of 64 groups"
    spec = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float16, "nhwc")
    trials = {
        "stock": Trial(ms=9.0, note=note),
        "sdpa_flash": Trial(ms=3.0),
        "sdpa_cudnn": Trial(why_not="no", note=note),
    }
    decision = select(spec, MACHINES["H100"], trials=trials)
    row = PlanRow("model.6", "AAttn", "train", decision)
    assert f"3 ms, 3.0x stock ({note}), the fastest measured" in describe([row], MACHINES["H100"])
    assert _fate("stock", row) == f"9 ms ({note})"
    assert plan_entry(row)["notes"] == {"stock": note}
    assert json.dumps(plan_entry(row))
    scaled = select(spec, MACHINES["H100"], trials={"stock": Trial(ms=9.0), "sdpa_flash": Trial(ms=3.0, note=note)})
    table = describe([PlanRow("model.6", "AAttn", "train", scaled)], MACHINES["H100"])
    assert f"3 ms ({note}), 3.0x stock, the fastest" in table


# Files that say what cannot be ----------------------------------------------------------------------------------------
BAD: list[tuple[str, Any]] = [
    *[("ms", value) for value in ("1.0", math.nan, math.inf, 0, -5, True, [1.0], 10**400, None)],
    *[("ms_low", value) for value in ("1", -1, 99.0)],
    *[("ms_high", value) for value in (math.nan, 1e-9)],
    *[("error", value) for value in ("0", -1.0, math.nan)],
    *[("extra_bytes", value) for value in (-1, 1.5, "1")],
    *[("why_not", value) for value in (None, 1, "failed")],
    *[("note", 3), ("method", "stopwatch"), ("method", []), ("first_seconds", None), ("first_seconds", -1)],
    *[("no_memory", "yes"), ("no_memory", 1), ("speed", 1.0)],
]


def spoil(change: Callable[[Any], Any]) -> None:
    """Change the content of every file of the cache."""
    for file in trial_cache.folder().iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_field_that_cannot_be_is_not_believed(name: str, value: Any, log: list[str]) -> None:
    machine = detect(CPU)
    trial = Trial(ms=1.0, ms_low=0.9, ms_high=1.1, error=0.0, extra_bytes=1, method="clock")
    trial_cache.store({AREA: {"stock": trial}, PSA: {"stock": trial}}, machine)
    assert (
        trial_cache.known(machine)
        == trial_cache.load([AREA, PSA], machine)
        == {AREA: {"stock": trial}, PSA: {"stock": trial}}
    )
    spoil(lambda content: content["trials"]["stock"].update({name: value}))
    assert trial_cache.load([AREA, PSA], machine) == {}
    assert trial_cache.known(machine) == {}
    assert len(log) == 2  # one for all files, each time
    assert all("cannot be read" in line and "(and 1 more)" in line for line in log)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["trials"].update(sdpa_flesh=content["trials"]["stock"]),
        lambda content: content.update(trials={}),
        lambda content: content.update(trials=[1]),
        lambda content: content.update(trials={"stock": None}),
        lambda content: content["trials"]["stock"].pop("ms"),
        lambda content: [content],
    ],
    ids=["unknown backend", "none", "list", "null", "no ms", "in a list"],
)
def test_a_file_that_cannot_be_is_written_anew_and_ends_no_plan(change: Any, log: list[str]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    plan(model, imgsz=64, batch=1, device="cpu")

    def keep_the_file(content: Any) -> Any:
        changed = change(content)
        return changed if isinstance(changed, list) else None

    spoil(keep_the_file)
    log.clear()
    rows = plan(patch_model(YOLO("yolo12n.yaml")), imgsz=64, batch=1, device="cpu")
    assert all(row.decision.ms for row in rows)
    assert len([line for line in log if "measuring again what cannot be read" in line]) == 1
    assert set(trial_cache.known(detect(CPU))) == {row.decision.spec for row in rows}


def test_a_training_survives_a_cache_of_nonsense(tiny_args: dict[str, Any], tiny_model: str, log: list[str]) -> None:
    patch_model(YOLO(tiny_model)).train(**tiny_args)
    spoil(lambda content: [trial.update(ms="fast") for trial in content["trials"].values()][:0])
    model = patch_model(YOLO(tiny_model))
    model.train(**tiny_args)
    assert any("measuring again what cannot be read" in line for line in log)
    assert all(row.decision.ms for row in model.trainer.flash_plan)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", "8"),
        ("batch", 0),
        ("num_heads", True),
        ("dtype", "float17"),
        ("dtype", "nn"),
        ("layout", "hwc"),
        ("mask", 0),
    ],
)
def test_a_spec_that_cannot_be_is_not_known(name: str, value: Any) -> None:
    trial_cache.store({AREA: {"stock": Trial(ms=1.0)}}, detect(CPU))
    spoil(lambda content: content["key"]["spec"].update({name: value}))
    assert trial_cache.known(detect(CPU)) == {}


def test_known_are_the_newest_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect(CPU)
    trial_cache.store({AREA: FAST, PSA: FAST}, machine)
    trial_cache.store({AREA: FAST}, dataclasses.replace(machine, name="another"))
    assert trial_cache.known(machine) == {AREA: FAST, PSA: FAST}
    monkeypatch.setattr(trial_cache, "_MOST_KNOWN", 1)
    assert len(trial_cache.known(machine)) <= 1
    trial_cache.clear()
    assert trial_cache.known(machine) == {}


# The key --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def _switches() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("_switches")
def test_other_arithmetic_and_another_share_of_the_card_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect(CPU)
    trial_cache.store({AREA: FAST}, machine)
    torch.set_float32_matmul_precision("high")
    assert not trial_cache.load([AREA], machine)
    assert not trial_cache.known(machine)
    torch.set_float32_matmul_precision("highest")
    assert trial_cache.load([AREA], machine)
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    assert not trial_cache.load([AREA], machine)
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50")
    assert not trial_cache.load([AREA], machine)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one set of switches before 2.9")
def test_switches_that_torch_refuses_to_read_are_replaced_by_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    expected = torch.backends.cuda.matmul.fp32_precision, trial_cache._CPU.matmul.fp32_precision
    assert dict(trial_cache._arithmetic())["float32"] == str(expected)


def test_every_file_of_the_package_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "deep.py").write_text("x = 1")
    monkeypatch.setattr(trial_cache, "__file__", str(tmp_path / "trial_cache.py"))
    code = trial_cache._code.__wrapped__
    before = code()
    (tmp_path / "kernels" / "deep.py").write_text("x = 2")
    assert code() != before
    assert code() == code()


# Memory ---------------------------------------------------------------------------------------------------------------
def test_the_limits_of_a_container_are_a_cpus_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,memory:/docker/abc\n1:name=systemd:/\n0::/pod/one\n",
        "sys/fs/cgroup/pod/one/memory.max": "1000\n",
        "sys/fs/cgroup/pod/one/memory.current": "900\n",
        "sys/fs/cgroup/pod/one/memory.stat": "anon 500\ninactive_file 300\n",
        "sys/fs/cgroup/pod/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.current": "950\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",  # the path is the host's: only the top is here
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(measuring.container_bytes(tmp_path)) == [0, 400]
    assert list(measuring.container_bytes(tmp_path / "nothing")) == []
    monkeypatch.setattr(measuring, "container_bytes", lambda: iter([7]))
    assert measuring.free_bytes(CPU) == 7


def test_autobatch_has_a_limit_where_the_backend_of_the_rules_has_no_time() -> None:
    spec = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float16, "nhwc")

    def taken(**trials: Trial) -> str:
        return select(spec, MACHINES["H100"], trials=trials, frugal=True).backend

    failed = Trial(why_not="failed in its trial: boom")
    cudnn, flash = Trial(ms=1.0, extra_bytes=300), Trial(ms=2.0, extra_bytes=200)
    assert taken(triton_area=failed, sdpa_cudnn=cudnn, sdpa_flash=flash) == "sdpa_flash"
    assert taken(sdpa_cudnn=cudnn, sdpa_flash=flash) == "sdpa_flash"
    assert taken(triton_area=failed, sdpa_cudnn=cudnn, sdpa_math=Trial(ms=9.0, extra_bytes=250)) == "sdpa_math"


def test_what_was_not_planned_is_counted_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_MAX_DECISIONS", 5)
    mine = Runtime(FlashConfig())
    mine.learn({AREA: FAST}, detect(CPU))
    for batch in range(10, 20):
        mine.decide(dataclasses.replace(AREA, batch=batch), "auto", CPU)
    assert len(mine.unplanned) == 5


# Earlier runs ---------------------------------------------------------------------------------------------------------
TINY = dataclasses.replace(PSA, seq_len_q=9, seq_len_k=9)  # for which the rules take stock


def test_a_prediction_goes_by_what_an_earlier_run_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    assert Runtime(FlashConfig()).decide(TINY, "auto", CPU).backend == "stock"
    trial_cache.store({TINY: FAST}, detect(CPU))
    decision = Runtime(FlashConfig()).decide(TINY, "auto", CPU)
    assert (decision.backend, decision.ms) == ("sdpa_flash", {"stock": 2.0, "sdpa_flash": 1.0})
    near = dataclasses.replace(TINY, seq_len_q=12, seq_len_k=12)
    assert Runtime(FlashConfig()).decide(near, "auto", CPU).why == "as measured for 2 x 9 tokens"
    assert Runtime(FlashConfig(autotune=False)).decide(TINY, "auto", CPU).backend == "stock"


def test_a_predicting_model_reads_the_cache_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    model = patch_model(YOLO("yolo12n.yaml"))
    model.predict(torch.zeros(1, 3, 64, 64), device="cpu", verbose=False)
    met = {spec for spec, *_ in model.model.model[6].m[0][0].attn._flash_runtime._decisions}
    assert met
    trial_cache.store(dict.fromkeys(met, FAST), detect(CPU))
    model = patch_model(YOLO("yolo12n.yaml"))
    model.predict(torch.zeros(1, 3, 64, 64), device="cpu", verbose=False)
    decisions = model.model.model[6].m[0][0].attn._flash_runtime._decisions.values()
    assert {decision.backend for decision in decisions} == {"sdpa_flash"}


def test_the_cache_is_read_once_and_not_at_the_wrong_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Machine] = []

    def known(machine: Machine) -> dict[AttentionSpec, Any]:
        reads.append(machine)
        return {TINY: FAST}

    monkeypatch.setattr(trial_cache, "known", known)
    mine = Runtime(FlashConfig())
    mine.decide(TINY, "sdpa_flash", CPU)  # asked for
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert mine.decide(TINY, "auto", CPU).backend == "stock"
    mine.decide_for_compile("", "auto", TINY.without_sizes(), "cpu")
    for name, value in (("RANK", 0), ("dist", Ranks)):
        with monkeypatch.context() as rank:  # whose files may be others
            rank.setattr(runtime, name, value)
            mine.decide(dataclasses.replace(TINY, batch=3), "auto", CPU)
    assert not reads
    assert mine.decide(dataclasses.replace(TINY, batch=1), "auto", CPU).backend == "sdpa_flash"
    assert mine.decide(TINY, "auto", CPU).backend == "sdpa_flash"  # and not as before
    mine.decide(dataclasses.replace(TINY, batch=4), "auto", CPU)
    assert len(reads) == 1


class Ranks:
    """In the place of `torch.distributed`, in a process group."""

    is_available = is_initialized = staticmethod(lambda: True)


def test_what_a_run_has_learnt_comes_before_what_is_known() -> None:
    trial_cache.store({TINY: FAST}, detect(CPU))
    mine = Runtime(FlashConfig())
    mine.learn({TINY: {"stock": Trial(ms=1.0), "sdpa_flash": Trial(ms=9.0, ms_low=9.0)}}, detect(CPU))
    assert mine.decide(TINY, "auto", CPU).backend == "stock"
    other = Runtime(FlashConfig())
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
    mine = next(block._flash_runtime for block in model.model.modules() if isinstance(block, FlashBlock))
    assert mine is not model.trainer._flash_runtime
    for row in model.trainer.flash_plan:
        again = mine.decide(row.decision.spec, "auto", CPU)
        assert (again.backend, again.trials) == (row.decision.backend, row.decision.trials)


# Other cards ----------------------------------------------------------------------------------------------------------
SMALL = AttentionSpec(4, 2, 100, 100, 32, 32, torch.float32, "nchw", training=False)
FIELDS = tuple(getattr(SMALL, field.name) for field in dataclasses.fields(SMALL))


@pytest.mark.parametrize("card", ["P100", "T4", "A100", "RTX 3090", "RTX 4090", "B200", "RTX 5090", "MI300"])
def test_the_rules_of_one_card_do_not_speak_of_another(card: str) -> None:
    assert select(SMALL, MACHINES[card]).why == (
        "below 4,000,000 scores fused attention gained nothing on an H100; not measured on this card"
    )
    assert select(SMALL, MACHINES["H100"]).why == "below 4,000,000 scores fused attention gains nothing here"


def predicting(card: str, monkeypatch: pytest.MonkeyPatch, result: Any = None) -> tuple[Runtime, list[AttentionSpec]]:
    """A Runtime on a card that is not there, and the specs that it has had measured."""
    measured: list[AttentionSpec] = []

    def measure(specs: list[AttentionSpec], device: torch.device) -> Any:
        measured.extend(specs)
        if isinstance(result, Exception):
            raise result
        return {spec: {"stock": Trial(ms=2.0), "sdpa_efficient": Trial(ms=1.0)} for spec in specs}

    monkeypatch.setattr(runtime, "detect", lambda device: MACHINES[card])
    mine = Runtime(FlashConfig())
    mine.measure = measure
    return mine, measured


def test_a_shape_that_comes_again_in_prediction_is_measured_on_a_card_without_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, measured = predicting("T4", monkeypatch)
    backends = [mine.plan(FIELDS, "auto", CARD)[1] for _ in range(5)]
    assert backends == ["stock", "stock", "sdpa_efficient", "sdpa_efficient", "sdpa_efficient"]
    assert measured == [SMALL]


def test_layers_of_one_forward_are_not_taken_for_a_shape_that_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    mine.layers = 4
    for _ in range(8):  # two forwards
        mine.plan(FIELDS, "auto", CARD)
    assert not measured
    mine.plan(FIELDS, "auto", CARD)
    assert measured == [SMALL]
    assert patch_model(YOLO("yolo12n.yaml")).model.model[6].m[0][0].attn._flash_runtime.layers == 8


def changed(**values: Any) -> tuple[Any, ...]:
    spec = dataclasses.replace(SMALL, **values)
    return tuple(getattr(spec, field.name) for field in dataclasses.fields(spec))


def test_nothing_is_measured_within_a_training_or_on_the_card_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[str, tuple[Any, ...], str, torch.device]] = [
        ("H100", FIELDS, "auto", CARD),
        ("T4", changed(training=True), "auto", CARD),
        ("T4", FIELDS, "sdpa_efficient", CARD),
        ("CPU", FIELDS, "auto", CPU),
    ]
    for card, fields, choice, device in cases:
        mine, measured = predicting(card, monkeypatch)
        for _ in range(9):
            mine.plan(fields, choice, device)
        assert not measured
        assert not mine._met
    assert Runtime(FlashConfig()).measure is None  # that of a trainer
    mine, measured = predicting("T4", monkeypatch)
    mine.config = FlashConfig(autotune=False)
    for _ in range(9):
        mine.plan(FIELDS, "auto", CARD)
    assert not measured


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    with monkeypatch.context() as capturing:
        capturing.setattr(runtime, "_is_traced", lambda device: True)
        for _ in range(9):
            mine.plan(FIELDS, "auto", CARD)
        assert not measured
    mine.plan(FIELDS, "auto", CARD)
    assert measured == [SMALL]


@pytest.mark.parametrize("result", [RuntimeError("boom")])
def test_a_measurement_that_fails_is_not_repeated_and_ends_no_prediction(
    result: Any, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    mine, measured = predicting("T4", monkeypatch, result)
    assert {mine.plan(FIELDS, "auto", CARD)[1] for _ in range(9)} == {"stock"}
    assert measured == [SMALL]
    assert len([line for line in log if "could not be measured: RuntimeError: boom" in line]) == 1


def test_a_folder_of_many_shapes_has_few_of_them_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, measured = predicting("T4", monkeypatch)
    monkeypatch.setattr(Runtime, "_nearest", staticmethod(lambda spec, known: None))
    for batch in range(1, 41):
        for _ in range(4):
            mine.plan(changed(batch=batch), "auto", CARD)
    assert len(measured) == 16
    assert not mine._met
