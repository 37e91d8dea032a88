"""What one round of measuring keeps, forgets and compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.machines import MACHINES
from tests.planning.test_autotune import AREA, CPU, PSA, break_flash, forbid, raises
from yolo_flash import FlashConfig
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.dispatch import dispatcher, trial_cache
from yolo_flash.dispatch.decision import Trial, select
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.machine import detect
from yolo_flash.planning import autotune
from yolo_flash.planning.plan import PlanRow, describe, plan_entry
from yolo_flash.utils import memory

pytestmark = pytest.mark.measures
FAST = {"stock": Trial(ms=2.0, ms_low=1.9), "sdpa_flash": Trial(ms=1.0, ms_low=0.9)}


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
    larger = AREA._replace(batch=16)
    before, judge = AREA._replace(batch=3), autotune.judge
    monkeypatch.setattr(autotune, "judge", lambda spec, *args: FAST if spec is before else judge(spec, *args))
    trials = autotune.measure([before, AREA, larger, PSA], CPU)
    assert trials.pop(before) == FAST  # for this run; of its round nothing is kept
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


def test_too_little_memory_for_a_trial_does_not_choose_stock_which_needs_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "free_bytes", lambda device: 2**20)
    spec = AREA._replace(seq_len_q=400, seq_len_k=400)
    (trials,) = autotune.measure([spec], CPU).values()
    assert all(trial.no_memory for trial in trials.values())
    decision = select(spec, detect(CPU), trials=trials)
    assert (decision.backend, decision.by_rules) == ("sdpa_flash", True)


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
        "sdpa_flash": Trial(ms=3.0, ms_low=2.9, ms_high=3.2, method="graph"),
        "sdpa_cudnn": Trial(why_not="no", note=note),
    }
    decision = select(spec, MACHINES["H100"], trials=trials)
    row = PlanRow("model.6", "AAttn", "train", decision)
    assert f"3 ms, 3.0x stock ({note}), the fastest measured" in describe([row], MACHINES["H100"])
    assert decision.fate("stock") == f"9 ms ({note})"
    assert plan_entry(row)["notes"] == {"stock": note}
    assert plan_entry(row)["method"] == {"stock": "", "sdpa_flash": "graph"}
    assert plan_entry(row)["spread"] == {"stock": 0.0, "sdpa_flash": 0.1}
    assert json.dumps(plan_entry(row))
    scaled = select(spec, MACHINES["H100"], trials={"stock": Trial(ms=9.0), "sdpa_flash": Trial(ms=3.0, note=note)})
    table = describe([PlanRow("model.6", "AAttn", "train", scaled)], MACHINES["H100"])
    assert f"3 ms ({note}), 3.0x stock, the fastest" in table


# Memory ---------------------------------------------------------------------------------------------------------------
def test_the_limits_of_a_container_are_a_cpus_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,memory:/docker/abc\n1:name=systemd:/\n0::/pod/one\n",
        "sys/fs/cgroup/pod/one/memory.max": "1000\n",
        "sys/fs/cgroup/pod/one/memory.current": "900\n",
        "sys/fs/cgroup/pod/one/memory.stat": "anon 500\ninactive_file 100\nactive_file 200\n",
        "sys/fs/cgroup/pod/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.current": "950\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",  # the path is the host's: only the top is here
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(memory.container_bytes(tmp_path)) == [0, 400]
    assert list(memory.container_bytes(tmp_path / "nothing")) == []
    monkeypatch.setattr(memory, "container_bytes", lambda: iter([7]))
    assert memory.free_bytes(CPU) == 7


def test_autobatch_has_a_limit_where_the_backend_of_the_rules_has_no_time() -> None:
    spec = AttentionSpec(64, 2, 400, 400, 32, 32, torch.float16, "nhwc")

    def taken(**trials: Trial) -> str:
        return select(spec, MACHINES["H100"], trials=trials, memory_limited=True).backend

    failed = Trial(why_not="failed in its trial: boom")
    cudnn, flash = Trial(ms=1.0, extra_bytes=300), Trial(ms=2.0, extra_bytes=200)
    assert taken(triton_area=failed, sdpa_cudnn=cudnn, sdpa_flash=flash) == "sdpa_flash"
    assert taken(sdpa_cudnn=cudnn, sdpa_flash=flash) == "sdpa_flash"
    assert taken(triton_area=failed, sdpa_cudnn=cudnn, sdpa_math=Trial(ms=9.0, extra_bytes=250)) == "sdpa_math"


def test_what_was_not_planned_is_counted_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_MAX_DECISIONS", 5)
    mine = Dispatcher(FlashConfig())
    mine.learn({AREA: FAST}, detect(CPU))
    for batch in range(10, 20):
        mine.decide(AREA._replace(batch=batch), "auto", CPU)
    assert len(mine.unplanned) == 5


@pytest.mark.parametrize("layout", ["nchw", "separate"])
def test_a_measurement_within_a_prediction_is_as_any_other(layout: Any) -> None:
    """Whose inference mode and autocast are not those of the spec."""
    spec = AREA._replace(layout=layout, area=1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        trials = autotune.judge(spec, CPU, ["stock", "sdpa_flash"])
        assert torch.is_inference_mode_enabled()
    for trial in trials.values():
        assert trial.why_not == ""
        assert trial.error is not None
        assert trial.error < 1e-6
