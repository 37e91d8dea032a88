"""`yolo-flash bench train`: Ultralytics' trainer with clocks, warm epochs alone, arms by the arguments of `train`."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yolo_flash.bench import train
from yolo_flash.bench.rounds import COLUMNS, size_table, summary
from yolo_flash.bench.train import TRAIN_ARMS, Clocks, TrainJob, get_ready, train_arguments
from yolo_flash.cli import main


def test_a_training_is_measured_from_the_command_line(coco8: str, tmp_path: Path, log: list[str]) -> None:
    typed = f"bench train data={coco8} imgsz=64 batch=3 epochs=4 arms=eager device=cpu json=train.json csv=train.csv"
    main.main(typed.split())
    results = json.loads((tmp_path / "train.json").read_text())
    (sample,) = results["arms"]["eager"]["samples"]
    assert len(sample["losses"]) == len(sample["epoch_iteration_ms"]) == 4
    assert all(0 < loss < 100 for loss in sample["losses"])
    assert sample["iteration_ms"] == pytest.approx(statistics.median(sample["epoch_iteration_ms"][2:]))
    assert sample["iterations"] == 2  # three pictures and one
    assert sample["images_per_second"] == pytest.approx(2e3 / sample["iteration_ms"], rel=0.5)
    assert 1 < sample["without_loader_ms"] < 2 * sample["iteration_ms"]
    assert len(sample["epoch_without_loader_ms"]) == 2
    assert 0 < sample["wait_ms"] < sample["iteration_ms"]
    assert 0.1 < sample["peak_gib"] == sample["reserved_gib"] < 32
    assert "losses" not in results["arms"]["eager"]["median"]
    with (tmp_path / "train.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert tuple(row) == (*COLUMNS, *TrainJob.more_columns)
    assert (row["command"], row["data"], row["precision"], row["epochs"], row["error"]) == (
        *("train", coco8, "fp32", "4"),
        "",
    )
    assert float(row["iteration_ms"]) == pytest.approx(sample["iteration_ms"], rel=1e-5)
    assert float(row["reserved_gib"]) == pytest.approx(sample["reserved_gib"], rel=1e-5)
    text = next(line for line in log if "| arm |" in line)
    assert f"yolo12n.yaml data={coco8} imgsz=64 batch=3, fp32, 1 processes an arm, 4 epochs each" in text
    assert "| 1.00x |" in text
    assert {file.name for file in tmp_path.iterdir()} == {"train.json", "train.csv"}


# Clocks ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which passes by assignment only."""
    clock = SimpleNamespace(ms=0.0)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.ms / 1e3)
    return clock


def a_trainer(batch: int = 4) -> Any:
    class Loader(list[dict[str, int]]):
        batch_size, dataset = batch, range(10)

    loader = Loader([{"images": 4}, {"images": 4}, {"images": 2}])
    return SimpleNamespace(batch_size=batch, train_loader=loader, tloss={"box": torch.tensor(1.5), "cls": 2.0})


def test_figures_are_medians_over_the_warm_epochs(clock: SimpleNamespace) -> None:
    clocks, trainer = Clocks(TrainJob(batch=4, device="cpu", epochs=5)), a_trainer()
    loader = trainer.train_loader
    for step in (900.0, 500.0, 40.0, 60.0, 50.0, 33.0, 30.0, 31.0):
        clocks.on_train_epoch_start(trainer)
        assert (trainer.train_loader is loader) == (step > 35)
        for share in (1.0, 1.0, 0.5):  # ten images: 4, 4 and 2
            clock.ms += 10
            clocks.on_train_batch_start(trainer)
            clock.ms += step * share
            clocks.on_train_batch_end(trainer)
        clock.ms += 5  # until the GPU is done
        clocks.on_train_epoch_end(trainer)
        clock.ms += 7000  # validation
    figures = clocks.figures()
    assert figures["without_loader_ms"] == pytest.approx((30 + 2.5 * 31 + 5) / 3)
    assert len(figures["epoch_without_loader_ms"]) == 3
    assert figures["wait_ms"] == pytest.approx(10)
    assert figures["iteration_ms"] == pytest.approx((3 * 10 + 2.5 * 50 + 5) / 3)
    assert figures["images_per_second"] == pytest.approx(10 / 0.160)
    assert figures["iterations"] == 3
    assert figures["losses"] == [3.5] * 5
    assert figures["epoch_iteration_ms"][0] == pytest.approx((30 + 2.5 * 900 + 5) / 3)


def test_batches_from_memory_are_the_first_of_the_loader_every_time() -> None:
    loader = a_trainer().train_loader
    held = train.InMemory(loader)
    for batch in held:
        batch["images"] = 0  # as the trainer puts its own into it
    assert list(held) == list(loader)
    assert (len(held), held.batch_size, held.dataset) == (3, 4, range(10))


def test_images_that_the_loader_drops_do_not_count(clock: SimpleNamespace) -> None:
    clocks, trainer = Clocks(TrainJob(batch=4, device="cpu")), a_trainer()
    clocks.on_train_epoch_start(trainer)
    for _ in range(2):  # the batch of two is not there
        clocks.on_train_batch_start(trainer)
        clock.ms += 50
        clocks.on_train_batch_end(trainer)
    clocks.on_train_epoch_end(trainer)
    assert clocks.epochs[0]["images_per_second"] == pytest.approx(8 / 0.1)


def test_a_halved_batch_counts_as_out_of_memory() -> None:
    clocks = Clocks(TrainJob(batch=16, device="cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        clocks.on_train_epoch_start(a_trainer(8))


def test_another_precision_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainJob, "torch_device", lambda job: torch.device("cuda:0"))
    Clocks(TrainJob(amp="bf16")).on_train_start(SimpleNamespace(amp=True))
    Clocks(TrainJob(amp="fp32")).on_train_start(SimpleNamespace(amp=False))
    with pytest.raises(ValueError, match="does not train in fp16 on this GPU: measure with amp=fp32"):
        Clocks(TrainJob()).on_train_start(SimpleNamespace(amp=False))


def test_speed_up_is_by_the_iteration() -> None:
    def arm(iteration: float) -> dict[str, Any]:
        sample = dict.fromkeys(TrainJob.columns, 1.0) | {"iteration_ms": iteration, "losses": [3.0, 2.0]}
        return {"samples": [sample], "median": summary([sample])}

    job = {"model": "m.yaml", "data": "d.yaml", "imgsz": 64, "batch": 2, "rounds": 1, "epochs": 5, "amp": "fp16"}
    arms = {"unpatched": arm(60.0), "graphs": arm(40.0)}
    results = {"yolo_flash": "1", "job": job | {"arms": list(arms)}, "machine": {}, "arms": arms}
    assert size_table(results, TrainJob.columns).splitlines()[-1].endswith("| 1.50x |")


# Arms -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arm", "compiled", "settings"),
    [
        ("unpatched", False, None),
        ("compile", True, None),
        ("compile_max_autotune", "max-autotune", None),
        ("triton_area", False, {"backend": "triton_area", "graphs": "off"}),
        ("eager", False, {"graphs": "off"}),
        ("graphs", False, {"graphs": "on"}),
        ("auto", False, {"graphs": "auto"}),
    ],
)
def test_an_arm_is_a_setting(
    arm: str, compiled: bool | str, settings: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, Any]] = []
    patched: list[dict[str, Any]] = []
    folders: list[Path] = []
    events: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            assert name == "yolo12n.yaml"

        def add_callback(self, event: str, call: Any) -> None:
            events.append(event)

        def train(self, **arguments: Any) -> None:
            folders.append(Path(arguments.pop("project")))
            assert folders[0].is_dir()
            trained.append(arguments)

    monkeypatch.setattr(train, "open_model", Model)
    monkeypatch.setattr(train, "patch_model", lambda model, **keys: patched.append(keys))
    monkeypatch.setattr(train.offline, "data_within_reach", lambda data: f"/there/{data}")
    monkeypatch.setattr(Clocks, "figures", lambda clocks: {"iteration_ms": 1.0})
    job = TrainJob(batch=8, epochs=5, device="cpu", workers=2, cache=False, seed=3, mosaic=0)
    assert get_ready(job, arm)(96) == {"iteration_ms": 1.0}
    (arguments,) = trained
    assert arguments == train_arguments(job, arm) | {"data": "/there/coco8.yaml", "imgsz": 96}
    assert arguments["compile"] == compiled
    assert [arguments[name] for name in ("batch", "epochs", "workers", "cache", "seed")] == [8, 8, 2, False, 3]
    assert (arguments["mosaic"], arguments["close_mosaic"], arguments["patience"]) == (0.0, 0, 0)
    assert not any(arguments[name] for name in ("val", "save", "plots", "pretrained", "amp"))
    assert patched == ([] if settings is None else [settings])
    assert sorted(events) == [
        f"on_train_{event}" for event in ("batch_end", "batch_start", "epoch_end", "epoch_start", "start")
    ]
    assert not folders[0].exists()


@pytest.mark.parametrize(("amp", "given"), [("fp16", True), ("bf16", "bf16"), ("fp32", False)])
def test_precision_and_device_are_those_of_the_job_on_a_gpu(
    amp: str, given: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainJob, "torch_device", lambda job: torch.device("cuda:1"))
    arguments = train_arguments(TrainJob(amp=amp, device="1"), "unpatched")
    assert arguments["amp"] == given
    assert arguments["device"] == "1"
    assert arguments["mosaic"] == 1.0


@pytest.mark.parametrize(
    ("device", "arms"), [("cpu", ("unpatched", "eager")), ("cuda", ("unpatched", "eager", "graphs"))]
)
def test_without_arms_the_plugin_is_compared_with_stock(
    device: str, arms: tuple[str, ...], coco8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[TrainJob] = []
    monkeypatch.setattr(train, "bench", measured.append)
    monkeypatch.setattr(TrainJob, "torch_device", lambda job: torch.device(device))
    train.bench_train(TrainJob(data=coco8))
    train.bench_train(TrainJob(data=coco8, arms=TRAIN_ARMS))
    assert [job.arms for job in measured] == [arms, TRAIN_ARMS]


# The command ----------------------------------------------------------------------------------------------------------
def test_settings_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[TrainJob] = []
    monkeypatch.setattr(train, "bench_train", jobs.append)
    typed = "bench train data=coco128.yaml imgsz=320 arms=unpatched,auto device=0 cache=False mosaic=0.5 amp=bf16 csv=7"
    main.main(typed.split())
    arms = ("unpatched", "auto")
    job = TrainJob(data="coco128.yaml", imgsz=(320,), arms=arms, device="0", cache=False, mosaic=0.5, amp="bf16")
    assert [(job.csv, job.rounds, job.batch) for job in jobs] == [("7", 1, 16)]
    assert jobs[0].__dict__ | {"csv": ""} == job.__dict__


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("epochs=2", "epochs must be a whole number of at least 3, found 2"),
        ("workers=-1", "workers must be a whole number of at least 0, found -1"),
        ("arms=unpatched,grphs", "there is no arm 'grphs'. Did you mean 'graphs'?"),
        (
            "arms=nchw",
            r"there is no arm 'nchw'\. Valid: unpatched, compile, compile_max_autotune, stock, .*eager, graphs, auto",
        ),
        ("device=0,1", "device must be cpu or the index of one GPU"),
        ("mosaic=2", "mosaic must be a number from 0 to 1, found 2"),
        ("cache=tape", "cache must be ram, disk or False, found 'tape'"),
        ("amp=fp8", "amp must be fp16, bf16 or fp32, found 'fp8'"),
        ("steps=3", r"bench train takes model=\.\.\., .*, data=\.\.\., .*; found steps"),
        ("data=missing.yaml", "bench train: .*missing.yaml"),
        ("model=yolo12n.pt", r"model=yolo12n\.pt is not on this machine and cannot be downloaded"),
    ],
)
def test_mistakes_are_told_before_a_process_starts(typed: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main.main(["bench", "train", typed, "csv=train.csv"])
    assert list(tmp_path.iterdir()) == []
