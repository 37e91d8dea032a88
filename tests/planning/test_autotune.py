"""Measuring: what is exact gets a time, what is not gets a reason, and nothing else changes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import multiprocessing
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from ultralytics import YOLO

from tests.engine.test_telemetry import events
from tests.machines import MACHINES
from yolo_flash import FlashConfig, patch_model, plan
from yolo_flash.backends import sdpa
from yolo_flash.backends.calls import Inputs
from yolo_flash.backends.registry import BACKENDS, Backend
from yolo_flash.backends.spec import AttentionSpec
from yolo_flash.cli import main
from yolo_flash.dispatch import trial_cache
from yolo_flash.dispatch.decision import Trial
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.machine import detect
from yolo_flash.planning import autotune
from yolo_flash.utils import numerics, timing

CPU = torch.device("cpu")
AREA = AttentionSpec(8, 2, 20, 20, 32, 32, torch.float32, "nchw", area=4)
PSA = AttentionSpec(2, 2, 30, 30, 32, 64, torch.float32, "nhwc", training=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "config")


# Judging --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec",
    [
        AREA,
        PSA,
        AttentionSpec(3, 1, 49, 49, 36, 72, torch.float32, "nchw"),
        AttentionSpec(1, 2, 1, 1, 32, 32, torch.float32, "nhwc"),
        AttentionSpec(4, 3, 17, 17, 40, 56, torch.bfloat16, "nchw", area=1),
        AttentionSpec(4, 2, 17, 17, 32, 32, torch.float32, "nhwc", deterministic=True, area=2),
        AttentionSpec(3, 4, 21, 21, 32, 32, torch.float32, "separate"),
        AttentionSpec(2, 8, 40, 40, 48, 48, torch.float32, "separate", mask=True),
        AttentionSpec(2, 8, 40, 40, 32, 32, torch.bfloat16, "separate", mask=True, training=False),
    ],
    ids=str,
)
def test_exact_backends_get_a_time(spec: AttentionSpec) -> None:
    trials = autotune.judge(spec, CPU, ["stock", "sdpa_math", "sdpa_flash"])
    assert list(trials) == ["stock", "sdpa_math", "sdpa_flash"]
    for trial in trials.values():
        assert trial.why_not == ""
        assert trial.ms is not None
        assert trial.ms_low is not None
        assert trial.ms_high is not None
        assert 0 < trial.ms_low <= trial.ms <= trial.ms_high
        assert trial.error is not None
        assert trial.error < 10 * torch.finfo(spec.dtype).eps
        assert trial.method == "clock"


def test_what_is_timed_is_the_block_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    flash = BACKENDS["sdpa_flash"].run
    assert flash is not None

    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        seen.append((tuple(packed.shape), spec))
        return flash(packed, spec)

    break_flash(monkeypatch, run)
    autotune.judge(AREA, CPU, ["sdpa_flash"])
    assert {shape for shape, _ in seen} == {(8, 20, 2, 96), (4, 20, 2, 96)}  # one image of hard inputs
    assert {spec for shape, spec in seen if shape[0] == 8} == {AREA}


def forget_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flash ignore the mask of separate tensors."""

    def run(inputs: Inputs, spec: AttentionSpec) -> Tensor:
        return sdpa.separate_flash((*inputs[:3], None), spec)

    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], separate=run))


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_is_left_out_is_wrong(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_masks(monkeypatch)
    spec = AttentionSpec(2, 8, 40, 40, 32, 32, torch.float32, "separate", mask=True, training=training)
    trials = autotune.judge(spec, CPU, ["stock", "sdpa_flash"])
    assert trials["sdpa_flash"].why_not.startswith("wrong: output is off by")
    assert trials["sdpa_flash"].ms is None
    assert trials["stock"].ms is not None


def break_flash(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(
        BACKENDS, "sdpa_flash", Backend("sdpa_flash", lambda spec, machine: iter(()), run, lambda spec, machine: True)
    )


def wrong_gradient(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    flash = BACKENDS["sdpa_math"].run
    assert flash is not None
    out, image = flash(packed, spec)
    return out + 0.01 * (packed[..., :32] - packed[..., :32].detach()), image


def raises(error: Exception) -> Any:
    def run(packed: Tensor, spec: AttentionSpec) -> Any:
        raise error

    return run


def altered(change: Any) -> Any:
    math = BACKENDS["sdpa_math"].run
    assert math is not None

    def run(packed: Tensor, spec: AttentionSpec) -> Any:
        out, image = math(packed, spec)
        return change(out), image

    return run


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (raises(RuntimeError("no kernel image")), "failed in its trial: FlashKernelError: .*no kernel image"),
        (raises(torch.OutOfMemoryError("CUDA out of memory")), "failed in its trial: OutOfMemoryError: CUDA out of"),
        (altered(lambda out: out * float("nan")), "wrong: output is off by nan, .* is allowed"),
        (altered(lambda out: out * 1.001), "wrong: output is off by 0.00"),
        (altered(lambda out: out.flip(2)), "wrong: output is off by "),
        (altered(lambda out: out[:, 1:]), "failed in its trial: FlashKernelError|failed in its trial: RuntimeError"),
        (wrong_gradient, "wrong: gradient of q is off by"),
    ],
    ids=["raises", "memory", "nan", "scaled", "heads swapped", "shape", "gradient"],
)
def test_a_backend_that_fails_its_trial_is_refused_with_the_reason(
    run: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_flash(monkeypatch, run)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert trials["sdpa_flash"].ms is None
    assert re.match(reason, trials["sdpa_flash"].why_not), trials["sdpa_flash"].why_not
    assert trials["stock"].ms is not None


def test_global_state_is_left_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
        )

    before = state()
    autotune.judge(
        AttentionSpec(2, 1, 9, 9, 16, 32, torch.float32, "nchw", deterministic=True), CPU, list(BACKENDS)[:3]
    )
    assert state() == before


def test_little_memory_means_fewer_groups_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    image = 4 * autotune._bytes_a_group(AREA, "sdpa_flash")
    monkeypatch.setattr(autotune, "free_bytes", lambda device: 4 * image + 3)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert trials["sdpa_flash"].note == "measured on 4 of 8 groups"
    assert trials["sdpa_flash"].ms is not None
    assert "not measured: one image takes about" in trials["stock"].why_not
    assert trials["stock"].ms is None


def test_where_stock_does_not_fit_the_usual_rounding_is_the_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Any, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ultralytics.nn.modules.block.AAttn.forward", no_memory)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert "OutOfMemoryError" in trials["stock"].why_not
    assert trials["sdpa_flash"].ms is not None


def test_stock_is_not_run_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a yardstick: on a CPU the process would be killed."""

    def run(self: Any, x: Tensor) -> Tensor:
        raise AssertionError("ran")

    monkeypatch.setattr("ultralytics.nn.modules.block.AAttn.forward", run)
    spec = AREA._replace(seq_len_q=400, seq_len_k=400)
    monkeypatch.setattr(autotune, "free_bytes", lambda device: 8 * autotune._bytes_a_group(spec, "stock"))
    trials = autotune.judge(spec, CPU, ["stock", "sdpa_flash"])
    assert "not measured: one image takes about" in trials["stock"].why_not
    assert trials["sdpa_flash"].ms is not None


def test_a_kernel_that_raises_late_loses_its_own_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = BACKENDS["sdpa_flash"].run
    assert flash is not None
    calls: list[int] = []

    def run(packed: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) > 3:  # the check, the first call, a sample
            raise RuntimeError("late")
        return flash(packed, spec)

    break_flash(monkeypatch, run)
    trials = autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])
    assert re.match("failed in its trial: .*late", trials["sdpa_flash"].why_not)
    assert trials["sdpa_flash"].ms is None
    assert trials["stock"].ms is not None


def test_torchs_unfused_backend_is_tried_only_where_nothing_fused_can_run() -> None:
    assert autotune.candidates(AREA, detect(CPU)) == ["stock", "sdpa_flash"]


# Timing --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("complete", [True, False])
def test_a_graph_that_lacks_kernels_is_not_timed(complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        made.append(torch.ones(3))
        return (made[-1],)

    def replay() -> None:
        if complete:
            made[-1].fill_(1.0)

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.5)
    fakes = {
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream, capture_error_mode: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "Event": lambda enable_timing: event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    if complete:
        sample = timing.graph_ms(call)
        assert sample() == 0.05  # 10 calls took half a millisecond
        assert len(made) == 12
        alive = weakref.ref(call)
        del call
        gc.collect()
        assert alive() is not None  # a replay reads what the call holds
    else:
        with pytest.raises(RuntimeError, match="kernels are missing in it"):
            timing.graph_ms(call)


@pytest.mark.parametrize("hiccup", range(3))
@pytest.mark.parametrize(("seconds", "calls"), [(5e-5, 10), (7e-4, 2), (1.0, 1)])
def test_a_hiccup_does_not_make_a_graph_shorter(
    seconds: float, calls: int, hiccup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waits = 0.0, 0

    def wait(device: torch.device) -> None:
        nonlocal now, waits
        now += seconds + (2e-3 if waits == hiccup else 0)
        waits += 1

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(timing, "wait", wait)
    monkeypatch.setattr(timing, "graph_ms", lambda call, calls: lambda: calls)
    sample, method = timing.sampler_of(lambda: (), torch.device("cuda"))
    assert (sample(), method) == (calls, "graph")


# Reference -----------------------------------------------------------------------------------------------------------
def test_the_reference_is_plain_attention_however_it_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(3, 7, 2, 4 + 4 + 6, dtype=torch.float64, requires_grad=True)
    dout, dimage = torch.randn(2, 3, 7, 2, 6, dtype=torch.float64)
    q, k, v = packed.transpose(1, 2).split([4, 4, 6], dim=-1)
    out = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2)
    (grad,) = torch.autograd.grad([out, v.transpose(1, 2)], packed, [dout, dimage])
    for at_once in (1, 2 * 7 * 3, 2**20):  # one query, three queries, all
        monkeypatch.setattr(numerics, "_SCORES_AT_ONCE", at_once)
        found, found_grad = numerics.reference(packed.detach(), dout, dimage, head_dim=4)
        torch.testing.assert_close(found, out.detach())
        torch.testing.assert_close(found_grad, grad)


# Kept on disk ---------------------------------------------------------------------------------------------------------
def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(autotune, "judge", judge)


@pytest.mark.measures
def test_the_second_run_reads_what_the_first_measured(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    first = autotune.measure([AREA, AREA, PSA], CPU)
    assert "measured 2 attention problems in" in log[-1]
    forbid(monkeypatch)
    assert autotune.measure([AREA, PSA], CPU) == first
    assert "2 attention problems known from earlier, read in" in log[-1]
    assert trial_cache.clear() == 2
    assert trial_cache.load([AREA], detect(CPU)) == {}


@pytest.mark.measures
@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"key": {}, "trials": {}}', '{"key": 1}', "\x00"])
def test_a_spoilt_or_foreign_file_is_measured_again(
    content: str, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    autotune.measure([AREA, PSA], CPU)
    for file in trial_cache.folder().iterdir():
        file.write_text(content)
    trials = autotune.measure([AREA, PSA], CPU)
    assert trials[AREA]["sdpa_flash"].ms is not None
    assert len([line for line in log if "measuring again what cannot be read" in line]) == 1
    assert len(trial_cache.load([AREA, PSA], detect(CPU))) == 2


@pytest.mark.measures
def test_a_truncated_file_is_measured_again() -> None:
    autotune.measure([AREA], CPU)
    (file,) = trial_cache.folder().iterdir()
    file.write_text(file.read_text()[:100])
    assert autotune.measure([AREA], CPU)[AREA]["stock"].ms is not None
    assert json.loads(file.read_text())["trials"]


@pytest.mark.measures
def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trial_cache, "USER_CONFIG_DIR", tmp_path / "file")
    assert autotune.measure([AREA], CPU)[AREA]["stock"].ms is not None
    assert any("measurements are not kept for the next run" in line for line in log)


def test_another_version_of_the_code_or_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = detect(CPU)
    trial_cache.store({AREA: {"stock": Trial(ms=1.0)}}, machine)
    assert trial_cache.load([AREA], machine)
    assert not trial_cache.load([AREA], dataclasses.replace(machine, torch="9.9"))
    assert not trial_cache.load([AREA._replace(area=2)], machine)
    monkeypatch.setattr(trial_cache, "_code", lambda: "another kernel")
    assert not trial_cache.load([AREA], machine)


def test_a_lack_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    break_flash(monkeypatch, raises(torch.OutOfMemoryError("CUDA out of memory")))
    trial_cache.store({AREA: autotune.judge(AREA, CPU, ["stock", "sdpa_flash"])}, detect(CPU))
    assert list(trial_cache.load([AREA], detect(CPU))[AREA]) == ["stock"]


def test_stock_that_does_not_fit_is_remembered() -> None:
    """It would be tried in vain at every start, and is what is taken when nothing else is left."""
    trial_cache.store({AREA: {"stock": Trial(why_not="too large", no_memory=True)}}, detect(CPU))
    assert trial_cache.load([AREA], detect(CPU))
    trial_cache.store({PSA: {"sdpa_flash": Trial(why_not="too large", no_memory=True)}}, detect(CPU))
    assert not trial_cache.load([PSA], detect(CPU))


def _store_until(done: Any, number: int) -> None:
    for i in itertools.count():
        trial_cache.store({AREA: {"stock": Trial(ms=float(number), note="x" * 100 * (i % 50))}}, detect(CPU))
        if done.is_set():
            break


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the platform cannot fork")
def test_two_processes_may_write_at_once() -> None:
    context = multiprocessing.get_context("fork")
    done = context.Event()
    processes = [context.Process(target=_store_until, args=(done, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    read: list[float | None] = []
    try:
        while len(set(read)) < 2 or len(read) < 100:  # of both, and never half of a file
            assert all(process.is_alive() for process in processes)
            if found := trial_cache.load([AREA], detect(CPU)):
                read.append(found[AREA]["stock"].ms)
    finally:
        done.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert set(read) == {1.0, 2.0}
    assert [file.suffix for file in trial_cache.folder().iterdir()] == [".json"]


# In a run -------------------------------------------------------------------------------------------------------------
@pytest.mark.measures
def test_a_run_measures_once_and_writes_what_it_found(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("yolo12n.yaml"))
    model.train(**tiny_args)
    assert len([line for line in log if "measured " in line and "attention problems in" in line]) == 1
    rows = [row for row in events(model) if row["event"] == "plan"]
    assert len(rows) == 16
    for row in rows:
        assert set(row["ms"]) == set(row["error"]) == {"stock", "sdpa_flash"}
        by_rules = "beyond the noise" in row["why"]  # then the rules stand, whatever the medians
        assert by_rules or row["ms"][row["backend"]] <= 1.03 * min(row["ms"].values())
    table = next(line for line in log if "attention layers on" in line)
    assert " ms" in table


@pytest.mark.measures
def test_a_measurement_that_fails_leaves_the_rules(
    tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    def judge(*args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(autotune, "judge", judge)
    model = patch_model(YOLO("yolo12n.yaml"))
    model.train(**tiny_args)
    assert any("by the rules, for measuring failed: RuntimeError: boom" in line for line in log)
    assert {row.decision.backend for row in model.trainer.flash_plan} == {"stock"}  # the rule for tiny images


@pytest.mark.measures
@pytest.mark.parametrize("settings", [{"autotune": False}, {"backend": "sdpa_flash"}])
def test_nothing_is_measured_unasked(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    assert plan(patch_model(YOLO("yolo12n.yaml"), **settings), imgsz=64, batch=2, device="cpu")


def test_a_size_that_was_not_measured_goes_by_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    dispatcher = Dispatcher(FlashConfig())
    large = AREA._replace(seq_len_q=80, seq_len_k=80)
    fast, slow = (
        {"stock": Trial(ms=2.0), "sdpa_flash": Trial(ms=1.0)},
        {"stock": Trial(ms=1.0), "sdpa_flash": Trial(ms=2.0)},
    )
    dispatcher.learn({AREA: slow, large: fast}, detect(CPU))
    near = AREA._replace(seq_len_q=70, seq_len_k=70)
    decision = dispatcher.decide(near, "auto", CPU)
    assert (decision.backend, decision.why, dict(decision.ms)) == ("sdpa_flash", "as measured for 8 x 80 tokens", {})
    assert dispatcher.decide(AREA._replace(seq_len_q=22, seq_len_k=22), "auto", CPU).backend == "stock"
    assert len(dispatcher.unplanned) == 2
    assert dispatcher.decide(near, "auto", CPU) is decision
    assert len(dispatcher.unplanned) == 2  # a look-up
    far = AREA._replace(seq_len_q=6400, seq_len_k=6400)
    assert dispatcher.decide(far, "auto", CPU).why == "fused on the CPU"  # the rules
    other = AREA._replace(training=False)
    assert "as measured" not in dispatcher.decide(other, "auto", CPU).why
    assert dispatcher.decide(AREA, "auto", CPU).backend == "stock"
    assert len(dispatcher.unplanned) == 4
    assert dispatcher.decide(near, "sdpa_flash", CPU).ms == {}  # asked for: not by the numbers of another size
    assert len(dispatcher.unplanned) == 4


def test_what_was_decided_before_measuring_is_forgotten_then() -> None:
    """AutoBatch and predictions run before the plan, and may have met the very specs of it."""
    dispatcher = Dispatcher(FlashConfig())
    assert dispatcher.decide(AREA, "auto", CPU).backend == "stock"  # the rule for tiny images
    dispatcher.learn({AREA: {"stock": Trial(ms=2.0), "sdpa_flash": Trial(ms=1.0)}}, detect(CPU))
    assert dispatcher.decide(AREA, "auto", CPU).backend == "sdpa_flash"
    assert not dispatcher.unplanned


def test_what_one_device_measured_decides_for_no_other() -> None:
    dispatcher = Dispatcher(FlashConfig())
    half = AREA._replace(dtype=torch.float16, layout="nhwc")
    dispatcher.learn({half: {"stock": Trial(ms=1.0), "sdpa_flash": Trial(ms=2.0)}}, detect(CPU))
    decision = dispatcher.select(half, "auto", MACHINES["A100"])
    assert (decision.backend, dict(decision.ms)) == ("sdpa_flash", {})


def test_a_layer_with_a_backend_of_its_own_is_not_unplanned() -> None:
    dispatcher = Dispatcher(FlashConfig())
    dispatcher.learn({AREA: {"stock": Trial(ms=1.0)}}, detect(CPU))
    dispatcher.decide(PSA, "sdpa_flash", CPU)
    assert not dispatcher.unplanned


@pytest.mark.measures
def test_a_plan_as_json_is_json_alone_while_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["plan", "imgsz=64", "batch=1", "device=cpu", "train", "--json"])
    assert all(row["ms"] for row in json.loads(capsys.readouterr().out)["plan"])
