"""The golden table: which backend each card gets for each kind of layer, and why not the others."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from tests.machines import MACHINES
from yolo_flash import AttentionSpec, BackendNotSupportedError
from yolo_flash.backends.registry import BACKENDS
from yolo_flash.backends.spec import Window
from yolo_flash.dispatch.decision import Trial, select
from yolo_flash.machine import PACKAGES

_COMMON: dict[str, Any] = {"num_heads": 2, "seq_len_q": 400, "seq_len_k": 400, "head_dim": 32}
HALF = {**_COMMON, "dtype": torch.float16, "layout": "nhwc"}
_RTDETR: dict[str, Any] = {"num_heads": 8, "layout": "separate"}

SPECS = {
    "area fp16 train": AttentionSpec(batch=64, head_dim_v=32, **HALF),
    "area bf16 train": AttentionSpec(batch=64, head_dim_v=32, **{**HALF, "dtype": torch.bfloat16}),
    "area fp32 train": AttentionSpec(batch=64, head_dim_v=32, **{**HALF, "dtype": torch.float32}),
    "area fp16 predict": AttentionSpec(batch=4, head_dim_v=32, training=False, **HALF),
    "area fp32 predict nchw": AttentionSpec(
        batch=4, head_dim_v=32, training=False, dtype=torch.float32, layout="nchw", **_COMMON
    ),
    "psa fp16 train": AttentionSpec(batch=16, head_dim_v=64, **HALF),
    "psa fp16 predict": AttentionSpec(batch=1, head_dim_v=64, training=False, **HALF),
    "psa fp16 train 1600": AttentionSpec(batch=4, head_dim_v=64, **{**HALF, "seq_len_q": 1600, "seq_len_k": 1600}),
    "psa 36/72 fp16 train": AttentionSpec(batch=16, head_dim_v=72, **{**HALF, "head_dim": 36}),
    "area fp32 train nchw": AttentionSpec(batch=64, head_dim_v=32, dtype=torch.float32, layout="nchw", **_COMMON),
    "psa fp16 predict nchw": AttentionSpec(batch=1, head_dim_v=64, training=False, **{**HALF, "layout": "nchw"}),
    "psa fp16 predict nchw 1600": AttentionSpec(
        batch=4, head_dim_v=64, training=False, **{**HALF, "layout": "nchw", "seq_len_q": 1600, "seq_len_k": 1600}
    ),
    "mha fp16 train": AttentionSpec(batch=16, head_dim_v=32, **{**HALF, **_RTDETR}),
    "mha fp16 train mask": AttentionSpec(batch=16, head_dim_v=32, mask=True, **{**HALF, **_RTDETR}),
    "mha fp32 predict": AttentionSpec(
        batch=1, head_dim_v=32, training=False, **{**HALF, **_RTDETR, "dtype": torch.float32}
    ),
}

F, E, C, S, T = "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "stock", "triton_area"
GOLDEN = {  # machine: the backend for each spec above
    "P100": [E, S, E, E, S, E, E, E, E, E, S, E, E, E, E],
    "V100": [E, S, E, E, S, E, E, E, E, E, S, E, E, E, E],
    "T4": [E, S, E, E, S, E, E, E, E, E, S, E, E, E, E],
    "A100": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "RTX 3090": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "RTX 4090": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "H100": [T, T, E, T, S, T, T, T, T, E, T, T, F, E, E],
    "H100 without Triton": [F, F, E, F, S, C, F, F, C, E, S, F, F, E, E],
    "B200": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "RTX 5090": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "MI300": [F, F, E, F, S, F, F, F, F, E, S, F, F, E, E],
    "RX 7900": [S] * 15,
    "MPS": [S] * 15,
    "CPU": [F, F, F, F, F, F, S, F, F, F, S, F, F, F, F],
}


def test_the_table_covers_every_machine() -> None:
    assert list(GOLDEN) == list(MACHINES)


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_takes(machine: str) -> None:
    found = [select(spec, MACHINES[machine]).backend for spec in SPECS.values()]
    assert dict(zip(SPECS, found, strict=True)) == dict(zip(SPECS, GOLDEN[machine], strict=True))


REASONS = [
    ("T4", "area fp16 train", F, "needs compute capability >= 8.0, Tesla T4 has 7.5"),
    ("T4", "area fp16 train", C, "needs compute capability >= 8.0, Tesla T4 has 7.5"),
    ("V100", "area fp16 train", F, "needs compute capability >= 8.0, Tesla V100-SXM2-16GB has 7.0"),
    ("V100", "area bf16 train", E, "bfloat16 needs compute capability >= 8.0, Tesla V100-SXM2-16GB has 7.0"),
    ("H100", "area fp32 train", F, "needs float16 or bfloat16, the tensors are float32"),
    ("H100", "area fp32 train", C, "needs float16 or bfloat16, the tensors are float32"),
    ("MI300", "area fp16 train", C, "runs on NVIDIA cards, the device is AMD Instinct MI300X (gfx942)"),
    ("RX 7900", "area fp16 train", F, "torch ships AMD kernels for gfx90a, gfx942 and gfx950, the device is gfx1100"),
    ("MPS", "area fp16 train", F, "runs on CUDA, ROCm and the CPU, the device is Apple GPU (MPS)"),
    ("MPS", "area fp16 train", E, "runs on CUDA and ROCm, the device is Apple GPU (MPS)"),
    ("T4", "area fp16 train", T, "needs compute capability >= 8.0, Tesla T4 has 7.5"),
    ("MI300", "area fp16 train", T, "runs on NVIDIA cards, the device is AMD Instinct MI300X (gfx942)"),
    ("CPU", "area fp16 train", T, "runs on NVIDIA cards, the device is AMD EPYC (CPU)"),
    ("H100", "area fp32 train", T, "needs float16 or bfloat16, the tensors are float32"),
    (
        "H100 without Triton",
        "area fp16 train",
        T,
        "needs triton >= 3.3, its import gave ModuleNotFoundError: No module named 'triton'",
    ),
    ("CPU", "area fp16 train", E, "runs on CUDA and ROCm, the device is AMD EPYC (CPU)"),
]


@pytest.mark.parametrize(("machine", "spec", "backend", "reason"), REASONS)
def test_a_refusal_says_what_was_wanted_and_found(machine: str, spec: str, backend: str, reason: str) -> None:
    assert select(SPECS[spec], MACHINES[machine]).refused[backend] == (reason,)


def refusals(backend: str, machine: str = "H100", **changes: Any) -> str:
    """The reasons of a backend for the first spec with some fields changed."""
    fields = set(AttentionSpec._fields)
    spec = SPECS["area fp16 train"]._replace(**{k: v for k, v in changes.items() if k in fields})
    card = dataclasses.replace(MACHINES[machine], **{k: v for k, v in changes.items() if k not in fields})
    return "; ".join(BACKENDS[backend].not_supported_reasons(spec, card))


def test_limits_have_numbers() -> None:
    assert refusals(F, head_dim=264, head_dim_v=264) == "needs head_dim <= 256, the layer has 264"
    assert refusals(C, head_dim_v=136) == "needs head_dim <= 128, the layer has 136"
    assert refusals(F, flash_built=False) == "torch 2.11.0+cu130 was built without the flash kernels"
    assert (
        refusals(F, "RTX 4090", head_dim=200, head_dim_v=200)
        == "no backward for head_dim 200 at compute capability 8.9"
    )
    assert refusals(F, "RTX 4090", head_dim=200, head_dim_v=200, training=False) == ""
    assert refusals(C, cudnn=91002) == (
        "needs cuDNN >= 9.15.1 for a sequence length that is no multiple of 128, found 9.10.2 and 400 tokens"
    )
    assert refusals(C, cudnn=91002, seq_len_q=512, seq_len_k=512) == ""
    assert "tiles of 128 (cudnn-frontend issue 1072), found 1600 tokens" in refusals(C, seq_len_q=1600, seq_len_k=1600)
    assert refusals(C, seq_len_q=1600, seq_len_k=1600, training=False) == ""
    assert refusals(C, torch="2.5.1+cu124").startswith("needs torch >= 2.6, found 2.5.1+cu124")
    assert refusals(C, cudnn=None) == "needs cuDNN, torch reports none"
    assert refusals(C, seq_len_q=1, seq_len_k=1) == "needs at least 2 key tokens, the layer has 1"
    assert refusals(T, head_dim=136) == "needs head_dim <= 128, the layer has 136"
    assert refusals(T, packages={"triton": "3.2.0"}) == "needs triton >= 3.3, found 3.2.0"
    for version in ("3.3.0+git1234", "3.5.0-windows", "3.4.0.post2", "3.6"):
        assert refusals(T, packages={"triton": version}) == ""
    assert refusals(T, packages={}) == "needs triton >= 3.3, its import gave none"
    assert refusals(C, batch=70000) == "needs batch x area <= 65535, found 70000"


def test_masks_and_separate_tensors() -> None:
    separate: dict[str, Any] = {"layout": "separate"}
    masked = {**separate, "mask": True}
    for backend in ("sdpa_math", F, E, C):
        assert refusals(backend, **separate) == ""
    for machine in ("H100", "CPU"):
        assert refusals("sdpa_math", machine, **masked) == ""
    assert refusals(E, **masked) == refusals(F, "CPU", **masked) == ""
    assert refusals(F, **masked) == "takes no mask, 400 queries x 400 keys are masked"
    assert refusals(C, **masked).startswith("takes no mask here, 400 queries x 400 keys are masked: its gradients were")
    assert refusals(T, **separate) == "takes the packed output of one convolution, the 3 tensors are separate"
    for backend in ("sdpa_math", E, T):
        assert refusals(backend, mask=True) == (
            "takes a mask with separate queries, keys and values only, the tensors are packed"
        )


def test_an_explicit_choice_raises_with_reasons_and_with_what_would_work() -> None:
    with pytest.raises(BackendNotSupportedError) as error:
        select(SPECS["area fp16 train"], MACHINES["T4"], choice="sdpa_flash")
    assert str(error.value) == (
        "backend=sdpa_flash cannot run 64 x 2 heads x 400 tokens x 32, float16, nhwc, train on Tesla T4 (Turing, "
        "compute capability 7.5): needs compute capability >= 8.0, Tesla T4 has 7.5. "
        "These can: auto, stock, sdpa_math, sdpa_efficient."
    )


def test_an_explicit_choice_that_was_wrong_in_its_trial_raises_but_lack_of_memory_there_is_no_verdict() -> None:
    spec, card = SPECS["area fp16 train"], MACHINES["H100"]
    wrong = Trial(error=0.3, why_not="wrong: gradient is off by 0.3, 0.001 is allowed")
    with pytest.raises(BackendNotSupportedError, match=rf"backend={F} cannot run .*: wrong: gradient is off by 0\.3, "):
        select(spec, card, choice=F, trials={F: wrong})
    too_large = Trial(why_not="not measured: one image takes about 9 GiB", no_memory=True)
    assert select(spec, card, choice=F, trials={F: too_large, T: wrong}).backend == F


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BackendNotSupportedError, match=r"no backend 'sdpa_flesh'\. Did you mean 'sdpa_flash'"):
        select(SPECS["area fp16 train"], MACHINES["H100"], choice="sdpa_flesh")


@pytest.mark.parametrize("choice", [name for name in BACKENDS if name not in PACKAGES])
def test_an_explicit_choice_that_can_run_is_taken(choice: str) -> None:
    spec = SPECS["psa fp16 train"]
    if not BACKENDS[choice].exact:  # of which blocks tell what it sees
        spec = spec._replace(window=Window(20, 20, 9))
    decision = select(spec, MACHINES["H100"], choice)
    assert (decision.backend, decision.why) == (choice, "asked for")


def test_strict_takes_reproducible_backends_for_training_only() -> None:
    train, predict = SPECS["area fp16 train"], SPECS["area fp16 predict"]
    for machine, fused in (("H100", T), ("H100 without Triton", "stock"), ("A100", T), ("T4", "stock")):
        strict = select(train, MACHINES[machine], deterministic="strict")
        assert strict.backend == fused
        assert strict.reproducible
        assert "changes from run to run" in strict.refused[F][-1]
    assert select(predict, MACHINES["A100"], deterministic="strict").backend == F
    assert select(SPECS["area fp32 train nchw"], MACHINES["CPU"], deterministic="strict").backend == F
    with pytest.raises(
        BackendNotSupportedError, match=r"deterministic=strict.*These can: auto, stock, sdpa_math, triton_area\."
    ):
        select(train, MACHINES["H100"], choice=F, deterministic="strict")


def test_a_backend_that_failed_is_not_taken_again() -> None:
    decision = select(SPECS["area fp16 train"], MACHINES["H100"], failed={T: "raised in this run: boom"})
    assert decision.backend == F
    assert decision.refused[T] == ("raised in this run: boom",)


ALL_FAILED = {name: "boom" for name in BACKENDS if name != S}
NONE_FITS = {name: Trial(why_not="not measured: one image takes about 90 GiB", no_memory=True) for name in BACKENDS}


def test_auto_never_raises() -> None:
    """Every machine, layout, dtype, size and mode has an answer, and that answer can run."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for machine, dtype, layout, dims, tokens, training, strict in itertools.product(
        MACHINES.values(),
        dtypes,
        ("nhwc", "nchw", "separate"),
        ((32, 32), (32, 64), (36, 72), (300, 300)),
        (1, 49, 400, 6400),
        (True, False),
        ("prefer", "strict"),
    ):
        spec = AttentionSpec(1, 2, tokens, tokens, *dims, dtype, layout, training=training)  # type: ignore[arg-type]
        for trials, failed in itertools.product(({}, NONE_FITS), ({}, ALL_FAILED)):
            decision = select(spec, machine, deterministic=strict, trials=trials, failed=failed)
            assert decision.backend not in decision.refused
            assert not BACKENDS[decision.backend].not_supported_reasons(spec, machine)
            if trials:  # which is no verdict on a backend, and stock would need the most
                rules = select(spec, machine, deterministic=strict, failed=failed)
                assert (decision.backend, decision.why, decision.by_rules) == (rules.backend, rules.why, True)


def test_equal_inputs_give_equal_decisions() -> None:
    for spec, machine in itertools.product(SPECS.values(), MACHINES.values()):
        assert select(spec, machine) == select(AttentionSpec(*spec), dataclasses.replace(machine))


# Measured -------------------------------------------------------------------------------------------------------------
def measured(spec: str, machine: str = "H100", strict: str = "prefer", memory_limited: bool = False, **ms: Any) -> Any:
    trials = {
        name: Trial(ms=value) if isinstance(value, float) else Trial(ms=value[0], extra_bytes=value[1])
        for name, value in ms.items()
    }
    return select(SPECS[spec], MACHINES[machine], deterministic=strict, trials=trials, memory_limited=memory_limited)


def test_the_fastest_measured_wins_over_the_rules() -> None:
    decision = measured("area fp16 train", stock=5.0, sdpa_flash=2.0, sdpa_cudnn=1.0, triton_area=1.5)
    assert (decision.backend, decision.why) == (C, "the fastest measured")
    assert decision.ms == {"stock": 5.0, F: 2.0, C: 1.0, T: 1.5}
    assert measured("area fp16 train", stock=0.5, sdpa_flash=2.0).backend == S


def test_a_tie_goes_to_the_reproducible_one_and_then_to_less_memory() -> None:
    decision = measured("area fp16 train", sdpa_cudnn=1.0, triton_area=1.029)
    assert (decision.backend, decision.why) == (T, "within 3% of sdpa_cudnn, and gives the same bits every time")
    assert measured("area fp16 train", sdpa_cudnn=1.0, triton_area=1.031).backend == C
    decision = measured("area fp16 train", sdpa_cudnn=(1.0, 300), sdpa_flash=(1.02, 200))
    assert (decision.backend, decision.why) == (F, "within 3% of sdpa_cudnn, and takes less memory")
    decision = measured("area fp16 train", stock=(1.0, 300), triton_area=(1.02, 100))  # both give the same bits
    assert (decision.backend, decision.why) == (T, "within 3% of stock, and takes less memory")


def test_strict_and_failures_hold_for_what_was_measured() -> None:
    assert measured("area fp16 train", strict="strict", stock=5.0, sdpa_cudnn=1.0, triton_area=2.0).backend == T
    trials = {"stock": Trial(ms=5.0), F: Trial(ms=1.0), C: Trial(why_not="wrong: output is off by nan")}
    decision = select(SPECS["area fp16 train"], MACHINES["H100"], trials=trials, failed={F: "raised in this run: boom"})
    assert decision.backend == S
    assert decision.refused[C] == ("wrong: output is off by nan",)


def test_under_autobatch_nothing_takes_more_memory_than_the_rules_would() -> None:
    both: dict[str, Any] = {"triton_area": (2.0, 100), "sdpa_cudnn": (1.0, 101)}
    assert measured("area fp16 train", **both).backend == C
    assert measured("area fp16 train", memory_limited=True, **both).backend == T


def test_without_a_time_the_rules_decide_and_an_explicit_choice_needs_no_trial() -> None:
    failed = {name: Trial(why_not="not measured: one image takes about 90 GiB", no_memory=True) for name in (S, F)}
    assert select(SPECS["area fp16 train"], MACHINES["H100"], trials=failed).backend == T
    assert select(SPECS["area fp16 train"], MACHINES["H100"], F, trials=failed).backend == F


def test_on_a_cpu_the_rules_stand_unless_another_is_faster_beyond_the_noise() -> None:
    assert select(SPECS["area fp32 predict nchw"], MACHINES["CPU"]).backend == F
    trials = {S: Trial(ms=1.0, ms_low=0.9), F: Trial(ms=2.0, ms_low=0.92)}
    decision = select(SPECS["area fp32 predict nchw"], MACHINES["CPU"], trials=trials)
    assert (decision.backend, decision.why) == (F, "by the rules, as stock was not faster beyond the noise")
    trials[F] = Trial(ms=2.0, ms_low=0.94)
    assert select(SPECS["area fp32 predict nchw"], MACHINES["CPU"], trials=trials).backend == S
