"""When a training step runs from CUDA graphs: whether it may, whether it pays, and what it costs in memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from ..utils.errors import first_line, is_out_of_memory
from ..utils.memory import free_bytes, readable
from .boxes import BatchBoxes, BoxRoom
from .capture import NextCall
from .ddp import RankAverage, everywhere
from .fixed_loss import Capacity
from .graphed_step import FlashGraphError, GraphedStep
from .kinds import DETECTION, kind_of
from .limits import boxes_stay, not_supported_reasons, own_loop

_TIMED = 3  # steps of each kind that `auto` compares
_GAIN = 1.05  # below it graphs do not pay for their memory
_CAPTURES = 3  # in a run for a changed model, and as many for more boxes: after that, steps run eager
_CHANGED = "the model changed"
_REPLAYED = "replayed"
_NOTHING_KNOWN = BatchBoxes()


class Phase(Enum):
    """What becomes of a run's full batches; others run eager in every phase."""

    WARM_UP = "the first one runs eager: it builds the loss and is profiled"
    TIMING_EAGER = "auto: steps run eager and are timed"
    TIMING_REPLAY = "auto: steps run from graphs and are timed"
    RUNNING = "steps run from graphs"
    GIVEN_UP = "steps run eager"


class GraphPolicy:
    """Decides for one training run, step by step, and holds the graphs; the trainer's, never the model's.

    The steps of full batches go through the phases in their order, with `on` straight from WARM_UP to RUNNING. Graphs
    are captured in TIMING_REPLAY and RUNNING, whenever there are none. Batches of another shape run eager, and those
    with more boxes than the captured loss has room for; so does every step behind which code or numbers of a user's are
    found.

    Attributes:
        mode: `off`, `on` or `auto`, see FlashConfig.
        phase: Of the last full batch; GIVEN_UP as long as there is a `why_not`.
        step: What was captured; None while steps run eager.
        why_not: Why no step runs from graphs; empty before that is decided, and while steps run from graphs.
    """

    def __init__(self, mode: str, capture: Callable[..., GraphedStep] = GraphedStep) -> None:
        """Start without graphs; `capture` makes them."""
        self.mode = mode
        self.step: GraphedStep | None = None
        self.why_not = "flash.graphs=off" if mode == "off" else ""
        self._capture_step = capture
        self._ranks: RankAverage | None = None  # of all ranks, also of one that has lost its graphs
        self._leaving = False  # DDP averages again behind the next optimizer step: not with gradients of both
        self._changes = self._growths = self._short = 0  # captures for changed models, more boxes, out of memory
        self._room = BoxRoom()
        self._epoch = -1  # in which the training loop was looked at last; a capture sets it back
        self._next_call: NextCall | None = None
        self._lost = self._ever = False  # graphs were lost for a changed model; some step of the run was replayed
        self._outcome: str | None = None  # of the step under way: `_REPLAYED`, or why it runs eager; None between steps
        self._counts: Counter[str] = Counter()  # the outcomes of this epoch's steps
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
        self._room.shape = (images, size, size)
        self._room.kind = kind_of(unwrap_model(trainer.model)) or DETECTION
        self.why_not = "; ".join(not_supported_reasons(trainer, self.mode))
        self._begin_again()
        if self.why_not and self.mode == "on":
            raise FlashGraphError(f"flash.graphs=on cannot run: {self.why_not}. flash.graphs=auto goes on without.")
        return self.why_not if self.why_not != before else ""

    def before_transfer(self, trainer: Any, batch: dict[str, Any]) -> BatchBoxes:
        """Look at the boxes of a batch while they are on the CPU: there it takes no waiting for the device."""
        outside = self.step is not None and self.step.loss is None
        if self.phase is Phase.GIVEN_UP or outside or not self._room.is_full(batch["img"]):
            return _NOTHING_KNOWN
        criterion = getattr(unwrap_model(trainer.model), "criterion", None)
        if criterion is None or not boxes_stay(trainer):
            return _NOTHING_KNOWN
        if not self._holds(criterion) and self._room.kind.losses.not_supported_reason(criterion):
            return _NOTHING_KNOWN
        return self._room.look(batch, criterion, trainer.device, captured=self.step is not None)

    def before_forward(self, trainer: Any, batch: dict[str, Any], boxes: BatchBoxes = _NOTHING_KNOWN) -> dict[str, Any]:
        """Let the coming forward of the trainer's model be a replay, if it can be. Called inside its autocast.

        Args:
            trainer: Ultralytics' trainer, between `preprocess_batch` and the forward.
            batch: On the device.
            boxes: What `before_transfer` found out about the batch.

        Returns:
            Facts for the log when something was decided; else empty.

        Raises:
            FlashGraphError: Graphs were asked for, and the network cannot be captured.
        """
        self._close_step()
        self._started: float | None = None
        if self.phase is Phase.GIVEN_UP:
            self._outcome = self.why_not
            return {}
        if not self._room.is_full(batch["img"]):
            self._outcome = f"images of another shape than {list(self._room.shape)}"
            return {}
        # Ranks have to count the same steps, see `_votes`; and where all batches are like that, the loss stays outside.
        if boxes.too_many and trainer.world_size <= 1 and (self.step is not None or self._room.refused <= _CAPTURES):
            self._outcome = boxes.too_many
            return {}
        self._enter_phase()
        model = unwrap_model(trainer.model)
        self._outcome = "before there were graphs"
        facts: dict[str, Any] = {}
        again, stale = "", False
        if self.step is not None:
            inside = self.step.loss is not None
            stale = self.step.stale() or (inside and not self._holds(model.criterion))
            again = self._why_again(trainer, self.step, boxes, stale)
        if again or (self.step is None and self.phase in (Phase.TIMING_REPLAY, Phase.RUNNING)):
            boxes, stale = self._room.grow(batch, boxes), False
            facts = self._capture(trainer, batch, boxes, again)
        if self.step is not None and not stale:
            if self._epoch != trainer.epoch:  # once an epoch: a user's own loop might ask autograd for gradients
                self._epoch = trainer.epoch
                self.step.through_autograd = own_loop(trainer)
            replay_next_call = self._room.kind.replay_next_call
            self._next_call = replay_next_call(model, self.step, batch, boxes.targets, self._end_step)
        if self.phase in (Phase.TIMING_EAGER, Phase.TIMING_REPLAY):
            self._started = None if facts else _now()
            return {}  # `auto` has still to see whether it pays
        return facts

    def after_step(self, trainer: Any) -> dict[str, Any]:
        """Take the time of a step that `before_forward` began; facts for the log once `auto` has decided."""
        replayed_it = self._close_step()
        if self._started is None:
            return {}
        if self.step is None:
            self._eager.append((_now() - self._started) * 1e3)
        elif replayed_it or trainer.world_size > 1:  # ranks count alike, whatever batches they have
            self._replayed.append((_now() - self._started) * 1e3)
        if len(self._replayed) < _TIMED or self.step is None:
            return {}
        self.phase = Phase.RUNNING
        eager, replayed = statistics.median(self._eager), statistics.median(self._replayed)
        facts = {"eager_ms": eager, "graph_ms": replayed, **self._facts()}
        first = trainer.world_size <= 1 or dist.get_rank() == 0  # whose clock decides for all
        if not everywhere(trainer, not first or eager >= _GAIN * replayed):
            self._stop(trainer, f"a step takes {replayed:.1f} ms from graphs and {eager:.1f} ms without")
            self._leaving = self._ranks is not None
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
        self._close_step()
        counts, self._counts = self._counts, Counter()
        replayed = counts.pop(_REPLAYED, 0)
        facts: dict[str, Any] = {"steps": counts.total() + replayed, "replayed": replayed, "eager": dict(counts)}
        if self.mode == "off":
            return {}
        # A run's first full batch is eager, and so may be those behind a capture for which memory was short.
        still = self.phase is not Phase.GIVEN_UP and (self._seen == 1 or 0 < self._short < _CAPTURES)
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
            self._stop(trainer, none)
            facts["why_not"] = none
        return facts

    def give_up(self, trainer: Any, why_not: str) -> bool:
        """Free the graphs for good, also where they were asked for; whether there were any."""
        held = self.release(trainer)
        if held:
            self._stop(trainer, why_not)
            self._asked = False
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
        self.phase = Phase.GIVEN_UP if self.why_not else Phase.WARM_UP
        self._seen = 0  # full batches
        self._asked = True  # `on` is held to its word
        self._started = None  # the clock at the beginning of a timed step
        self._eager: list[float] = []  # milliseconds of timed steps
        self._replayed: list[float] = []
        self._loss_outside = ""
        self._outcome = None

    def _enter_phase(self) -> None:
        """Enter the phase of one more full batch: the two that come first last for a number of batches."""
        self._seen += 1
        if self.phase is Phase.WARM_UP and self._seen > 1:
            self.phase = Phase.TIMING_EAGER if self.mode == "auto" else Phase.RUNNING
        if self.phase is Phase.TIMING_EAGER and self._seen > 1 + _TIMED:
            self.phase = Phase.TIMING_REPLAY

    def _stop(self, trainer: Any, why_not: str) -> None:
        """Free the graphs; steps run eager from now on."""
        self._drop(trainer)
        self.phase, self.why_not = Phase.GIVEN_UP, why_not

    def _drop(self, trainer: Any) -> None:
        held, self.step = self.step is not None, None
        self._withdraw()
        if held:
            trainer._clear_memory()

    def _withdraw(self) -> bool:
        """Let the model answer by itself again; whether a replay was still to come."""
        call, self._next_call = self._next_call, None
        return call is not None and call.withdraw()

    def _end_step(self, why_not: str) -> None:
        self._outcome = why_not or _REPLAYED

    def _close_step(self) -> bool:
        """Count the step under way, if there is one; whether it was replayed."""
        if self._withdraw():
            self._end_step("the loss was not asked of the model with the batch that preprocess_batch gave")
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._counts[outcome] += 1
        return outcome == _REPLAYED

    def _close_ranks(self) -> None:
        ranks, self._ranks, self._leaving = self._ranks, None, False
        if ranks is not None:
            ranks.close()

    def _holds(self, criterion: Any) -> bool:
        """Whether a loss in fixed shapes is captured, and still that of the criterion."""
        loss: Any = None if self.step is None else self.step.loss
        return loss is not None and loss.holds(criterion)

    def _votes(self, trainer: Any) -> bool:
        """Whether ranks have still to decide together, all in the same step: none of them may take longer to it."""
        return trainer.world_size > 1 and self.mode == "auto" and self.phase is not Phase.RUNNING

    def _why_again(self, trainer: Any, step: GraphedStep, boxes: BatchBoxes, stale: bool) -> str:
        """Why to capture again on this batch; empty if a replay is possible, or if the step is to run eager."""
        if stale:
            self._outcome = _CHANGED
            if self._votes(trainer):
                return ""
            LOGGER.warning("yolo-flash: the model changed since its CUDA graphs were captured: capturing again.")
            return _CHANGED
        if step.loss is None or boxes.targets is not None:
            return ""
        self._outcome = "more boxes than the graphs have room for"
        if self._votes(trainer) or boxes.needed is None or self._growths >= _CAPTURES:
            return ""
        self._growths += 1
        in_all = f", {boxes.needed.total} in all" if boxes.needed.total else ""
        return f"a batch had up to {boxes.needed.boxes} boxes an image{in_all}"

    def _capture(self, trainer: Any, batch: dict[str, Any], boxes: BatchBoxes, again: str) -> dict[str, Any]:
        """Capture on this batch; the first time on all ranks or on none. What came of it."""
        self._drop(trainer)
        self._changes += again == _CHANGED
        why_not = "; ".join(not_supported_reasons(trainer, self.mode))  # callbacks came since it was looked at
        if self._changes >= _CAPTURES:
            why_not = f"the model changed after each of {_CAPTURES} captures"
        if not why_not:
            try:
                model, capacity = unwrap_model(trainer.model), self._room.capacity
                capture_step = self._room.kind.capture_step
                self.step, outside = capture_step(model, batch, boxes.targets, capacity, self._capture_step)
                if trainer.world_size > 1 and self._ranks is None:
                    self._ranks = RankAverage(trainer.model)
                self._loss_outside, self._epoch = self._loss_outside or boxes.too_many or outside, -1
            except Exception as error:  # whatever it is: the trainer would halve the batch, or end
                if is_out_of_memory(error) and self._try_later(trainer):
                    return {}
                short = "there is too little memory for them: " if is_out_of_memory(error) else ""
                why_not = short + first_line(error)
        facts = {"again": again} if again else {}
        if self.step is not None:
            facts |= self._facts()
            if self.mode == "auto":
                why_not = self._too_little_memory(trainer, self.step.pool_bytes, batch["img"].device) or why_not
        # Later captures are a rank's own: the others do not take part in a vote.
        if why_not if again else not everywhere(trainer, not why_not):
            self._stop(trainer, why_not or "another rank cannot")
            if not again:
                self._close_ranks()
            self._outcome = self.why_not
            self._lost = again == _CHANGED
            if self.mode == "on" and not again:  # later, a whole epoch without is an error
                raise FlashGraphError(f"flash.graphs=on: {self.why_not}. flash.graphs=auto goes on without graphs.")
        return facts | {"why_not": self.why_not}

    def _too_little_memory(self, trainer: Any, held: int, device: torch.device) -> str:
        """Why there is no memory for graphs that hold so many bytes; empty if the batches beside them have room."""
        # The last batch of an epoch and validation run beside the graphs, whose memory they cannot use.
        # Ranks cannot free them in the middle of a validation, whose batches are twice as large.
        beside, room = held * (2 if trainer.world_size > 1 else 1), free_bytes(device)
        if room >= beside:
            return ""
        need = f"its graphs hold {readable(held)}, and the batches beside them need up to {readable(beside)}"
        return f"{need}, {readable(room)} are free: a smaller batch would do"

    def _try_later(self, trainer: Any) -> bool:
        """Whether a capture for which memory was short is to be tried on another batch, which may have fewer boxes."""
        self._short += 1
        if trainer.world_size > 1 or self._short >= _CAPTURES:
            return False
        self._room.capacity = Capacity()
        self._outcome = "too little memory to capture with its boxes"
        trainer._clear_memory()
        return True

    def _facts(self) -> dict[str, Any]:
        if self.step is None:
            return {}
        facts = {"pool_bytes": self.step.pool_bytes, "capture_seconds": self.step.seconds}
        inside = self.step.loss is not None
        return facts | ({"boxes": self._room.capacity.boxes} if inside else {"loss_outside": self._loss_outside})


def _now() -> float:
    """Seconds on the clock once the GPU has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
