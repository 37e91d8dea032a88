"""Stock and patched side by side: the same use of two twins has to end with the same numbers, or the same error."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from tests.counting import LAYERS, AttentionCalls, randomise, settle
from tests.engine.test_tasks import EnoughError
from tests.patching.test_patch import patched_layers
from yolo_flash import patch_model
from yolo_flash.patching.patch import targets

SGD = {
    "optimizer": "SGD",
    "lr0": 0.001,
    "warmup_epochs": 0,
    "nbs": 2,
}  # a step a batch; Adam makes noise large


@dataclass
class Twin:
    """One of the two, and what came of it.

    Attributes:
        model: The `YOLO` object.
        calls: The fused operators that ran.
        losses: Of each training step.
        gradients: Of the packed projection of each attention layer, step by step.
        lines: Of Ultralytics' log, without those of the plugin.
        error: What it ended with, if it did not end well.
        result: What the use of it gave.
    """

    model: Any
    calls: AttentionCalls = field(default_factory=AttentionCalls)
    losses: list[float] = field(default_factory=list)
    gradients: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    lines: list[str] = field(default_factory=list)
    error: str = ""
    result: Any = None

    def train(self, **args: Any) -> None:
        """Train, the losses and gradients of the steps being kept."""

        def start(trainer: Any) -> None:
            for name, block in targets(unwrap_model(trainer.model)).items():
                block.get_parameter("qkv.conv.weight").register_hook(self.gradients[name].append)

        self.model.add_callback("on_train_start", start)
        self.model.add_callback("on_train_batch_end", lambda trainer: self.losses.append(trainer.loss.item()))
        self.model.train(**args)

    def saying(self, pattern: str) -> list[str]:
        """The lines of the log that match, without colours and folders."""
        plain = [re.sub(r"\x1b\[\d+m", "", line) for line in self.lines]
        return [re.sub(r"/\S*/", "", line) for line in plain if re.search(pattern, line)]


def twins(
    config: str | Path,
    use: Callable[[Twin], Any],
    *,
    prepare: Callable[[Any], object] | None = None,
    before: Callable[[], object] = lambda: None,
    **settings: Any,
) -> tuple[Twin, Twin]:
    """Use a stock model and a patched one in turn, from the same random numbers.

    Args:
        config: YAML or checkpoint.
        use: Of the twin. An error ends it and is kept.
        prepare: What to do to the model of either before it is patched.
        before: What to do before either is made.
        **settings: Of the plugin.

    Returns:
        Both. No attention of the stock one was fused; all of the patched one's is patched at the end.
    """
    both = []
    for patched in (False, True):
        before()
        torch.manual_seed(0)
        twin = Twin(YOLO(config))
        if prepare is not None:
            prepare(twin.model)
        if patched:
            patch_model(twin.model, **{"backend": "sdpa_flash", "log": False, **settings})
        handler = logging.Handler()
        handler.emit = lambda record, twin=twin: twin.lines.append(record.getMessage())  # type: ignore[misc, method-assign]
        LOGGER.addHandler(handler)
        torch.manual_seed(0)
        try:
            with twin.calls:
                twin.result = use(twin)
        except Exception as error:
            twin.error = f"{type(error).__name__}: {error}"
        finally:
            LOGGER.removeHandler(handler)
        twin.lines = [line for line in twin.lines if "yolo-flash" not in line]
        both.append(twin)
    stock, ours = both
    assert not stock.calls.forward
    assert patched_layers(ours.model.model) > 0
    return stock, ours


def train_twins(
    config: str | Path,
    args: dict[str, Any],
    *,
    steps: int,
    layers: int = LAYERS,
    prepare: Callable[[Any], object] | None = None,
    before: Callable[[], object] = lambda: None,
    whole: bool = False,
) -> tuple[Twin, Twin]:
    """Train both, from weights to which attention matters; each of so many steps is fused and has the loss of stock.

    The run of stock ends with its last step unless it is asked for as a whole.
    """

    def enough(trainer: Any) -> None:
        if trainer.epoch + 1 == trainer.epochs:
            raise EnoughError

    def start(trainer: Any) -> None:
        randomise(trainer.model)
        randomise(trainer.ema.ema)

    def use(twin: Twin) -> None:
        if str(config).endswith(".yaml"):
            twin.model.add_callback("on_train_start", start)
        if not whole and type(twin.model) is YOLO:
            twin.model.add_callback("on_train_epoch_end", enough)
        with contextlib.suppress(EnoughError):
            twin.train(**{**SGD, **args})

    stock, ours = twins(config, use, prepare=prepare, before=before)
    assert (stock.error, ours.error) == ("", "")
    check_steps(stock, ours, steps, layers)
    return stock, ours


def check_steps(stock: Twin, ours: Twin, steps: int, layers: int = LAYERS) -> None:
    """So many steps, each of them fused, with the losses and the gradients of stock."""
    assert len(stock.losses) == steps
    assert ours.losses == pytest.approx(stock.losses, rel=1e-3)
    assert ours.calls.backward == {"sdpa_flash": layers * steps}
    assert patched_layers(ours.model.model) == layers
    assert len(stock.gradients) == layers
    for name, gradients in stock.gradients.items():
        assert len(gradients) == steps
        for step, (got, wanted) in enumerate(zip(ours.gradients[name], gradients, strict=True)):
            off = float((got - wanted).norm() / wanted.norm())
            assert off < 2e-3, f"{name}, step {step}: the gradient is off by {off:.2g}"  # NaN where it is 0


def recorded(model: Any) -> list[list[Tensor]]:
    """The features that reach the head in every forward from now on, also of the copies that Ultralytics makes."""
    features: list[list[Tensor]] = []

    def note(head: Any, args: tuple[Any, ...]) -> None:
        if hasattr(head, "total_ops"):  # GFLOPs are being counted, of the stock forward
            return
        features.append([x.detach().clone() for x in (args[0] if isinstance(args[0], list) else [args[0]])])

    model.model.model[-1].register_forward_pre_hook(note)
    return features


def predict_twins(
    config: str | Path,
    use: Callable[[Twin], Any],
    layers: int = LAYERS,
    weights: Callable[[nn.Module], object] = settle,
) -> tuple[Twin, Twin]:
    """Use both for forwards; each is fused, and the features that reach the head are those of stock."""
    kept: list[list[list[Tensor]]] = []

    def prepare(model: Any) -> None:
        weights(model.model)
        kept.append(recorded(model))

    stock, ours = twins(config, use, prepare=prepare)
    expected, got = kept
    assert ours.error == stock.error
    assert ours.calls.forward == ({"sdpa_flash": layers * len(got)} if got else {})
    assert len(got) == len(expected)
    for ours_now, stock_now in zip(got, expected, strict=True):
        for x, y in zip(ours_now, stock_now, strict=True):
            assert x.shape == y.shape
            assert (x - y).norm() <= 1e-4 * y.norm(), "the features are off"
    return stock, ours
