"""The plugin's part of one training run: settings, decisions, plan, CUDA graphs and telemetry."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..backends.registry import BackendNotSupportedError, is_approximate, label
from ..backends.spec import AttentionSpec
from ..config import FlashConfig
from ..dispatch.decision import Trial
from ..dispatch.dispatcher import Dispatcher
from ..graphs.optimizer import OptimizerPolicy
from ..graphs.policy import GraphPolicy
from ..graphs.validation import ValidationGraphs
from ..machine import detect
from ..patching.patch import patch_modules, targets
from ..planning import autotune
from ..planning.inputs import RunInput, precisions
from ..planning.plan import PlanRow, make_plan
from ..utils.errors import is_out_of_memory
from ..utils.memory import needed_again
from .telemetry import Telemetry


class FlashRun:
    """What a trainer holds of the plugin and calls from its overrides, on every rank."""

    def __init__(self, config: FlashConfig) -> None:
        self.config = config
        self.dispatcher = Dispatcher(config)  # shared by the patched layers
        mode = config.graphs if config.enabled else "off"
        self.graphs = GraphPolicy(mode)
        self.validation = ValidationGraphs(mode, config.log)
        self.optimizer = OptimizerPolicy(mode)
        self.plan: list[PlanRow] = []  # empty until the batch size is known
        tells = config.enabled and config.log and RANK in {-1, 0}
        self.telemetry = Telemetry(config, self.dispatcher) if tells else None  # None after an error of its own too

    def patch(self, model: nn.Module) -> None:
        """Patch a model, unless the plugin is off."""
        if self.config.enabled:
            patch_modules(unwrap_model(model), self.config, self.dispatcher)

    def prepare(self, trainer: Any) -> None:
        """Plan for the loaders of a trainer and look what forbids graphs; explicit choices that cannot run raise."""
        model = unwrap_model(trainer.model)
        if self.config.enabled and targets(model):
            self._make_plan(trainer, model)
            self._refuse_compile(trainer)
        self.tell_graphs(trainer, {"why_not": self.graphs.prepare(trainer)})

    def on_event(self, trainer: Any, event: str) -> None:
        """Follow an event of the trainer."""
        facts = []
        if event == "on_train_batch_end":
            self.tell_graphs(trainer, self.graphs.after_step(trainer))
        elif event == "on_train_epoch_end":
            facts = [self.graphs.end_epoch(trainer)]
            self.tell_graphs(trainer, {"why_not": facts[0].pop("why_not", "")})
        elif event == "teardown":
            self.release_graphs(trainer)
        if event in vars(Telemetry):
            self.tell(trainer, event, *facts)

    def keep_free(self, trainer: Any) -> None:
        """Tell the graphs of validation what has to stay free: what eager steps and batches have needed so far."""
        pool = 0 if self.graphs.step is None else self.graphs.step.pool_bytes  # as much for eager steps beside graphs
        self.validation.beside = max(self.validation.beside, pool, needed_again(trainer.device) - pool)

    def frees_memory(self, trainer: Any, error: Exception) -> bool:
        """Free the graphs for good if a validation ran out of memory beside them; whether another try makes sense."""
        why_not = "validation ran out of memory beside the graphs"
        if trainer.world_size > 1 or not is_out_of_memory(error):  # other ranks are in the middle of this validation
            return False
        held = self.graphs.give_up(trainer, why_not)
        if not self.optimizer.release(why_not) and not held:
            return False
        LOGGER.warning(f"yolo-flash: {why_not}: they are freed, and it is run again.")
        self.tell_graphs(trainer, {"why_not": why_not})
        return True

    def release_graphs(self, trainer: Any) -> None:
        """Free all graphs and their memory."""
        self.validation.release()
        self.graphs.release(trainer)
        if self.optimizer.release():
            trainer._clear_memory()

    def optimizer_step(self, trainer: Any, stock: Callable[[], None]) -> None:
        """Make an optimizer step, with the gradients of all ranks."""
        self.graphs.before_optimizer()
        if facts := self.optimizer(trainer, stock):
            self.tell(trainer, "optimizer", facts)

    def tell_graphs(self, trainer: Any, facts: dict[str, Any]) -> None:
        """Tell telemetry a decision about graphs, if there is one."""
        if facts and facts != {"why_not": ""}:
            self.tell(trainer, "graphs", facts)

    def tell(self, trainer: Any, event: str, *facts: Any) -> None:
        """Hand an event to telemetry; after an error the run goes on without telemetry."""
        if self.telemetry is None:
            return
        try:
            getattr(self.telemetry, event)(trainer, *facts)
        except Exception as error:
            LOGGER.warning(
                f"yolo-flash: no more plan, kernels, memory and speed from here on: {type(error).__name__}: {error}"
            )
            telemetry, self.telemetry = self.telemetry, None
            with contextlib.suppress(Exception):
                telemetry.teardown(trainer)  # a profile under way

    def _refuse_compile(self, trainer: Any) -> None:
        named = [row for row in self.plan if is_approximate(row.decision.backend)]
        if named and trainer.args.compile:
            raise BackendNotSupportedError(
                f"backend={label(named[0].decision.backend)} cannot run with compile=True, in {named[0].layer} and "
                f"{len(named) - 1} more rows of the plan: a compiled model leaves the height and width of its images "
                f"open, on which the window depends. compile=False trains with it: the attention itself is compiled."
            )

    def _make_plan(self, trainer: Any, model: nn.Module) -> None:
        machine = detect(trainer.device)
        measure = functools.partial(_measure_for_all_ranks, trainer) if self.config.autotune else None
        try:
            self.dispatcher.recall(trainer.device)  # the steps will, and have to decide as the plan does
            self.plan = make_plan(model, self.dispatcher, machine, run_inputs(trainer), measure)
        except BackendNotSupportedError:
            raise
        except Exception as error:  # a model that cannot run on the meta device still trains: each layer then decides
            LOGGER.warning(f"yolo-flash: no plan ahead of the first step ({type(error).__name__}: {error})")
            return
        self.dispatcher.planned_sizes = {
            (row.layer, row.mode == "train"): (row.decision.spec.batch, row.decision.spec.seq_len_q)
            for row in self.plan
        }
        self.tell(trainer, "plan", self.plan, machine)


def run_inputs(trainer: Any) -> list[RunInput]:
    """The training batch and the commonest validation batch of a trainer that has its loaders."""
    args, val_loader = trainer.args, trainer.test_loader
    dtype, val_dtype = precisions(args.amp if trainer.amp else False, on_gpu=True)
    cuda = trainer.device.type == "cuda"
    nhwc = cuda and any(p.ndim == 4 and not p.is_contiguous() for p in trainer.model.parameters())
    deterministic = torch.are_deterministic_algorithms_enabled()
    images, height, width, note = commonest_shape(val_loader.dataset, val_loader.batch_size, args.imgsz)
    return [
        RunInput("train", trainer.train_loader.batch_size, args.imgsz, args.imgsz, dtype, nhwc, deterministic),
        RunInput("val", images, height, width, val_dtype, nhwc, note=note),
    ]


def commonest_shape(dataset: Any, batch: int, imgsz: int) -> tuple[int, int, int, str]:
    """Images, height and width of most validation batches, and a note where they say little about the others.

    Rectangular batches are padded: 640 becomes 672 x 672 on coco8.
    """
    shapes = getattr(dataset, "batch_shapes", None)
    if shapes is None or not getattr(dataset, "rect", False):
        return min(batch, len(dataset)), imgsz, imgsz, ""
    by_shape = defaultdict(list)  # height and width -> images of each of their batches
    for i, images in Counter(map(int, dataset.batch)).items():
        by_shape[tuple(map(int, shapes[i]))].append(images)
    (height, width), counts = max(by_shape.items(), key=lambda item: sum(item[1]))
    comes_again = len(by_shape) == 1 or any(len(batches) > 1 for batches in by_shape.values())
    note = f"val: {len(by_shape)} batches, no two of one shape: planned is that of {height} x {width}"
    return max(counts), height, width, "" if comes_again else note


def _measure_for_all_ranks(trainer: Any, specs: list[AttentionSpec]) -> dict[AttentionSpec, dict[str, Trial]]:
    """Trials on the device of a trainer; all ranks get those of rank 0, so that all have one plan."""
    trials = [autotune.measure(specs, trainer.device) if RANK in {-1, 0} else {}]
    if trainer.world_size > 1:
        dist.broadcast_object_list(trials, src=0)
    return trials[0]
