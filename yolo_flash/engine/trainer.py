"""The seam into Ultralytics: a mixin for its trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..assets import offline
from ..backends.registry import BackendNotSupportedError
from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..dispatch.decision import Trial
from ..dispatch.dispatcher import Dispatcher
from ..graphs.graphed_step import EarlyCopy
from ..graphs.policy import GraphPolicy
from ..machine import detect
from ..patching.patch import patch_modules, targets
from ..planning import autotune
from ..planning.plan import PlanRow, RunInput, make_plan
from ..utils.errors import is_out_of_memory
from .telemetry import Telemetry, known_columns

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer as _TrainerBase
else:  # the mixin comes before a class that is chosen at run time
    _TrainerBase = object

_AUTO_BATCH = 0.6  # the share of memory that batch=-1 fills, see ultralytics/utils/autobatch.py
_GENERATED = "yolo_flash_generated"  # resolves to no module, so cloudpickle sends the classes to DDP workers by value


class FlashTrainerMixin(_TrainerBase):
    """Keeps the attention of a training run patched, on every rank, from `setup_model` to the final evaluation.

    First base of a class generated for each trainer class of Ultralytics or of the user, see `trainer_class`.

    Attributes:
        flash: The settings, a class attribute so that they travel to DDP workers with the class.
        flash_sources: What the settings were resolved from, to merge the `flash:` section of a `cfg=` file.
        flash_plan: One row a layer and mode, filled when the batch size is known.
    """

    flash: ClassVar[FlashConfig]
    flash_sources: ClassVar[Mapping[str, Any]]
    flash_plan: list[PlanRow]
    _flash_tloss: Any = None

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        overrides = dict(overrides or {})
        section = overrides.pop("flash", None)  # of a cfg= file; Ultralytics refuses keys that it does not know
        if section is not None:
            type(self).flash = FlashConfig.resolve(**{**self.flash_sources, "section": section})
        self.flash_plan = []
        self._flash_dispatcher = Dispatcher(self.flash)
        self._flash_graphs = GraphPolicy(self.flash.graphs if self.flash.enabled else "off")
        self._flash_telemetry: Telemetry | None = None
        if self.flash.enabled and self.flash.log and RANK in {-1, 0}:
            self._flash_telemetry = Telemetry(self.flash, self._flash_dispatcher)
        keywords = {} if cfg is None else {"cfg": cfg}
        super().__init__(**keywords, overrides=overrides, _callbacks=_callbacks)

    def get_dataset(self) -> Any:
        """Name a data set that is there before Ultralytics waits for one that cannot be downloaded."""
        if self.args.task == "detect":
            self.args.data = offline.training_data(self.args.data)
        return super().get_dataset()

    def setup_model(self) -> Any:
        """Patch at the one point that precedes device, compile, DDP, AutoBatch and EMA."""
        self._flash_dispatcher.memory_limited = (
            self.args.batch < 1
        )  # AutoBatch will fill the memory with what the rules take
        if self.flash.enabled and getattr(self.args, "quantize", None) == 8:
            type(self).flash = dataclasses.replace(self.flash, enabled=False)
            self._flash_telemetry = None
            if RANK in {-1, 0}:
                LOGGER.warning("yolo-flash: quantize=8 calibrates and trains the stock blocks: the plugin is off.")
        checkpoint = super().setup_model()
        self._patch(self.model)
        return checkpoint

    def _setup_train(self) -> None:
        checks_amp = self.device.type == "cuda" and self.args.amp not in (False, "fp32", "bf16")
        hopeless = checks_amp and offline.missing_asset("yolo26n.pt") and not offline.can_download()
        with offline.no_downloads() if hopeless else contextlib.nullcontext():
            super()._setup_train()

    def auto_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Half of the memory where graphs were asked for: they hold as much as the batches beside them may need."""
        if self._flash_graphs.mode == "on":
            asked: float = self.args.batch
            share = asked if asked > 0 else _AUTO_BATCH
            self.batch_size = share / 2
            LOGGER.info(f"yolo-flash: the batch is to fill {share / 2:.0%} of the memory and its CUDA graphs as much.")
        return super().auto_batch(*args, **kwargs)

    def _build_train_pipeline(self) -> None:
        """Plan now that the batch size is known, and again after a halving; patch what joined the model."""
        self._flash_graphs.release(self)
        self._patch(self.model)
        super()._build_train_pipeline()
        self._plan()
        self._tell_graphs({"why_not": self._flash_graphs.prepare(self)})
        if RANK in {-1, 0}:
            offline.note_standin(self.args.data, self.save_dir)

    def get_validator(self) -> Any:
        """A validator that patches the checkpoint which the final evaluation loads by path."""
        validator = super().get_validator()
        stock_get_model = validator.get_model

        @functools.wraps(stock_get_model)
        def get_model(model: Any, trainer: Any = None, **kwargs: Any) -> Any:
            if trainer is None and Path(str(model)).suffix == ".pt":
                model = load_checkpoint(model)[0]
                self._patch(model)
            return stock_get_model(model, trainer, **kwargs)

        validator.get_model = get_model
        return validator

    def run_callbacks(self, event: str) -> None:
        """Tell telemetry first: our numbers have to be there when the loggers look."""
        if event == "on_train_batch_end":
            self._tell_graphs(self._flash_graphs.after_step(self))
        elif event == "on_train_epoch_end":
            self._count_replays()
        elif event == "teardown":
            self._flash_graphs.release(self)
        if event in vars(Telemetry):
            self._tell(event)
        super().run_callbacks(event)

    def preprocess_batch(self, batch: Any) -> Any:
        """Count the images of each step, and let its forward be a replay: the last call before it, inside autocast."""
        boxes = self._flash_graphs.before_transfer(self, batch)
        batch = super().preprocess_batch(batch)
        if self._flash_telemetry is not None:
            self._flash_telemetry.saw_images(len(batch["img"]))
        self._tell_graphs(self._flash_graphs.before_forward(self, batch, boxes))
        return batch

    def optimizer_step(self) -> None:
        """Step with the gradients of all ranks."""
        self._flash_graphs.before_optimizer()
        super().optimizer_step()

    @property
    def tloss(self) -> Any:
        """Running means of the loss items, on the CPU while steps run from graphs."""
        if isinstance(self._flash_tloss, EarlyCopy):
            self._flash_tloss = self._flash_tloss.read()
        return self._flash_tloss

    @tloss.setter
    def tloss(self, values: Any) -> None:
        # The progress bar reads them when the backward is under way. Without a copy that began before it, the host
        # would wait for the backward in every step, and the device for the host after it.
        early = RANK in {-1, 0} and self._flash_graphs.step is not None and EarlyCopy.possible(values)
        self._flash_tloss = EarlyCopy(values) if early else values

    def validate(self) -> Any:
        """Validate, a second time without the memory of the graphs where it did not suffice."""
        try:
            return super().validate()
        except RuntimeError as error:
            alone = self.world_size <= 1  # other ranks are in the middle of this validation
            why_not = "validation ran out of memory beside the graphs"
            if not (alone and is_out_of_memory(error) and self._flash_graphs.give_up(self, why_not)):
                raise
            LOGGER.warning(f"yolo-flash: {why_not}: they are freed, and it is run again.")
        self._tell_graphs({"why_not": why_not})
        return super().validate()

    def final_eval(self) -> None:
        """Evaluate with the memory of the graphs."""
        self._flash_graphs.release(self)
        super().final_eval()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Leave our columns out of a results.csv that was begun without them."""
        super().save_metrics(known_columns(self.csv, metrics))

    def _tell(self, event: str, *facts: Any) -> None:
        """Hand an event to telemetry; when it fails, the run goes on without it."""
        if self._flash_telemetry is None:
            return
        try:
            getattr(self._flash_telemetry, event)(self, *facts)
        except Exception as error:
            LOGGER.warning(
                f"yolo-flash: no more plan, kernels, memory and speed from here on: {type(error).__name__}: {error}"
            )
            telemetry, self._flash_telemetry = self._flash_telemetry, None
            with contextlib.suppress(Exception):
                telemetry.teardown(self)  # a profile under way

    def _tell_graphs(self, facts: dict[str, Any]) -> None:
        if facts and self._flash_graphs.mode != "off" and facts != {"why_not": ""}:
            self._tell("graphs", facts)

    def _count_replays(self) -> None:
        facts = self._flash_graphs.end_epoch(self)
        if why_not := facts.pop("why_not", ""):
            self._tell_graphs({"why_not": why_not})
        if facts:
            self._tell("replays", facts)

    def _patch(self, model: nn.Module) -> None:
        if self.flash.enabled:
            patch_modules(unwrap_model(model), self.flash, self._flash_dispatcher)

    def _plan(self) -> None:
        """Decide for the training batch and for the commonest validation batch; explicit choices raise here."""
        model = unwrap_model(self.model)
        if not (self.flash.enabled and targets(model)):
            return
        machine = detect(self.device)
        try:
            measure = self._measure if self.flash.autotune else None
            self._flash_dispatcher.recall(self.device)  # the steps will, and have to decide as the plan does
            self.flash_plan = make_plan(model, self._flash_dispatcher, machine, self._run_inputs(), measure)
        except BackendNotSupportedError:
            raise
        except Exception as error:  # a model that cannot run on the meta device still trains: each layer then decides
            LOGGER.warning(f"yolo-flash: no plan ahead of the first step ({type(error).__name__}: {error})")
            return
        self._flash_dispatcher.planned_sizes = {
            (row.layer, row.mode == "train"): (row.decision.spec.batch, row.decision.spec.seq_len_q)
            for row in self.flash_plan
        }
        self._tell("plan", self.flash_plan, machine)

    def _measure(self, specs: list[AttentionSpec]) -> dict[AttentionSpec, dict[str, Trial]]:
        """Trials on this device; all ranks get those of rank 0, so that all have one plan."""
        trials = [autotune.measure(specs, self.device) if RANK in {-1, 0} else {}]
        if self.world_size > 1:
            dist.broadcast_object_list(trials, src=0)
        return trials[0]

    def _run_inputs(self) -> list[RunInput]:
        args: Any = self.args
        device: torch.device = self.device
        dtype = val_dtype = torch.float32
        if self.amp:
            dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
            val_dtype = torch.float16  # Ultralytics validates the EMA under float16 autocast, also with amp=bf16
        nhwc = device.type == "cuda" and any(p.ndim == 4 and not p.is_contiguous() for p in self.model.parameters())
        deterministic = torch.are_deterministic_algorithms_enabled()
        loader, val_loader = self.train_loader, self.test_loader
        images, height, width, note = _commonest_shape(val_loader.dataset, val_loader.batch_size, args.imgsz)
        return [
            RunInput("train", loader.batch_size, args.imgsz, args.imgsz, dtype, nhwc, deterministic),
            RunInput("val", images, height, width, val_dtype, nhwc, note=note),
        ]


def trainer_class(base: type, config: FlashConfig, sources: Mapping[str, Any]) -> Any:
    """Our trainer on top of `base`, any trainer class of Ultralytics or of a user.

    Integrations look for "Trainer" in the name, which therefore keeps that of `base`.
    """
    if issubclass(base, FlashTrainerMixin):  # the class of a finished run, given again
        base = base.__bases__[1]
    attributes = {"flash": config, "flash_sources": dict(sources), "__module__": _GENERATED}
    return type(f"Flash{base.__name__}", (FlashTrainerMixin, base), attributes)


def _commonest_shape(dataset: Any, batch: int, imgsz: int) -> tuple[int, int, int, str]:
    """Images, height and width of most validation batches, and a note where they say little about the others.

    Rectangular batches are padded: 640 becomes 672 x 672 on coco8.
    """
    shapes = getattr(dataset, "batch_shapes", None)
    if shapes is None or not getattr(dataset, "rect", False):
        return min(batch, len(dataset)), imgsz, imgsz, ""
    by_shape: dict[tuple[int, int], list[int]] = {}  # height and width -> images of each of their batches
    for i, images in Counter(map(int, dataset.batch)).items():
        height, width = map(int, shapes[i])
        by_shape.setdefault((height, width), []).append(images)
    (height, width), counts = max(by_shape.items(), key=lambda item: sum(item[1]))
    note = ""
    if len(by_shape) > 1 and all(len(batches) == 1 for batches in by_shape.values()):
        note = f"val: {len(by_shape)} batches, no two of one shape: planned is that of {height} x {width}"
    return max(counts), height, width, note
