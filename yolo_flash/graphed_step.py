"""When a training step runs from CUDA graphs: what forbids it, whether it pays, and what it costs in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from . import fixed_loss
from .capture import answer_step, capture_step
from .fixed_loss import Capacity, FixedShapeLoss
from .graphs import FlashGraphError, GraphedStep, forget_answer, has_hooks
from .guard import is_out_of_memory
from .measuring import first_line, free_bytes, readable
from .ranks import RankAverage

_TIMED = 3  # steps of each kind that `auto` compares
_GAIN = 1.05  # below it graphs do not pay for their memory
_CAPTURES = 3  # in a run for a changed model, and as many for more boxes: after that, steps run eager
_CHANGED = "the model changed"


class StepGraphs:
    """Decides for one training run, step by step, and holds the graphs; the trainer's, never the model's.

    The first step runs eager: it builds the loss and is profiled. With `auto` the next three are timed, and again three
    from the graphs. Steps of another shape than that of full batches run eager, and those with more boxes than the
    captured loss has room for.

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
        self._changes = self._growths = 0  # captures for changed models, and for more boxes
        self._capacity = Capacity()
        self._shape: tuple[int, int, int] = (0, 0, 0)
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
        outside = self.step is not None and self.step.loss is None
        if self.why_not or outside or not self._full(batch["img"]):
            return
        criterion = getattr(unwrap_model(trainer.model), "criterion", None)
        known = criterion is not None and not fixed_loss.not_supported_reason(criterion) and _boxes_stay(trainer)
        if known and all(batch[name].device.type == "cpu" for name in ("batch_idx", "cls", "bboxes")):
            self._needed = fixed_loss.needed(batch, self._shape[0], self._shape[1:], criterion)
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
        self._started: float | None = None
        if self.why_not or not self._full(batch["img"]):
            return {}
        model = unwrap_model(trainer.model)
        self._seen += 1
        facts: dict[str, Any] = {}
        stale = False
        if self.step is None:
            if self._seen > 1 + (_TIMED if self.mode == "auto" else 0):
                facts = self._capture(trainer, model, batch)
        elif stale := self.step.stale(model if self._new_epoch(trainer) else None) or self._another_loss(model):
            if not self._votes(trainer):
                LOGGER.warning("yolo-flash: the model changed since its CUDA graphs were captured: capturing again.")
                facts, stale = self._capture(trainer, model, batch, again=_CHANGED), False
        elif isinstance(self.step.loss, FixedShapeLoss) and self._targets is None and not self._votes(trainer):
            facts = self._grow(trainer, model, batch)
        if self.step is not None and not stale:
            answer_step(model, self.step, batch, self._targets)
        if self.mode == "auto" and not self._decided and self._seen > 1 and not facts:
            self._started = _now()
        # `auto` has still to see whether it pays.
        return facts if self.why_not or self.mode == "on" or self._decided else {}

    def after_step(self, trainer: Any) -> dict[str, Any]:
        """Take the time of a step that `before_forward` began; facts for the log once `auto` has decided."""
        forget_answer(unwrap_model(trainer.model))
        if self._started is None:
            return {}
        (self._eager if self.step is None else self._replayed).append((_now() - self._started) * 1e3)
        if len(self._replayed) < _TIMED or self.step is None:
            return {}
        self._decided = True
        eager, replayed = statistics.median(self._eager), statistics.median(self._replayed)
        facts = {"eager_ms": eager, "graph_ms": replayed, **self._facts()}
        first = trainer.world_size <= 1 or dist.get_rank() == 0  # whose clock decides for all
        if not _everywhere(trainer, not first or eager >= _GAIN * replayed):
            self._begin_again()
            self._drop(trainer)
            self._leaving = self._ranks is not None
            self.why_not = f"a step takes {replayed:.1f} ms from graphs and {eager:.1f} ms without"
        return facts | {"why_not": self.why_not}

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
        self._started = None
        self._eager: list[float] = []
        self._replayed: list[float] = []
        self._targets = self._needed = None
        self._loss_outside = ""

    def _drop(self, trainer: Any) -> None:
        held, self.step = self.step is not None, None
        if getattr(trainer, "model", None) is not None:
            forget_answer(unwrap_model(trainer.model))
        if held:
            trainer._clear_memory()

    def _close_ranks(self) -> None:
        ranks, self._ranks, self._leaving = self._ranks, None, False
        if ranks is not None:
            ranks.close()

    def _full(self, images: Tensor) -> bool:
        return (images.shape[0], *images.shape[2:]) == self._shape

    def _new_epoch(self, trainer: Any) -> bool:
        before, self._epoch = self._epoch, trainer.epoch
        return before != self._epoch

    def _another_loss(self, model: Any) -> bool:
        loss = None if self.step is None else self.step.loss
        return isinstance(loss, FixedShapeLoss) and not loss.holds(model.criterion)

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
        growing = bool(again) and again != _CHANGED
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
                self._loss_outside = self._loss_outside or outside
            except Exception as error:  # whatever it is: the trainer would halve the batch, or end
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
        if why_not if again else not _everywhere(trainer, not why_not):
            self._drop(trainer)
            if not again:
                self._close_ranks()
            self.why_not = why_not or "another rank cannot"
            if self.mode == "on" and not growing:
                raise FlashGraphError(f"flash.graphs=on: {self.why_not}. flash.graphs=auto goes on without graphs.")
        return facts | {"why_not": self.why_not}

    def _fit_targets(self, batch: dict[str, Any]) -> None:
        """Boxes of this batch, padded to what is captured from now on."""
        if self._needed is not None and not self._capacity.holds(self._needed):
            self._capacity, self._targets = self._capacity.grown(self._needed), None
        if self._needed is not None and self._targets is None:
            boxes = {name: batch[name].cpu() for name in ("batch_idx", "cls", "bboxes")}
            self._targets = fixed_loss.pad_targets(boxes, self._shape[0], self._capacity.boxes)

    def _facts(self) -> dict[str, Any]:
        assert self.step is not None
        facts = {"pool_bytes": self.step.pool_bytes, "capture_seconds": self.step.seconds}
        inside = isinstance(self.step.loss, FixedShapeLoss)
        return facts | ({"boxes": self._capacity.boxes} if inside else {"loss_outside": self._loss_outside})


def not_supported_reasons(trainer: Any, mode: str) -> list[str]:
    """What forbids CUDA graphs in a run, known before its first step; empty if nothing does.

    Args:
        trainer: Ultralytics' trainer, whose model is set up.
        mode: `auto` also refuses what would only seldom find its shape again.
    """
    args, model = trainer.args, unwrap_model(trainer.model)
    reasons = []
    if trainer.device.type != "cuda" or torch.version.hip:
        device = "ROCm" if trainer.device.type == "cuda" else trainer.device.type
        reasons.append(f"needs an NVIDIA GPU, the device is {device}")
    if args.compile:
        reasons.append("compile=True has graphs of its own")
    if hasattr(model, "teacher_model"):
        reasons.append("distillation needs tensors from inside the network")
    elif not isinstance(model, BaseModel) or any(
        getattr(type(model), name) is not getattr(BaseModel, name) or name in vars(model)
        for name in ("forward", "predict", "loss")
    ):
        reasons.append(f"{type(model).__name__} gives its network more than images, or takes more from it")
    if getattr(args, "quantize", None) or getattr(args, "int8", False):
        reasons.append("quantisation-aware training changes its ranges in every forward")
    hooked = [name for name, module in model.named_modules() if has_hooks(module)]
    if hooked:
        reasons.append(f"a hook on {hooked[0] or 'the model'} would not be called")
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        reasons.append("SyncBatchNorm talks to other ranks")
    if mode == "auto" and (unknown := _unknown_module(model)):
        reasons.append(f"{unknown} may do something else in every step: flash.graphs=on captures it as it is")
    if trainer.world_size > 1:
        if not isinstance(trainer.model, DistributedDataParallel):
            reasons.append(f"ranks need DistributedDataParallel, found {type(trainer.model).__name__}")
        elif trainer.model._comm_hooks:
            reasons.append("a communication hook of DDP would not be called")
        if "optimizer_step" in vars(trainer) or type(trainer)._do_train is not BaseTrainer._do_train:
            reasons.append("a training loop or optimizer step of a user's own may not average the gradients of ranks")
    if torch.is_anomaly_enabled():
        reasons.append("torch's anomaly detection reads every operator")
    if args.multi_scale and (mode == "auto" or trainer.world_size > 1):  # of every rank by itself
        reasons.append(f"multi_scale={args.multi_scale} changes the image size in every step")
    if args.rect and (mode == "auto" or trainer.world_size > 1):
        reasons.append("rect=True gives batches of many shapes")
    return reasons


def _unknown_module(model: nn.Module) -> str:
    """The class of a module that neither torch, Ultralytics nor we wrote: its Python is not looked through."""
    known = ("torch.", "torchvision.", "ultralytics.", f"{__package__}.")
    return next((type(m).__name__ for m in model.modules() if not type(m).__module__.startswith(known)), "")


def _boxes_stay(trainer: Any) -> bool:
    """Whether boxes reach the device as the loader gives them: a user's `preprocess_batch` might change them."""
    classes = [cls for cls in type(trainer).__mro__ if "preprocess_batch" in vars(cls)]
    return all(cls.__module__.startswith(("ultralytics.", f"{__package__}.")) for cls in classes[:2])


def _now() -> float:
    """Seconds on the clock once the GPU has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _everywhere(trainer: Any, mine: bool) -> bool:
    """Whether all ranks say so."""
    if trainer.world_size <= 1:
        return mine
    votes: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(votes, mine)
    return all(votes)
