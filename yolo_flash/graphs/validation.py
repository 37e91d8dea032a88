"""Which batches of a validation run from CUDA graphs, and what is told about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER, RANK

from ..utils.memory import readable
from .capture import NextCall
from .inference import UNREMARKABLE, CapturedForward, InferenceGraphs
from .limits import no_nvidia_gpu, why_validation_is_eager

_REPLAYED = "replayed"
_FIRST = "the first validation of several ranks shows how much memory its batches need"


class ValidationGraphs:
    """Lets the forwards of a validator be replays; held by a validator, or by the training that validates again.

    There is `begin` and `end` around each validation, and `before_forward` once a batch. The network holds no graph.

    Attributes:
        mode: `off`, `on` or `auto`, see FlashConfig.
        beside: Bytes that a training needs free beside the graphs, as far as it has shown.
        facts: Of the last validation: `batches`, those `replayed`, and `eager`: why others were not, and how many; with
            the `shapes` that are captured and the `held_bytes`, if there are any.
    """

    beside: int
    facts: dict[str, Any]
    _network: Any  # of the validation under way; None between validations
    _next_call: NextCall | None
    _outcome: str | None  # of the batch under way: `_REPLAYED`, or why it is eager; None between batches
    _given_up: str  # why no validation runs from graphs any more
    _told: set[str]

    def __init__(self, mode: str, log: bool = True, capture: Callable[..., CapturedForward] | None = None) -> None:
        """Start without graphs; `log` tells once that there are some, and each reason why not; `capture` makes them."""
        self.mode = mode
        self._log = log
        self._told = set()
        self._graphs = InferenceGraphs(pays=mode == "auto", capture=capture)
        self.release()

    def begin(self, validator: Any, network: Any) -> None:
        """A validation of a network is about to begin."""
        self._network, self._alone = network, not validator.training
        self._counts: Counter[str] = Counter()
        self._no_gpu = no_nvidia_gpu(validator.device)
        # Ranks cannot run a validation a second time.
        self._why_not = self._given_up or self._no_gpu or (_FIRST if RANK != -1 and not self.facts else "")
        self._why_not = self._why_not or why_validation_is_eager(validator, network, self.mode)
        self._graphs.beside = 0 if self._alone else self.beside

    def before_forward(self, images: Any) -> None:
        """Let the coming forward of the network be a replay, if it is one of these images."""
        self._close_batch()
        network = self._network
        if network is None or not isinstance(images, Tensor):
            return
        if self._why_not:
            self._outcome = self._why_not
            return

        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            if x is not images or args or any(kwargs.values()) or torch.is_grad_enabled():
                self._outcome = "the network was called for something else"
                return NotImplemented
            outputs = self._graphs(network, x)
            self._outcome = self._graphs.outcome or _REPLAYED
            return outputs

        self._outcome = "the network was not called with what preprocess gave"
        self._next_call = NextCall(network, "forward", forward)

    def end(self) -> None:
        """The validation is over, or has failed."""
        self._close_batch()
        network, self._network = self._network, None
        if network is None:
            return
        counts, batches = self._counts, self._counts.total()
        replayed = counts.pop(_REPLAYED, 0)
        self.facts = {"batches": batches, "replayed": replayed, "eager": dict(counts)}
        if replayed:
            self.facts |= {"shapes": len(self._graphs), "held_bytes": self._graphs.held}
            self._tell(
                f"validation runs from CUDA graphs: {self._graphs.first}; {len(self._graphs)} shapes hold "
                f"{readable(self._graphs.held)}",
                once="replayed",
            )
        for reason, count in counts.items():
            expected = reason in UNREMARKABLE or reason == _FIRST or (reason == self._no_gpu and self.mode == "auto")
            if not expected:
                self._tell(f"{count} of {batches} validation batches ran without CUDA graphs: {reason}", once=reason)
        if self._alone:  # of a network that nobody else has
            self._graphs.release()

    def give_up(self, why_not: str) -> bool:
        """Free the graphs for good, and count no more of the validation under way; whether there were any."""
        held = len(self._graphs) > 0
        if held:
            self._close_batch()
            self._graphs.release()
            self._given_up, self._network = why_not, None
        return held

    def release(self) -> None:
        """Free the graphs, and forget what there was."""
        self._graphs.release()
        self._given_up, self.facts, self.beside = "", {}, 0
        self._network = self._next_call = self._outcome = None

    def _close_batch(self) -> None:
        """Let the network answer by itself again, and count the batch under way, if there is one."""
        if self._next_call is not None:
            self._next_call.withdraw()
        outcome, self._outcome, self._next_call = self._outcome, None, None
        if outcome is not None:
            self._counts[outcome] += 1

    def _tell(self, text: str, once: str) -> None:
        if self._log and once not in self._told:
            LOGGER.info(f"yolo-flash: {text}")
        self._told.add(once)
