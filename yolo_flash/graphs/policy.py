"""When a training step runs from CUDA graphs: whether it may, whether it pays, and what it costs in memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from ..utils.errors import first_line, is_out_of_memory
from ..utils.memory import free_bytes, readable
from . import fixed_loss
from .capture import LABELS, answer_step, capture_step
from .ddp import RankAverage, everywhere
from .fixed_loss import Capacity, FixedShapeLoss
from .graphed_step import Answer, FlashGraphError, GraphedStep
from .limits import boxes_stay, not_supported_reasons, own_loop

_TIMED = 3  # steps of each kind that `auto` compares
_GAIN = 1.05  # below it graphs do not pay for their memory
_CAPTURES = 3  # in a run for a changed model, and as many for more boxes: after that, steps run eager
_SHARE = 0.25  # of the free memory that the boxes of a batch may take in the graphs
_CHANGED = "the model changed"
_REPLAYED = "replayed"


class GraphPolicy:
    """Decides for one training run, step by step, and holds the graphs; the trainer's, never the model's.

    The first step runs eager: it builds the loss and is profiled. With `auto` the next three are timed, and again three
    from the graphs. Steps of another shape than that of full batches run eager, and those with more boxes than the
    captured loss has room for; so does every step behind which code or numbers of a user's are found.

    Attributes:
        step: What was captured; None while steps run eager.
        why_not: Why they do; empty while it is open, or while graphs run.
    """

    def __init__(self, mode: str, capture: Callable[..., GraphedStep] = GraphedStep) -> None:
        """Start without graphs.

        Args:
            mode: `off`, `on` or `auto`, see FlashConfig.
            capture: Gives the graphs of a model for images, as `GraphedStep`.
        """
        self.mode = mode
        self.step: GraphedStep | None = None
        self.why_not = "flash.graphs=off" if mode == "off" else ""
        self._capture_step = capture
        self._ranks: RankAverage | None = None  # of all ranks, also of one that has lost its graphs
        self._leaving = False  # DDP averages again behind the next optimizer step: not with gradients of both
        self._changes = self._growths = self._short = 0  # captures for changed models, more boxes, out of memory
        self._capacity = Capacity()
        self._shape: tuple[int, int, int] = (0, 0, 0)
        self._answer: Answer | None = None
        self._outcome: str | None = None  # of the step under way, as in `_counts`; None between steps
        self._said = self._lost = self._ever = False  # what a run has been told, lost for good, and ever replayed
        self._crowds = 0  # batches with too many boxes
        self._counts: Counter[str] = Counter()  # of this epoch's steps: why each ran eager, `_REPLAYED` if it did not
        self._begin_again()

    def prepare(self, trainer: Any) -> str:
        """Look for what forbids graphs in this run, whose batch size is known; there are none yet, see `release`.

        Returns:
            Why not, for the log; empty if they may run, were not asked for, or nothing is new.

        Raises:
            FlashGraphError: They were asked for.
        """
        if self.mode == "off":
            return ""
        before = self.why_not
        images, size = trainer.train_loader.batch_size, trainer.args.imgsz
        self._shape = (images, size, size)
        self.why_not = "; ".join(not_supported_reasons(trainer, self.mode))
        if self.why_not and self.mode == "on":
            raise FlashGraphError(f"flash.graphs=on cannot run: {self.why_not}. flash.graphs=auto goes on without.")
        return self.why_not if self.why_not != before else ""

    def before_transfer(self, trainer: Any, batch: dict[str, Any]) -> None:
        """Look at the boxes of a batch while they are on the CPU: there it takes no waiting for the device."""
        self._targets: Tensor | None = None
        self._needed: Capacity | None = None
        self._crowded = ""
        outside = self.step is not None and self.step.loss is None
        if self.why_not or outside or not self._full(batch["img"]):
            return
        criterion = getattr(unwrap_model(trainer.model), "criterion", None)
        if criterion is None or not self._known_loss(criterion) or not boxes_stay(trainer):
            return
        if all(batch[name].device.type == "cpu" for name in LABELS):
            needed = fixed_loss.needed(batch, self._shape[0], self._shape[1:], criterion)
            if not self._capacity.holds(needed) and self._too_large(needed, criterion, trainer.device):
                self._crowds += 1
                return
            self._needed = needed
            if self.step is None:
                self._capacity = self._capacity.grown(self._needed)
            if self._capacity.holds(self._needed):
                self._targets = fixed_loss.pad_targets(batch, self._shape[0], self._capacity.boxes)

    def before_forward(self, trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Let the coming forward of the trainer's model be a replay, if it can be. Called inside its autocast.

        Args:
            trainer: Ultralytics' trainer, between `preprocess_batch` and the forward.
            batch: On the device.

        Returns:
            Facts for the log when something was decided; else empty.

        Raises:
            FlashGraphError: Graphs were asked for, and the network cannot be captured.
        """
        self._close_step(trainer)
        self._started: float | None = None
        if self.mode == "off":
            return {}
        self._outcome = self.why_not
        if self.why_not:
            return {}
        if not self._full(batch["img"]):
            self._outcome = f"images of another shape than {list(self._shape)}"
            return {}
        # Ranks have to count the same steps, see `_votes`; and where all batches are like that, the loss stays outside.
        if self._crowded and trainer.world_size <= 1 and (self.step is not None or self._crowds <= _CAPTURES):
            self._outcome = self._crowded
            return {}
        model = unwrap_model(trainer.model)
        self._seen += 1
        self._outcome = "before there were graphs"
        facts: dict[str, Any] = {}
        stale = False
        if self.step is None:
            if self._seen > 1 + (_TIMED if self.mode == "auto" else 0):
                facts = self._capture(trainer, model, batch)
        elif stale := self.step.stale() or self._another_loss(model):
            self._outcome = _CHANGED
            if not self._votes(trainer):
                LOGGER.warning("yolo-flash: the model changed since its CUDA graphs were captured: capturing again.")
                facts, stale = self._capture(trainer, model, batch, again=_CHANGED), False
        elif isinstance(self.step.loss, FixedShapeLoss) and self._targets is None:
            self._outcome = "more boxes than the graphs have room for"
            if not self._votes(trainer):
                facts = self._grow(trainer, model, batch)
        if self.step is not None and not stale:
            self._through_autograd(trainer)
            self._answer = answer_step(model, self.step, batch, self._targets, self._ended)
        if self.mode == "auto" and not self._decided and self._seen > 1 and not facts:
            self._started = _now()
        # `auto` has still to see whether it pays.
        return facts if self.why_not or self.mode == "on" or self._decided else {}

    def after_step(self, trainer: Any) -> dict[str, Any]:
        """Take the time of a step that `before_forward` began; facts for the log once `auto` has decided."""
        replayed_it = self._close_step(trainer)
        if self._started is None:
            return {}
        if self.step is None:
            self._eager.append((_now() - self._started) * 1e3)
        elif replayed_it or trainer.world_size > 1:  # ranks count alike, whatever batches they have
            self._replayed.append((_now() - self._started) * 1e3)
        if len(self._replayed) < _TIMED or self.step is None:
            return {}
        self._decided = True
        eager, replayed = statistics.median(self._eager), statistics.median(self._replayed)
        facts = {"eager_ms": eager, "graph_ms": replayed, **self._facts()}
        first = trainer.world_size <= 1 or dist.get_rank() == 0  # whose clock decides for all
        if not everywhere(trainer, not first or eager >= _GAIN * replayed):
            self._begin_again()
            self._drop(trainer)
            self._leaving = self._ranks is not None
            self.why_not = f"a step takes {replayed:.1f} ms from graphs and {eager:.1f} ms without"
        return facts | {"why_not": self.why_not}

    def end_epoch(self, trainer: Any) -> dict[str, Any]:
        """Count the steps of an epoch, those that were replayed among them.

        Returns:
            `steps`, `replayed`, and `eager`: why others ran eager, and how many; empty with `off`. With `why_not` if
            graphs of which no step made use are given up.

        Raises:
            FlashGraphError: Graphs were asked for, and no step of the run came from them yet, or none will, since the
                model changes all the time.
        """
        self._close_step(trainer)
        counts, self._counts = self._counts, Counter()
        replayed = counts.pop(_REPLAYED, 0)
        facts: dict[str, Any] = {"steps": counts.total() + replayed, "replayed": replayed, "eager": dict(counts)}
        if self.mode == "off":
            return {}
        still = self._seen == 1 or 0 < self._short < _CAPTURES  # a run's first full batch is eager
        self._ever = self._ever or replayed > 0
        if replayed or not facts["steps"] or (still and self.step is None):
            return facts
        reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.items())
        none = f"none of {facts['steps']} steps of the epoch ran from CUDA graphs ({reasons})"
        if self.mode == "on" and self._asked:
            if not self._ever or self._lost:
                raise FlashGraphError(f"flash.graphs=on: {none}. flash.graphs=auto goes on without graphs.")
            LOGGER.warning(f"yolo-flash: {none}.")  # of sizes that change, say: the next one may have some
        elif self.step is not None and not self._votes(trainer):
            self._drop(trainer)
            self.why_not = none
            facts["why_not"] = none
        return facts

    def give_up(self, trainer: Any, why_not: str) -> bool:
        """Free the graphs for good, also where they were asked for; whether there were any."""
        held = self.release(trainer)
        if held:
            self.why_not, self._asked = why_not, False
        return held

    def release(self, trainer: Any) -> bool:
        """Free the graphs and their memory; whether there were any."""
        held = self.step is not None
        self._begin_again()
        self._close_ranks()
        self._drop(trainer)
        return held

    def before_optimizer(self) -> None:
        """Average the gradients of ranks that run from graphs, whose backward meets no hook of DDP."""
        if self._ranks is not None:
            self._ranks.average()
        if self._leaving:
            self._close_ranks()

    def _begin_again(self) -> None:
        self._seen, self._decided, self._epoch = 0, False, -1
        self._asked = True  # `on` is held to its word
        self._started = None
        self._eager: list[float] = []
        self._replayed: list[float] = []
        self._targets = self._needed = None
        self._crowded = self._loss_outside = ""
        self._outcome = None

    def _drop(self, trainer: Any) -> None:
        held, self.step = self.step is not None, None
        self._withdraw()
        if held:
            trainer._clear_memory()

    def _withdraw(self) -> bool:
        """Let the model answer by itself again; whether a replay was still to come."""
        answer, self._answer = self._answer, None
        return answer is not None and answer.withdraw()

    def _ended(self, why_not: str) -> None:
        self._outcome = why_not or _REPLAYED

    def _close_step(self, trainer: Any) -> bool:
        """Count the step under way, if there is one; whether it was replayed."""
        if self._withdraw():
            self._outcome = "the loss was not asked of the model with the batch that preprocess_batch gave"
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._counts[outcome] += 1
        return outcome == _REPLAYED

    def _close_ranks(self) -> None:
        ranks, self._ranks, self._leaving = self._ranks, None, False
        if ranks is not None:
            ranks.close()

    def _full(self, images: Tensor) -> bool:
        return (images.shape[0], *images.shape[2:]) == self._shape

    def _through_autograd(self, trainer: Any) -> None:
        """Look once an epoch whether a user's own loop might ask autograd for gradients."""
        before, self._epoch = self._epoch, trainer.epoch
        if self.step is not None and before != self._epoch:
            self.step.through_autograd = own_loop(trainer)

    def _known_loss(self, criterion: Any) -> bool:
        loss = None if self.step is None else self.step.loss
        held = isinstance(loss, FixedShapeLoss) and loss.holds(criterion)
        return held or not fixed_loss.not_supported_reason(criterion)

    def _another_loss(self, model: Any) -> bool:
        loss = None if self.step is None else self.step.loss
        return isinstance(loss, FixedShapeLoss) and not loss.holds(model.criterion)

    def _too_large(self, needed: Capacity, criterion: Any, device: torch.device) -> bool:
        """Whether a batch has so many boxes in an image that graphs would take a large share of the memory for them."""
        wanted = self._capacity.grown(needed)
        need, room = fixed_loss.needed_bytes(wanted, self._shape[0], self._shape[1:], criterion), free_bytes(device)
        if need > _SHARE * room:
            self._crowded = "too many boxes in an image for the memory"
            self._say_once(
                f"a batch with {needed.boxes} boxes in an image runs without CUDA graphs, which would take "
                f"{readable(need)} for as many, {readable(room)} are free; so do all like it"
            )
        return bool(self._crowded)

    def _say_once(self, line: str) -> None:
        if not self._said:
            LOGGER.info(f"yolo-flash: {line}")
        self._said = True

    def _votes(self, trainer: Any) -> bool:
        """Whether ranks have still to decide together, all in the same step: none of them may take longer to it."""
        return trainer.world_size > 1 and self.mode == "auto" and not self._decided

    # Capture ----------------------------------------------------------------------------------------------------------
    def _grow(self, trainer: Any, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Capture with room for more boxes, as often as that may be; else the step runs eager."""
        if self._needed is None or self._growths >= _CAPTURES:
            return {}
        self._growths += 1
        self._capacity = self._capacity.grown(self._needed)
        why = f"a batch had up to {self._needed.boxes} boxes an image, {self._needed.total} in all"
        return self._capture(trainer, model, batch, again=why)

    def _capture(self, trainer: Any, model: nn.Module, batch: dict[str, Any], again: str = "") -> dict[str, Any]:
        """Capture on this batch; the first time on all ranks or on none. What came of it."""
        self._drop(trainer)
        self._changes += again == _CHANGED
        why_not = "; ".join(not_supported_reasons(trainer, self.mode))  # callbacks came since it was looked at
        if self._changes >= _CAPTURES:
            why_not = f"the model changed after each of {_CAPTURES} captures"
        if not why_not:
            try:
                self._fit_targets(batch)
                self.step, outside = capture_step(model, batch, self._targets, self._capacity, self._capture_step)
                if trainer.world_size > 1 and self._ranks is None:
                    self._ranks = RankAverage(trainer.model)
                self._loss_outside, self._epoch = self._loss_outside or self._crowded or outside, -1
            except Exception as error:  # whatever it is: the trainer would halve the batch, or end
                if is_out_of_memory(error) and self._try_later(trainer):
                    return {}
                short = "there is too little memory for them: " if is_out_of_memory(error) else ""
                why_not = short + first_line(error)
        facts = {"again": again} if again else {}
        if self.step is not None:
            facts |= self._facts()
            if self.mode == "auto":
                # The last batch of an epoch and validation run beside the graphs, whose memory they cannot use.
                # Ranks cannot free them in the middle of a validation, whose batches are twice as large.
                room = free_bytes(batch["img"].device)
                beside = self.step.pool_bytes * (2 if trainer.world_size > 1 else 1)
                if room < beside:
                    held = readable(self.step.pool_bytes)
                    need = f"its graphs hold {held}, and the batches beside them need up to {readable(beside)}"
                    why_not = f"{need}, {readable(room)} are free: a smaller batch would do"
        # Later captures are a rank's own: the others do not take part in a vote.
        if why_not if again else not everywhere(trainer, not why_not):
            self._drop(trainer)
            if not again:
                self._close_ranks()
            self._outcome = self.why_not = why_not or "another rank cannot"
            self._lost = again == _CHANGED
            if self.mode == "on" and not again:  # later, a whole epoch without is an error
                raise FlashGraphError(f"flash.graphs=on: {self.why_not}. flash.graphs=auto goes on without graphs.")
        return facts | {"why_not": self.why_not}

    def _try_later(self, trainer: Any) -> bool:
        """Whether a capture for which memory was short is to be tried on another batch, which may have fewer boxes."""
        self._short += 1
        if trainer.world_size > 1 or self._short >= _CAPTURES:
            return False
        self._capacity = Capacity()
        self._outcome = "too little memory to capture with its boxes"
        trainer._clear_memory()
        return True

    def _fit_targets(self, batch: dict[str, Any]) -> None:
        """Boxes of this batch, padded to what is captured from now on."""
        if self._needed is not None and not self._capacity.holds(self._needed):
            self._capacity, self._targets = self._capacity.grown(self._needed), None
        if self._needed is not None and self._targets is None:
            boxes = {name: batch[name].cpu() for name in LABELS}
            self._targets = fixed_loss.pad_targets(boxes, self._shape[0], self._capacity.boxes)

    def _facts(self) -> dict[str, Any]:
        if self.step is None:
            return {}
        facts = {"pool_bytes": self.step.pool_bytes, "capture_seconds": self.step.seconds}
        inside = isinstance(self.step.loss, FixedShapeLoss)
        return facts | ({"boxes": self._capacity.boxes} if inside else {"loss_outside": self._loss_outside})


def _now() -> float:
    """Seconds on the clock once the GPU has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
