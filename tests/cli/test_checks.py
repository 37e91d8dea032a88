"""`yolo-flash checks`: facts about this device for people and, with --json, for programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import ultralytics
from ultralytics.utils import LOGGER

from yolo_flash import checks
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.cli import checks as report
from yolo_flash.cli import main
from yolo_flash.machine import PACKAGES, Machine

SPECS = ["YOLO12, area attention", "YOLO26, PSA", "RT-DETR, decoder"]
T4 = Machine(
    kind="cuda",
    name="Tesla T4",
    capability=(7, 5),
    memory_gib=14.6,
    torch="2.11.0+cu130",
    toolkit="13.0",
    cudnn=91501,
    packages={"triton": "ImportError: no triton here"},
    system="Python 3.12.1, Linux",
)


@pytest.fixture(autouse=True)
def _without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics asks `pip show`, a process of a second, whether it is installed twice."""
    monkeypatch.setattr("ultralytics.utils.checks.check_multiple_install", lambda: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "detect", lambda device: T4)


def rows(text: str) -> list[tuple[str, str]]:
    """The table's lines: backend and verdict."""
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return [(name, verdict) for name, verdict in lines if name in BACKENDS]


def test_the_report_names_device_versions_backends_and_ends_with_ultralytics_checks(
    no_gpu: None, log: list[str]
) -> None:
    main.main(["checks"])
    ours = log[0]
    assert ours.startswith(f"yolo-flash {version('yolo-flash')}\n")
    for fact in ("(CPU)", f"torch {torch.__version__}", f"Python {sys.version.split()[0]}", "triton ", *SPECS):
        assert fact in ours
    assert [name for name, _ in rows(ours)] == [*BACKENDS] * len(SPECS)
    rest = "\n".join(log[1:])
    assert f"Ultralytics {ultralytics.__version__}" in rest
    assert "CPU count" in rest
    assert "Setup complete" in rest


def test_every_backend_is_ready_or_has_its_reasons_with_numbers(t4: None, log: list[str]) -> None:
    checks()
    assert log[0].splitlines()[:3] == [
        f"yolo-flash {version('yolo-flash')}",
        "Tesla T4 (Turing, compute capability 7.5), 15 GiB",
        "torch 2.11.0+cu130, CUDA 13.0, cuDNN 9.15.1, Python 3.12.1, Linux, triton ImportError: no triton here",
    ]
    refused = "needs compute capability >= 8.0, Tesla T4 has 7.5"
    for start in range(0, 3 * len(BACKENDS), len(BACKENDS)):
        table = rows(log[0])[start : start + len(BACKENDS)]
        verdicts = dict(table)
        assert verdicts["stock"] == "ready"
        assert verdicts["sdpa_flash"].startswith(refused)
        assert verdicts["sdpa_cudnn"].startswith(refused)
        assert verdicts["sdpa_efficient"].startswith("ready  <- auto: ")
        assert sum("<- auto" in verdict for verdict in verdicts.values()) == 1


def test_the_typical_layers_are_those_of_yolo12_yolo26_and_rtdetr_at_640() -> None:
    gpu = report.typical_specs(T4)
    cpu = report.typical_specs(Machine(kind="cpu", name="CPU"))
    assert list(gpu) == list(cpu) == SPECS
    assert [str(spec) for spec in gpu.values()] == [
        "64 x 2 heads x 400 tokens x 32, float16, nhwc, train",
        "16 x 2 heads x 400 tokens x 32/64, float16, nhwc, train",
        "16 x 8 heads x 500 tokens x 32, float16, separate, masked, train",
    ]
    assert [str(spec) for spec in cpu.values()] == [
        "64 x 2 heads x 400 tokens x 32, float32, nchw, train",
        "16 x 2 heads x 400 tokens x 32/64, float32, nchw, train",
        "16 x 8 heads x 500 tokens x 32, float32, separate, masked, train",
    ]


@pytest.mark.parametrize("typed", [["device=cpu"], ["--device=cpu"], ["device", "=", "cpu"], ["device = cpu"]])
def test_a_device_may_be_named(typed: list[str], log: list[str]) -> None:
    main.main(["checks", *typed])
    assert "(CPU)" in log[0].splitlines()[1]


@pytest.mark.parametrize("command", ["checks", "--checks", "check", "CHECKS"])
def test_the_spellings_that_ultralytics_allows_are_ours(command: str, log: list[str]) -> None:
    main.main([command, "device=cpu"])
    assert log[0].startswith("yolo-flash ")


@pytest.mark.parametrize("device", ["0", "7", "0,1", "cuda:0", "fast"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_device_that_is_not_there_is_told(
    device: str, as_json: list[str], no_gpu: None, log: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["checks", f"device={device}", *as_json])
    assert end.value.code == (
        f"yolo-flash: checks: there is no device={tuple(map(int, device.split(','))) if ',' in device else device}: "
        f"torch sees 0 GPUs here. Valid: device=cpu."
    )
    assert (log, capsys.readouterr().out) == ([], "")
    assert LOGGER.disabled is False


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["devise=0"], "devise"),
        (["verbose"], "verbose"),
        (["flash.backend=stock", "--jsn"], "jsn, flash.backend"),
        (["device="], "device="),
    ],
)
def test_arguments_that_checks_does_not_take_are_told(typed: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["checks", *typed])
    assert end.value.code == f"yolo-flash: checks takes device=..., --json and --clear-cache, found {told}."


def test_json_holds_the_same_facts_and_nothing_is_logged(
    no_gpu: None, log: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(["checks", "--json", "device=cpu"])
    facts = json.loads(capsys.readouterr().out)
    assert log == []
    assert facts["yolo_flash"] == version("yolo-flash")
    assert facts["device"].endswith("(CPU)")
    assert facts["machine"]["kind"] == "cpu"
    assert facts["ultralytics"]["CPU count"] == os.cpu_count()
    assert list(facts["backends"]) == SPECS
    for verdicts in facts["backends"].values():
        assert verdicts["auto"] in BACKENDS
        assert verdicts[verdicts["auto"]] == "ready"
        for name in BACKENDS:
            reasons = verdicts[name]
            assert reasons == "ready" or (reasons and all(isinstance(reason, str) for reason in reasons))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_notebook_is_not_cleared(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics would clear the cell that has our report, or write to standard output."""
    calls: list[int] = []
    notebook: Any = ModuleType("IPython")
    notebook.display = SimpleNamespace(clear_output=lambda: calls.append(1))
    if loaded:
        monkeypatch.setitem(sys.modules, "IPython", notebook)
    else:
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    checks("cpu")
    assert calls == []
    assert sys.modules.get("IPython") is (notebook if loaded else None)
    assert ("IPython" in sys.modules) is loaded


def test_json_and_the_returned_facts_agree(t4: None, capsys: pytest.CaptureFixture[str]) -> None:
    facts = checks(as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts, default=str))
    assert facts["backends"][SPECS[0]]["sdpa_flash"] == ["needs compute capability >= 8.0, Tesla T4 has 7.5"]


def test_checks_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads(), dict(os.environ), LOGGER.disabled
    monkeypatch.setattr("ultralytics.utils.torch_utils.NUM_THREADS", before[0] + 1)
    checks("cpu")
    assert (torch.get_num_threads(), dict(os.environ), LOGGER.disabled) == before


def test_the_log_is_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no psutil")

    monkeypatch.setattr(report, "collect_system_info", fail)
    with pytest.raises(RuntimeError, match="no psutil"):
        checks("cpu", as_json=True)
    assert LOGGER.disabled is False


def test_json_stands_alone_on_standard_output(tmp_path: Path) -> None:
    """Also from the first command of a new user, for whom Ultralytics writes its settings and says so."""
    done = subprocess.run(
        [sys.executable, "-m", "yolo_flash", "checks", "--json", "device=cpu"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=os.environ | {"YOLO_CONFIG_DIR": str(tmp_path)},
        check=True,
    )
    assert json.loads(done.stdout)["machine"]["kind"] == "cpu"
    assert list(tmp_path.rglob("settings.json"))


# Plan -----------------------------------------------------------------------------------------------------------------
def test_plan_says_what_a_run_would_use_and_what_became_of_the_others(log: list[str]) -> None:
    main.main(["plan", "imgsz=640", "batch=4", "device=cpu"])
    text = "\n".join(log)
    assert "8 attention layers on" in text
    assert re.search(r"train +4 in model\.6 +AAttn +16 +2 +400 +sdpa_flash +fused on the CPU", text)
    assert re.search(r"val +4 in model\.8 +AAttn +8 +4 +441 +sdpa_flash", text)
    assert "\n  val: 8 square pictures, padded to 672 x 672; a run plans with the shapes of its own data" in text
    assert "16 x 2 heads x 400 tokens x 32, float32, nchw, train: sdpa_flash; the others" in text
    assert re.search(r"\n    stock +ready\n", text)
    assert re.search(r"\n    sdpa_cudnn +runs on NVIDIA cards, the device is", text)
    scores = 4 * (16 * 2 + 4 * 4) * 400**2  # four layers of 16 groups with 2 heads, and four of 4 groups with 4 heads
    assert f"(score matrices: {scores * 4 / 2**20:.0f} MiB, 0 MiB)" in text


def test_plan_as_json_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["plan", "model=yolo26n.yaml", "imgsz=64", "device=cpu", "train", "--json", "flash.backend=sdpa_math"])
    facts = json.loads(capsys.readouterr().out)
    assert [row["layer"].split(".")[1] for row in facts["plan"]] == ["10", "22"]
    for row in facts["plan"]:
        assert (row["mode"], row["backend"], row["why"]) == ("train", "sdpa_math", "asked for")
        assert row["spec"]["seq_len_q"] == 4
        assert set(row["refused"]) == {"sdpa_efficient", "sdpa_cudnn", "triton_area", *PACKAGES, "sparse_window"}
    assert facts["score_bytes"]["stock"] == facts["score_bytes"]["planned"] > 0
    assert facts["machine"]["kind"] == "cpu"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("plan imgz=64", r"plan takes model=\.\.\., imgsz=.* found imgz"),
        ("plan predict", "found predict"),
        ("plan batch=0", "batch must be a whole number of at least 1, found 0"),
        ("plan imgsz=[640,480]", r"imgsz must be a whole number of at least 1, found \[640, 480\]"),
        ("plan model=yolov8n.yaml device=cpu", "yolov8n.yaml has no attention layer that the plugin knows"),
        ("plan flash.enabled=false device=cpu", "flash.enabled=false, or YOLO_FLASH=0: stock runs, .* nothing to plan"),
        ("plan amp=maybe device=cpu", "amp must be True, False, fp16, bf16 or fp32, found 'maybe'"),
        ("plan batch=true", "batch must be a whole number of at least 1, found True"),
        ("plan flash.backend=sdpa_cudnn device=cpu", "runs on NVIDIA cards"),
        ("plan device=7", r"^yolo-flash: plan: there is no device=7: torch sees \d GPUs? here\. Valid: .*\.$"),
    ],
)
def test_plan_tells_what_it_cannot_do(typed: str, told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        main.main(typed.split())


def test_the_switch_of_the_environment_leaves_nothing_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_FLASH", "0")
    with pytest.raises(SystemExit, match="YOLO_FLASH=0: stock runs, and there is nothing to plan"):
        main.main(["plan", "device=cpu"])


def test_a_size_is_rounded_up_as_by_train_and_said(log: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["plan", "imgsz=33", "batch=2", "device=cpu", "train"])
    assert "imgsz=[33] must be multiple of max stride 32, updating to [64]" in log[0]
    assert re.search(r"train +4 in model\.8 +AAttn +2 +4 +4 ", "\n".join(log))
    main.main(["plan", "imgsz=33", "batch=2", "device=cpu", "train", "--json"])
    assert json.loads(capsys.readouterr().out)["imgsz"] == 64
