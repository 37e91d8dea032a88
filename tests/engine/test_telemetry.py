"""Every run says what it planned, what really ran, and what it cost; and nothing of that can hurt the run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars
import pytest
import torch
from ultralytics import YOLO

from tests.counting import LAYERS, run_out_of_memory_once
from yolo_flash import AttentionSpec, FlashConfig, patch_model
from yolo_flash.backends import registry as backends_module
from yolo_flash.backends.profiled import attention_kernels
from yolo_flash.backends.sparse import OPERATOR as SPARSE
from yolo_flash.dispatch.dispatcher import Dispatcher
from yolo_flash.engine import step_profile as profile_module
from yolo_flash.engine import telemetry
from yolo_flash.engine.step_profile import StepProfile
from yolo_flash.engine.telemetry import known_columns
from yolo_flash.planning.memory import score_bytes
from yolo_flash.utils import profiler
from yolo_flash.utils.memory import readable

pytestmark = pytest.mark.usefixtures("tiny_model")  # writes tiny.yaml
OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
FORWARD = f"aten::{OPERATOR}"


def train(args: dict[str, Any], backend: str = "sdpa_flash", **settings: Any) -> YOLO:
    model = patch_model(YOLO("tiny.yaml"), backend=backend, **settings)
    model.train(**args)
    return model


def events(model: YOLO) -> list[dict[str, Any]]:
    return read_events(Path(model.trainer.save_dir) / "flash.jsonl")


def read_events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def of(rows: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["event"] == event]


def test_flash_jsonl_holds_run_plan_kernels_and_epochs(tiny_args: dict[str, Any], log: list[str]) -> None:
    rows = events(train({**tiny_args, "epochs": 2, "imgsz": 64}))
    assert rows[0]["event"] == "run"
    assert rows[0]["machine"]["kind"] == "cpu"
    assert rows[0]["config"]["backend"] == "sdpa_flash"
    assert rows[0]["resumed"] is False

    plan = of(rows, "plan")
    for mode in ("train", "val"):
        layers = {row["layer"] for row in plan if row["mode"] == mode}
        assert len(layers) == LAYERS
    first = plan[0]
    assert (first["block"], first["backend"], first["why"]) == ("AAttn", "sdpa_flash", "asked for")
    assert first["spec"] | {"batch": 8, "seq_len_q": 16, "head_dim": 32, "dtype": "float32"} == first["spec"]
    assert first["refused"]["sdpa_cudnn"][0].startswith("runs on NVIDIA cards")
    assert first["ms"] == first["error"] == {}

    assert [row["counts"] for row in of(rows, "kernels")] == [{FORWARD: LAYERS, f"{FORWARD}_backward": LAYERS}]

    epochs = of(rows, "epoch")
    assert [row["epoch"] for row in epochs] == [1, 2]
    for row in epochs:
        assert row["images_per_second"] > 0
        assert 0.1 < row["peak_allocated_gib"] <= row["peak_reserved_gib"] < 64
        assert row["backends"] == {"sdpa_flash": LAYERS}
        assert row["fallbacks"] == {}
    assert any(f"one step ran {LAYERS} x {OPERATOR}, {LAYERS} x {OPERATOR}_backward" in line for line in log)
    assert len([line for line in log if "images/s, peak" in line and "of score matrices avoided" in line]) == 2


def test_results_csv_has_two_more_columns_and_is_still_drawn(tiny_args: dict[str, Any]) -> None:
    model = train({**tiny_args, "epochs": 2, "plots": True})
    table = polars.read_csv(Path(model.trainer.save_dir) / "results.csv")
    assert table.columns[-2:] == ["flash/peak_allocated_gib", "flash/images_per_second"]
    assert all(table[column].dtype.is_numeric() for column in table.columns[-2:])
    assert table["flash/images_per_second"].min() > 0  # type: ignore[operator]
    assert (Path(model.trainer.save_dir) / "results.png").is_file()
    assert (Path(model.trainer.save_dir) / "flash.png").is_file()
    assert model.ckpt["train_results"]["flash/images_per_second"] == table["flash/images_per_second"].to_list()


def interrupted(args: dict[str, Any], model: YOLO) -> Path:
    """Stop a run of 3 epochs at the start of its second; return last.pt."""

    class StopError(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise StopError

    model.add_callback("on_train_epoch_start", stop)
    with pytest.raises(StopError):
        model.train(**{**args, "epochs": 3})
    return Path(model.trainer.last)


@pytest.mark.parametrize("begun", ["stock", "patched"])
def test_resume_keeps_results_csv_readable(begun: str, tiny_args: dict[str, Any]) -> None:
    first = YOLO("tiny.yaml") if begun == "stock" else patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    last = interrupted({**tiny_args, "plots": True}, first)
    model = patch_model(YOLO(str(last)), backend="sdpa_flash")
    model.train(resume=True)
    table = polars.read_csv(Path(model.trainer.save_dir) / "results.csv")
    assert table["epoch"].to_list() == [1, 2, 3]
    assert ("flash/images_per_second" in table.columns) is (begun == "patched")
    assert (Path(model.trainer.save_dir) / "results.png").is_file()
    rows = events(model)
    assert [row["resumed"] for row in of(rows, "run")] == ([True] if begun == "stock" else [False, True])
    assert [row["epoch"] for row in of(rows, "epoch")][-2:] == [2, 3]


def test_logging_changes_no_result(tiny_args: dict[str, Any]) -> None:
    runs = [train({**tiny_args, "epochs": 2}, log=on) for on in (True, False)]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not (Path(runs[1].trainer.save_dir) / "flash.jsonl").exists()
    tables = [polars.read_csv(Path(run.trainer.save_dir) / "results.csv") for run in runs]
    common = [column for column in tables[1].columns if column != "time"]
    assert tables[0][common].equals(tables[1][common])
    assert set(tables[0].columns) - set(tables[1].columns) == set(telemetry.RESULT_COLUMNS)


def test_a_profile_that_contradicts_the_plan_is_a_warning(
    tiny_args: dict[str, Any], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    math = backends_module.BACKENDS["sdpa_math"]
    flash = backends_module.BACKENDS["sdpa_flash"]
    silent = backends_module.Backend("sdpa_flash", flash.limits, math.run, flash.reproducible, flash.operators)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", silent)
    rows = events(train(tiny_args))
    assert of(rows, "kernels")[0]["counts"] == {"aten::_scaled_dot_product_attention_math": LAYERS}
    warning = f"the plan says sdpa_flash for {LAYERS} layers, but the profiled step called it 0 times"
    assert len([line for line in log if warning in line]) == 1


@pytest.mark.parametrize("said", [None, "0"])
def test_the_profiler_is_told_to_let_go_of_the_driver_unless_the_user_has_said(
    said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TEARDOWN_CUPTI"
    monkeypatch.delenv(name, raising=False)
    if said is not None:
        monkeypatch.setenv(name, said)
    monkeypatch.setattr(profiler, "profiler_lets_go", lambda: True)
    told: list[str | None] = []
    calls: list[str | None] = []  # of CUDA, in one of which the profiler detaches
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(os.environ.get(name)))
    step = StepProfile()
    activities = {profile_module.ProfilerActivity.CUDA}
    step.running = SimpleNamespace(  # type: ignore[assignment]
        activities=activities, stop=lambda: told.append(os.environ.get(name)), profiler=None
    )
    assert profiler.PROFILER.acquire(blocking=False)
    assert step.stop() == []
    assert told == [said or "1"]
    assert set(calls) == ({"1"} if said is None else set())
    assert os.environ.get(name) == said


@pytest.mark.parametrize("seen", [True, False])
def test_the_wait_ends_with_the_thread_that_detaches_the_profiler(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEARDOWN_CUPTI", raising=False)
    monkeypatch.setattr(profiler, "profiler_lets_go", lambda: True)
    calls: list[None] = []  # of CUDA: in the third the profiler detaches
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(None))
    threads = {"1", "2"}
    running: Any = SimpleNamespace(activities={profile_module.ProfilerActivity.CUDA}, stop=lambda: threads.add("3"))
    monkeypatch.setattr(profiler, "_threads", lambda: threads - ({"3"} if len(calls) > 2 else set()) if seen else set())
    profiler.stop_profiler(running)
    assert len(calls) == (3 if seen else 20)
    assert "TEARDOWN_CUPTI" not in os.environ


def test_a_profiler_that_cannot_stop_leaves_neither_variable_nor_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEARDOWN_CUPTI", raising=False)
    monkeypatch.setattr(profiler, "profiler_lets_go", lambda: True)

    def stop() -> None:
        raise RuntimeError("no trace")

    step = StepProfile()
    step.running = SimpleNamespace(activities={profile_module.ProfilerActivity.CUDA}, stop=stop)  # type: ignore[assignment]
    assert profiler.PROFILER.acquire(blocking=False)
    with pytest.raises(RuntimeError, match="no trace"):
        step.stop()
    assert "TEARDOWN_CUPTI" not in os.environ
    assert not profiler.PROFILER.locked()


@pytest.mark.parametrize("lets_go", [True, False])
def test_kernels_are_profiled_only_where_the_profiler_lets_go(lets_go: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "profiler_lets_go", lambda: lets_go)
    asked: list[set[Any]] = []

    def profile(activities: list[Any]) -> Any:
        asked.append(set(activities))
        return SimpleNamespace(activities=set(activities), start=lambda: None, stop=lambda: None, profiler=None)

    monkeypatch.setattr(profile_module, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    follower = telemetry.Telemetry(FlashConfig(), Dispatcher(FlashConfig()))
    trainer = SimpleNamespace(device=torch.device("cuda"), args=SimpleNamespace(compile=False))
    follower.on_train_batch_start(trainer)
    follower._profile.stop()
    cpu, cuda = profile_module.ProfilerActivity.CPU, profile_module.ProfilerActivity.CUDA
    assert asked == [{cpu, cuda} if lets_go else {cpu}]
    follower._profile._done = True
    follower.graphs(trainer, {"why_not": "", "capture_seconds": 1.0, "pool_bytes": 1})
    assert follower._profile._done is not lets_go  # a replay has no operators


def test_a_stock_run_says_that_nothing_fused_ran(tiny_args: dict[str, Any], log: list[str]) -> None:
    rows = events(train(tiny_args, backend="stock"))
    assert of(rows, "kernels") == [{"event": "kernels", "counts": {}, "graphs": False, "observed": True}]
    assert of(rows, "epoch")[0]["backends"] == {"stock": LAYERS}
    assert any("one step ran no fused attention" in line for line in log)
    assert any("attention: 0 MiB of score matrices avoided" in line for line in log)
    assert not any("the plan says" in line for line in log)


def test_a_fallback_is_counted_from_then_on(tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flash = backends_module.BACKENDS["sdpa_flash"]
    calls = []

    def fails_in_the_second_epoch(packed: Any, spec: AttentionSpec) -> Any:
        if spec.training:
            calls.append(1)
            if len(calls) > 2 * LAYERS:
                raise RuntimeError("unable to find an engine")
        assert flash.forward is not None
        return flash.forward(packed, spec)

    broken = dataclasses.replace(flash, forward=fails_in_the_second_epoch)
    monkeypatch.setitem(backends_module.BACKENDS, "sdpa_flash", broken)
    monkeypatch.setattr("yolo_flash.dispatch.rules._cpu_rules", lambda spec: iter([("sdpa_flash", "for this test")]))
    model = train({**tiny_args, "epochs": 2}, backend="auto")
    first, second = of(events(model), "epoch")
    assert (first["backends"], first["fallbacks"]) == ({"sdpa_flash": LAYERS}, {})
    assert second["backends"] == {"stock": LAYERS}
    assert "unable to find an engine" in second["fallbacks"]["sdpa_flash"]
    assert model.trainer.batch_size == tiny_args["batch"]  # the trainer did not take it for out of memory


def test_an_out_of_memory_halving_discards_the_profile_and_profiles_again(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    run_out_of_memory_once(model)
    model.train(**{**tiny_args, "batch": 4, "imgsz": 64})
    rows = events(model)
    kinds = [row["event"] for row in rows if row["event"] != "plan"]
    assert kinds == ["run", "graphs", "kernels", "epoch"]
    assert of(rows, "kernels")[0]["counts"][FORWARD] == LAYERS
    assert len(of(rows, "plan")) == 2 * 2 * LAYERS  # planned again for the halved batch


def test_a_file_that_cannot_be_written_costs_one_warning(tiny_args: dict[str, Any], log: list[str]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")
    model.add_callback(  # a folder in the file's place
        "on_pretrain_routine_start", lambda trainer: (Path(trainer.save_dir) / "flash.jsonl").mkdir()
    )
    model.train(**tiny_args)
    assert Path(model.trainer.best).is_file()
    assert len([line for line in log if "no more plan, kernels, memory and speed" in line]) == 1


def test_the_memory_of_graphs_counts_as_allocated(tiny_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts it as reserved alone: a user would take the rest for free."""
    monkeypatch.setattr(telemetry, "peak_memory_gib", lambda device: (1.0, 4.5))
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash", graphs="off")
    held = iter((0.0, 2.0, 9.0))

    def capture(trainer: Any) -> None:
        if (pool := next(held)) > 0:
            facts = {"why_not": "", "capture_seconds": 1.0, "pool_bytes": int(pool * 2**30), "again": "for this test"}
            trainer.flash_run.telemetry.graphs(trainer, facts)

    model.add_callback("on_train_epoch_start", capture)
    model.train(**{**tiny_args, "epochs": 3, "val": False})
    assert [row["peak_allocated_gib"] for row in of(events(model), "epoch")] == [1.0, 3.0, 4.5]


def test_a_profiler_that_cannot_be_made_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def profile(activities: list[Any]) -> Any:
        raise RuntimeError("no activities")

    monkeypatch.setattr(profile_module, "profile", profile)
    follower = telemetry.Telemetry(FlashConfig(), Dispatcher(FlashConfig()))
    trainer = SimpleNamespace(device=torch.device("cpu"), args=SimpleNamespace(compile=False))
    with pytest.raises(RuntimeError, match="no activities"):
        follower.on_train_batch_start(trainer)
    assert not profiler.PROFILER.locked()


def test_no_profiler_is_left_when_a_step_raises(tiny_args: dict[str, Any]) -> None:
    model = patch_model(YOLO("tiny.yaml"), backend="sdpa_flash")

    def break_off(trainer: Any) -> None:
        raise KeyboardInterrupt

    model.add_callback("on_train_batch_start", break_off)
    with pytest.raises(KeyboardInterrupt):
        model.train(**tiny_args)
    with torch.profiler.profile() as profile:  # a second profiler at a time would fail
        torch.ones(1).add(1)
    assert any(event.name == "aten::add" for event in profile.events() or [])


def spec(dtype: torch.dtype, tokens: int = 400, batch: int = 256) -> AttentionSpec:
    return AttentionSpec(batch, 2, tokens, tokens, 32, 32, dtype, "nhwc")


def test_score_matrices_are_counted_as_stock_keeps_them() -> None:
    assert score_bytes([spec(torch.float16)]) == 256 * 2 * 400 * 400 * 6
    assert score_bytes([spec(torch.float32), spec(torch.float32)]) == 2 * 256 * 2 * 400 * 400 * 4
    assert readable(score_bytes([spec(torch.bfloat16, tokens=1600)])) == "7.3 GiB"
    assert readable(37 * 2**20) == "37 MiB"


def test_columns_of_a_csv_that_was_begun_without_ours(tmp_path: Path) -> None:
    metrics = {"train/box_loss": 1.0, "flash/images_per_second": 2.0, "flash/peak_allocated_gib": 3.0}
    csv = tmp_path / "results.csv"
    assert known_columns(csv, metrics) == metrics
    csv.write_text("epoch,time,train/box_loss\n1,2,3\n")
    assert known_columns(csv, metrics) == {"train/box_loss": 1.0}
    csv.write_text("epoch,  time, train/box_loss, flash/images_per_second,flash/peak_allocated_gib\n")
    assert known_columns(csv, metrics) == metrics


def test_a_profile_counts_each_call_once() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].sum().backward()
    operators, kernels = attention_kernels(profiler.events_of(profile))
    assert operators == {FORWARD: 3, f"{FORWARD}_backward": 3}
    assert not kernels


def test_marks_of_the_host_beside_the_kernels_of_a_card_are_no_kernels() -> None:
    """`record_function` may be shown a second time as an event of the GPU: no kernel of that name comes from graphs."""
    cpu, gpu = profile_module.DeviceType.CPU, profile_module.DeviceType.CUDA
    told = [(SPARSE, cpu, 0), (SPARSE, gpu, 5), ("flash_fwd_kernel", gpu, 6), ("gemm", gpu, 9)]

    def event(name: str, device: Any, start: int) -> SimpleNamespace:
        values = {"name": name, "device_type": device, "start_thread_id": 1, "start_ns": start, "duration_ns": 2}
        return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})

    operators, kernels = attention_kernels(event(*of) for of in told)
    assert operators == {SPARSE: 1}
    assert kernels == {"flash_fwd_kernel": 1}


@pytest.mark.parametrize(("pool_gib", "events"), [(1.0, []), (1.0, ["an operator"]), (None, [])])
def test_a_profile_without_the_events_that_matter_accuses_nobody(
    pool_gib: float | None, events: list[str], log: list[str]
) -> None:
    """As where CUPTI is not there, or held by another profiler."""
    follower = telemetry.Telemetry(FlashConfig(), Dispatcher(FlashConfig()))
    step = follower._profile
    step.running, follower._pool_gib = object(), pool_gib  # type: ignore[assignment]
    cpu = profile_module.DeviceType.CPU
    found = [SimpleNamespace(name=lambda name=name: name, device_type=lambda: cpu) for name in events]
    step.stop = lambda: found  # type: ignore[method-assign]
    follower._in_force = lambda: Counter(sdpa_flash=8)  # type: ignore[method-assign]
    step._eager_kernels = Counter({"void flash_fwd_kernel<x>": 8})
    follower.on_train_batch_end(SimpleNamespace(device=torch.device("cpu"), world_size=1))
    (line,) = log
    assert "could not be observed here" in line
    assert "no fused attention" not in line


@pytest.mark.skipif(profiler._level() is None, reason="this build of torch hides the level of its profiler's lines")
@pytest.mark.parametrize("variable", [{}, {"KINETO_LOG_LEVEL": "5"}])  # which Ultralytics sets
def test_the_profiler_writes_nothing_of_its_own_to_the_terminal_and_speaks_again_behind_it(
    variable: dict[str, str],
) -> None:
    script = """if True:
        import os
        from torch.profiler import ProfilerActivity, profile
        from yolo_flash.utils.profiler import hushed
        before = os.environ.get("KINETO_LOG_LEVEL")
        for _ in range(2):
            running = profile(activities=[ProfilerActivity.CPU])
            with hushed():
                running.start()
            with hushed():
                running.stop()
            assert os.environ.get("KINETO_LOG_LEVEL") == before
        os.write(1, b"then")
        with profile(activities=[ProfilerActivity.CPU]):
            pass
    """

    def said(code: str) -> str:
        command = [sys.executable, "-c", code]
        run: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        done = subprocess.run(command, timeout=60, **run)
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"} | variable
    stock = "import torch.profiler as p\nwith p.profile(activities=[p.ProfilerActivity.CPU]): pass"
    hushed, then = said(script).split("then", 1)
    assert hushed == ""
    assert then.count("profiler_start") == said(stock).count("profiler_start")
