"""A mixin for Ultralytics' trainers: the overrides that call a `FlashRun`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK

from ..assets import offline
from ..config import FlashConfig
from ..graphs.graphed_step import EarlyCopy
from ..planning.plan import PlanRow
from .run import FlashRun
from .telemetry import known_columns
from .validator import with_graphs

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer as _TrainerBase
else:  # the mixin comes before a class that is chosen at run time
    _TrainerBase = object

_AUTO_BATCH = 0.6  # the share of memory that batch=-1 fills, see ultralytics/utils/autobatch.py


class FlashTrainerMixin(_TrainerBase):
    """Keeps the attention of a training run patched, on every rank, from `setup_model` to the final evaluation.

    First base of a class generated for each trainer class of Ultralytics or of the user, see `trainer_class`.
    """

    flash: ClassVar[FlashConfig]  # of the class, and so travels to DDP workers with the class
    flash_sources: ClassVar[Mapping[str, Any]]  # of `flash`, to merge the `flash:` section of a `cfg=` file
    flash_run: FlashRun
    _flash_tloss: Any = None

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        overrides = dict(overrides or {})
        section = overrides.pop("flash", None)  # of a cfg= file; Ultralytics refuses keys that it does not know
        if section is not None:
            type(self).flash = FlashConfig.resolve(**{**self.flash_sources, "section": section})
        self.flash_run = FlashRun(self.flash)
        keywords = {} if cfg is None else {"cfg": cfg}
        super().__init__(**keywords, overrides=overrides, _callbacks=_callbacks)

    @property
    def flash_plan(self) -> list[PlanRow]:
        """One row a layer and mode; empty until the batch size is known."""
        return self.flash_run.plan

    def get_dataset(self) -> Any:
        """Name a data set that is there before Ultralytics waits for one that cannot be downloaded."""
        if self.args.task == "detect":
            self.args.data = offline.data_within_reach(self.args.data)
        return super().get_dataset()

    def setup_model(self) -> Any:
        """Patch at the one point that precedes device, compile, DDP, AutoBatch and EMA."""
        self.flash_run.dispatcher.memory_limited = self.args.batch < 1  # AutoBatch fills what the rules leave free
        if self.flash.enabled and getattr(self.args, "quantize", None) == 8:
            type(self).flash = self.flash_run.config = dataclasses.replace(self.flash, enabled=False)
            self.flash_run.telemetry = None
            if RANK in {-1, 0}:
                LOGGER.warning("yolo-flash: quantize=8 calibrates and trains the stock blocks: the plugin is off.")
        checkpoint = super().setup_model()
        self.flash_run.patch(self.model)
        return checkpoint

    def _setup_train(self) -> None:
        checks_amp = self.device.type == "cuda" and self.args.amp not in (False, "fp32", "bf16")
        with offline.without_amp_weights() if checks_amp else contextlib.nullcontext():
            super()._setup_train()

    def auto_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Fill half of the memory where graphs were asked for: they hold as much as a batch beside them may need."""
        if self.flash_run.graphs.mode == "on":
            self.batch_size = share = (self.args.batch if self.args.batch > 0 else _AUTO_BATCH) / 2
            LOGGER.info(f"yolo-flash: the batch is to fill {share:.0%} of the memory and its CUDA graphs as much.")
        return super().auto_batch(*args, **kwargs)

    def _build_train_pipeline(self) -> None:
        """Plan now that the batch size is known, and again after a halving; patch what joined the model."""
        self.flash_run.release_graphs(self)
        self.flash_run.patch(self.model)
        super()._build_train_pipeline()
        self.flash_run.prepare(self)
        if RANK in {-1, 0}:
            offline.note_standin(self.args.data, self.save_dir)

    def get_validator(self) -> Any:
        """Let validation run from graphs; patch the checkpoint that the final evaluation loads by its path."""
        validator = super().get_validator()
        stock_get_model = validator.get_model

        @functools.wraps(stock_get_model)
        def get_model(model: Any, trainer: Any = None, **kwargs: Any) -> Any:
            if trainer is None and Path(str(model)).suffix == ".pt":
                model = load_checkpoint(model)[0]
                self.flash_run.patch(model)
            return stock_get_model(model, trainer, **kwargs)

        validator.get_model = get_model
        return with_graphs(validator, self.flash_run.validation) if self.flash.enabled else validator

    def run_callbacks(self, event: str) -> None:
        """Follow the event before the loggers do: our numbers have to be there when they look."""
        self.flash_run.on_event(self, event)
        super().run_callbacks(event)

    def preprocess_batch(self, batch: Any) -> Any:
        """Let the forward of the batch be a replay: this is the last call before the forward, and inside autocast."""
        run = self.flash_run
        boxes = run.graphs.before_transfer(self, batch)
        batch = super().preprocess_batch(batch)
        run.tell(self, "saw_images", len(batch["img"]))
        run.tell_graphs(self, run.graphs.before_forward(self, batch, boxes))
        return batch

    def optimizer_step(self) -> None:
        """Step with the gradients of all ranks, by the trainer's own step or directly."""
        self.flash_run.optimizer_step(self, super().optimizer_step)

    @property
    def tloss(self) -> Any:
        """Running means of the loss items, on the CPU while steps run from graphs."""
        if isinstance(self._flash_tloss, EarlyCopy):
            self._flash_tloss = self._flash_tloss.read()
        return self._flash_tloss

    @tloss.setter
    def tloss(self, values: Any) -> None:
        # The progress bar reads the means during the backward. Without a copy that began before the backward, host and
        # device would wait for each other in every step.
        early = RANK in {-1, 0} and self.flash_run.graphs.step is not None and EarlyCopy.possible(values)
        self._flash_tloss = EarlyCopy(values) if early else values

    def validate(self) -> Any:
        """Validate, a second time without the memory of the graphs where it did not suffice."""
        self.flash_run.keep_free(self)
        try:
            found = super().validate()
        except RuntimeError as error:
            if not self.flash_run.frees_memory(self, error):
                raise
            found = super().validate()
        self.flash_run.keep_free(self)
        self.flash_run.tell(self, "validated", self.flash_run.validation.facts)
        return found

    def final_eval(self) -> None:
        """Evaluate with the memory of the graphs."""
        self.flash_run.release_graphs(self)
        super().final_eval()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Leave our columns out of a results.csv that was begun without them."""
        super().save_metrics(known_columns(self.csv, metrics))


def trainer_class(base: type, config: FlashConfig, sources: Mapping[str, Any]) -> Any:
    """Our trainer on top of `base`, any trainer class of Ultralytics or of a user.

    Integrations look for "Trainer" in the name, which therefore keeps that of `base`.
    """
    if issubclass(base, FlashTrainerMixin):  # the class of a finished run, given again
        base = base.__bases__[1]
    module = "yolo_flash_generated"  # resolves to no module, so cloudpickle sends the class to DDP workers by value
    attributes = {"flash": config, "flash_sources": dict(sources), "__module__": module}
    return type(f"Flash{base.__name__}", (FlashTrainerMixin, base), attributes)
