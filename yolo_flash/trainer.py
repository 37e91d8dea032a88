"""The seam into Ultralytics: mixins for its trainers and for its `YOLO` objects, patch_model and unpatch_model."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from . import autotune, offline
from .backends import AttentionSpec, BackendNotSupportedError
from .blocks import FlashBlock
from .config import FlashConfig, known_keys
from .graphed_predict import predictor_class
from .graphed_step import StepGraphs
from .graphs import EarlyCopy
from .guard import is_out_of_memory
from .machine import detect, resolve_device
from .patch import layer_choices, patch_modules, targets, unpatch_modules
from .planning import PlanRow, Shot, make_plan
from .runtime import Runtime
from .selector import Trial
from .stock_pickle import StockPickle, become, restore
from .telemetry import Telemetry, known_columns

if TYPE_CHECKING:
    from ultralytics.engine.model import Model as _ModelBase
    from ultralytics.engine.trainer import BaseTrainer as _TrainerBase
else:  # the mixins come before a class that is chosen at run time
    _TrainerBase = _ModelBase = object

M = TypeVar("M", bound=nn.Module)

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
        self._flash_runtime = Runtime(self.flash)
        self._flash_graphs = StepGraphs(self.flash.graphs if self.flash.enabled else "off")
        self._flash_telemetry: Telemetry | None = None
        if self.flash.enabled and self.flash.log and RANK in {-1, 0}:
            self._flash_telemetry = Telemetry(self.flash, self._flash_runtime)
        keywords = {} if cfg is None else {"cfg": cfg}
        super().__init__(**keywords, overrides=overrides, _callbacks=_callbacks)

    def get_dataset(self) -> Any:
        """Name a data set that is there before Ultralytics waits for one that cannot be downloaded."""
        if self.args.task == "detect":
            self.args.data = offline.training_data(self.args.data)
        return super().get_dataset()

    def setup_model(self) -> Any:
        """Patch at the one point that precedes device, compile, DDP, AutoBatch and EMA."""
        self._flash_runtime.frugal = self.args.batch < 1  # AutoBatch will fill the memory with what the rules take
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
        elif event == "teardown":
            self._flash_graphs.release(self)
        if event in vars(Telemetry):
            self._tell(event)
        super().run_callbacks(event)

    def preprocess_batch(self, batch: Any) -> Any:
        """Count the images of each step, and let its forward be a replay: the last call before it, inside autocast."""
        self._flash_graphs.before_transfer(self, batch)
        batch = super().preprocess_batch(batch)
        if self._flash_telemetry is not None:
            self._flash_telemetry.saw_images(len(batch["img"]))
        self._tell_graphs(self._flash_graphs.before_forward(self, batch))
        return batch

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
            if not is_out_of_memory(error) or not self._flash_graphs.release(self):
                raise
            why_not = "validation ran out of memory beside the graphs"
            self._flash_graphs.why_not = why_not
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
            self._flash_telemetry = None
            LOGGER.warning(
                f"yolo-flash: no more plan, kernels, memory and speed from here on: {type(error).__name__}: {error}"
            )

    def _tell_graphs(self, facts: dict[str, Any]) -> None:
        if facts and self._flash_graphs.mode != "off" and facts != {"why_not": ""}:
            self._tell("graphs", facts)

    def _patch(self, model: nn.Module) -> None:
        if self.flash.enabled:
            patch_modules(unwrap_model(model), self.flash, self._flash_runtime)

    def _plan(self) -> None:
        """Decide for the training batch and for the commonest validation batch; explicit choices raise here."""
        model = unwrap_model(self.model)
        if not (self.flash.enabled and targets(model)):
            return
        machine = detect(self.device)
        try:
            measure = self._measure if self.flash.autotune else None
            self.flash_plan = make_plan(model, self._flash_runtime, machine, self._shots(), measure)
        except BackendNotSupportedError:
            raise
        except Exception as error:  # a model that cannot run on the meta device still trains: each layer then decides
            LOGGER.warning(f"yolo-flash: no plan ahead of the first step ({type(error).__name__}: {error})")
            return
        self._flash_runtime.planned_sizes = {
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

    def _shots(self) -> list[Shot]:
        args: Any = self.args
        device: torch.device = self.device
        dtype = val_dtype = torch.float32
        if self.amp:
            dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
            val_dtype = torch.float16  # Ultralytics validates the EMA under float16 autocast, also with amp=bf16
        nhwc = device.type == "cuda" and any(p.ndim == 4 and not p.is_contiguous() for p in self.model.parameters())
        deterministic = torch.are_deterministic_algorithms_enabled()
        loader, val_loader = self.train_loader, self.test_loader
        height, width = _commonest_shape(val_loader.dataset, args.imgsz)
        return [
            Shot("train", loader.batch_size, args.imgsz, args.imgsz, dtype, nhwc, deterministic),
            Shot("val", val_loader.batch_size, height, width, val_dtype, nhwc),
        ]


class FlashModelMixin(StockPickle, _ModelBase):
    """First base of the class of a patched `YOLO` or `RTDETR` object: whatever rebuilds the model patches it again.

    Attributes:
        _flash_sources: Keyword arguments for `FlashConfig.resolve`, kept to merge the section of a `cfg=` file.
        _flash_config: The settings.
    """

    _flash_sources: dict[str, Any]
    _flash_config: FlashConfig

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """As `YOLO.train`, with our trainer mixed into the task's own or the given one."""
        base = trainer or self._smart_load("trainer")
        if isinstance(base, type):
            base = trainer_class(base, self._flash_config, self._flash_sources)
        else:
            LOGGER.warning(f"yolo-flash: trainer={base!r} is not a class, so that it trains stock attention.")
        try:
            return super().train(trainer=base, **kwargs)
        finally:
            _patch_inner(self)

    def predict(self, source: Any = None, stream: bool = False, predictor: Any = None, **kwargs: Any) -> Any:
        """As `YOLO.predict`, with the network from CUDA graphs if `flash.graphs_predict` says so."""
        if self._flash_config.enabled and self._flash_config.graphs_predict:
            predictor = predictor_class(predictor or self._smart_load("predictor"))
        return super().predict(source, stream, predictor, **kwargs)

    def export(self, **kwargs: Any) -> Any:
        """As `YOLO.export`, of the stock model."""
        if not isinstance(self.model, nn.Module):
            return super().export(**kwargs)
        runtime = next((b._flash_runtime for b in self.model.modules() if isinstance(b, FlashBlock)), None)
        unpatch_modules(self.model)
        try:
            return super().export(**kwargs)
        finally:
            if runtime is not None:
                patch_modules(self.model, self._flash_config, runtime)

    def tune(self, *args: Any, **kwargs: Any) -> Any:
        """As `YOLO.tune`, which trains in processes of its own."""
        LOGGER.warning("yolo-flash: tune() starts `yolo train` processes, which run stock attention.")
        return super().tune(*args, **kwargs)


def patch_model(model: M, **settings: Any) -> M:
    """Run the attention of a model on a fused, exact backend, in place; training, validation and prediction included.

    Patching again brings the model to the new settings. Checkpoints and pickles stay those of the stock model.

    Args:
        model: A `YOLO`, `RTDETR` or other Ultralytics model object, or any module.
        **settings: Keys of FlashConfig (`backend="sdpa_flash"`), and `config`, a YAML file of them or a shipped name.

    Returns:
        The same object.

    Raises:
        FlashConfigError: A setting that does not exist or cannot have its value.
        BackendNotSupportedError: A backend that does not exist; one that cannot run raises when it is first needed.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"))
        >>> model.train(data="coco8.yaml", epochs=3)
    """
    return patch_from_sources(model, known_keys(settings, "the keyword arguments"))


def patch_from_sources(model: M, sources: dict[str, Any]) -> M:
    """`patch_model` for settings that still have to be resolved: keyword arguments of `FlashConfig.resolve`."""
    config = FlashConfig.resolve(**sources)
    if not isinstance(model, Model):
        if config.enabled:
            patch_modules(model, config)
            warn_no_targets(model)
        else:
            unpatch_model(model)
        return model
    if config.enabled and isinstance(model.model, nn.Module):
        layer_choices(list(targets(model.model)), config)  # raises before anything is changed
    unpatch_model(model)
    base: Any = type(model)
    become(model, _model_class(base), sources=sources, config=config)
    _patch_inner(model)
    if not isinstance(model.model, nn.Module):
        LOGGER.warning(f"yolo-flash: {model.model} is an exported model and runs as it was exported.")
    elif config.enabled:
        warn_no_targets(model.model)
    return model


def unpatch_model(model: M) -> M:
    """Undo `patch_model`: the object, its class and its outputs are as before, to the bit. Stock ones are left alone.

    Args:
        model: What was given to `patch_model`.

    Returns:
        The same object.
    """
    if isinstance(model, FlashModelMixin):
        restore(model)
        model.predictor = None
    inner = model.model if isinstance(model, Model) else model
    if isinstance(inner, nn.Module):
        unpatch_modules(inner)
    return model


def plan(
    model: nn.Module, imgsz: int = 640, batch: int = 16, device: str | int | None = None, amp: bool = True
) -> list[PlanRow]:
    """What each attention layer of a patched model would run in training and in validation.

    Args:
        model: What `patch_model` returned.
        imgsz: Side of the training images in pixels.
        batch: Training images a step; validation takes twice as many.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Train in float16 on a GPU.

    Returns:
        One row a layer and mode. `model.trainer.flash_plan` holds the plan of the last training run.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        ValueError: The model is not patched.
    """
    inner: Any = model.model if isinstance(model, Model) else model
    blocks = inner.modules() if isinstance(inner, nn.Module) else ()
    block = next((b for b in blocks if isinstance(b, FlashBlock)), None)
    if block is None:
        raise ValueError("this model has no patched attention layer: call patch_model first")
    where = resolve_device(device)
    on_gpu = where.type == "cuda"
    dtype = torch.float16 if on_gpu and amp else torch.float32
    shots = [
        Shot("train", batch, imgsz, imgsz, dtype, nhwc=on_gpu),
        Shot("val", 2 * batch, imgsz, imgsz, dtype, nhwc=on_gpu),
    ]
    runtime = block._flash_runtime
    measure = functools.partial(autotune.measure, device=where) if runtime.config.autotune else None
    return make_plan(inner, runtime, detect(where), shots, measure)


def warn_no_targets(model: nn.Module) -> None:
    """One line when there is nothing to patch, so that nobody waits for a gain."""
    if targets(model):
        return
    config = getattr(model, "yaml", None)
    name = Path(str(config.get("yaml_file") if isinstance(config, dict) else type(model).__name__)).stem
    LOGGER.warning(
        f"yolo-flash: {name} has no attention layer that the plugin knows (of YOLO10, 11, 12, 26 or RT-DETR): "
        f"it runs stock."
    )


@functools.lru_cache
def _model_class(base: Any) -> type[FlashModelMixin]:
    return type(f"Flash{base.__name__}", (FlashModelMixin, base), {"_stock": base, "__module__": __name__})


def trainer_class(base: type, config: FlashConfig, sources: Mapping[str, Any]) -> Any:
    """Our trainer on top of `base`, any trainer class of Ultralytics or of a user.

    Integrations look for "Trainer" in the name, which therefore keeps that of `base`.
    """
    if issubclass(base, FlashTrainerMixin):  # the class of a finished run, given again
        base = base.__bases__[1]
    attributes = {"flash": config, "flash_sources": dict(sources), "__module__": _GENERATED}
    return type(f"Flash{base.__name__}", (FlashTrainerMixin, base), attributes)


def _patch_inner(model: Any) -> None:
    """Patch the model inside, which may be a new one; the predictor holds a copy of the old one."""
    if isinstance(model.model, nn.Module) and model._flash_config.enabled:
        patch_modules(model.model, model._flash_config)
    model.predictor = None


def _commonest_shape(dataset: Any, imgsz: int) -> tuple[int, int]:
    """Height and width of most validation batches: rectangular ones are padded, 640 becomes 672 x 672 on coco8."""
    shapes = getattr(dataset, "batch_shapes", None)
    if shapes is None or not getattr(dataset, "rect", False):
        return imgsz, imgsz
    (height, width), _ = Counter(tuple(map(int, shapes[i])) for i in dataset.batch).most_common(1)[0]
    return height, width
