"""`patch_model` and `unpatch_model`, the class of patched `YOLO` and `RTDETR` objects, and `plan`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from ..assets import offline
from ..backends.registry import is_approximate, label
from ..config import FlashConfig, known_keys
from ..dispatch.dispatcher import Dispatcher
from ..graphs.validation import ValidationGraphs
from ..machine import detect, resolve_device
from ..patching.blocks import FlashBlock
from ..patching.class_swap import StockPickle, become, restore
from ..patching.patch import known_blocks, layer_choices, patch_modules, unpatch_modules, without_known_blocks
from ..planning import autotune
from ..planning.inputs import assumed_inputs, rounded_size
from ..planning.plan import PlanRow, make_plan
from .predictor import predictor_class
from .run import FlashRun
from .trainer import trainer_class
from .validator import with_graphs

M = TypeVar("M", bound=nn.Module)


class FlashModelMixin(StockPickle, Model):
    """First base of the class of a patched `YOLO` or `RTDETR` object; patches the model again when it was rebuilt."""

    _flash_sources: dict[str, Any]  # for `FlashConfig.resolve`, kept to merge the section of a `cfg=` file
    _flash_config: FlashConfig

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """As `YOLO.train`, with our mixin on top of the task's trainer class or the given one."""
        base = trainer or self._smart_load("trainer")
        if isinstance(base, type):
            base = trainer_class(base, self._flash_config, self._flash_sources)
        else:
            LOGGER.warning(f"yolo-flash: trainer={base!r} is not a class, so that it trains stock attention.")
        try:
            return super().train(trainer=base, **kwargs)
        finally:  # the next prediction uses what this training has measured
            run = getattr(getattr(self, "trainer", None), "flash_run", None)
            if isinstance(self.model, nn.Module) and self._flash_config.enabled:
                _patch(self.model, self._flash_config, run.dispatcher if isinstance(run, FlashRun) else None)
            self.predictor = None  # which holds a copy of the network before

    def predict(self, source: Any = None, stream: bool = False, *args: Any, **kwargs: Any) -> Any:
        """As `YOLO.predict`, with the network from CUDA graphs under `flash.graphs=on`."""
        stock: Any = type(self)._stock
        plain = stock.predict is Model.predict  # that of YOLOE takes prompts, and a predictor for them
        if plain and self._flash_config.enabled and self._flash_config.graphs == "on":
            given = args[0] if args else kwargs.pop("predictor", None)
            args = (predictor_class(given or self._smart_load("predictor")),)
        return super().predict(source, stream, *args, **kwargs)

    def val(self, validator: Any = None, **kwargs: Any) -> Any:
        """As `YOLO.val`, of a data set that is there, with the network from CUDA graphs unless `flash.graphs=off`."""
        stock: Any = type(self)._stock
        if "data" in kwargs and self.task == "detect":
            kwargs["data"] = offline.data_within_reach(kwargs["data"])
        if stock.val is Model.val and self._flash_config.enabled:  # that of YOLOE takes prompts
            base, config = validator or self._smart_load("validator"), self._flash_config

            def replaying(*args: Any, **settings: Any) -> Any:
                return with_graphs(base(*args, **settings), ValidationGraphs(config.graphs, config.log))

            validator = replaying
        return super().val(validator, **kwargs)

    def export(self, **kwargs: Any) -> Any:
        """As `YOLO.export`, of the stock model."""
        network: Any = self.model
        dispatcher = _dispatcher_of(network)
        if dispatcher is None:
            return super().export(**kwargs)
        choices = set(layer_choices(network, self._flash_config).values())
        if named := [name for name in choices if is_approximate(name)]:
            LOGGER.warning(
                f"yolo-flash: the exported model has stock attention, which is exact: it does not compute what "
                f"{label(named[0])} computes here."
            )
        unpatch_modules(network)
        try:
            return super().export(**kwargs)
        finally:
            patch_modules(network, self._flash_config, dispatcher)

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
        >>> model = patch_model(YOLO("yolo12n.yaml"), deterministic="strict")
        >>> metrics = model.train(data="coco8.yaml", epochs=1, imgsz=32, device="cpu", plots=False)
        >>> (result,) = model.predict("bus.jpg", imgsz=64)
    """
    return patch_from_sources(model, known_keys(settings, "the keyword arguments"))


def patch_from_sources(model: M, sources: dict[str, Any]) -> M:
    """`patch_model` for settings that still have to be resolved: keyword arguments of `FlashConfig.resolve`."""
    config = FlashConfig.resolve(**sources)
    network: Any = model.model if isinstance(model, Model) else model
    exported = isinstance(model, Model) and not isinstance(network, nn.Module)
    if config.enabled and not exported:
        layer_choices(network, config)  # raises before anything is changed
    unpatch_model(model)
    if isinstance(model, Model):
        cls: Any = type(model)
        become(model, _model_class(cls), sources=sources, config=config)
        model.predictor = None  # which holds a copy of the network
    if exported:
        LOGGER.warning(f"yolo-flash: {network} is an exported model and runs as it was exported.")
    elif config.enabled:
        _patch(network, config)
        if not known_blocks(network):  # so that nobody waits for a gain
            yaml = getattr(network, "yaml", None)
            name = Path(str(yaml.get("yaml_file") if isinstance(yaml, dict) else type(network).__name__)).stem
            LOGGER.warning(f"yolo-flash: {without_known_blocks(name)}: its blocks run stock.")
    return model


def unpatch_model(model: M) -> M:
    """Undo `patch_model`: the object, its class and its outputs are as before, to the bit. Stock models are left alone.

    Args:
        model: What was given to `patch_model`.

    Returns:
        The same object.

    Examples:
        >>> type(unpatch_model(patch_model(YOLO("yolo12n.yaml")))) is YOLO
        True
    """
    if isinstance(model, FlashModelMixin):
        restore(model)
        model.predictor = None
    inner = model.model if isinstance(model, Model) else model
    if isinstance(inner, nn.Module):
        unpatch_modules(inner)
    return model


def plan(
    model: nn.Module, imgsz: int = 640, batch: int = 16, device: str | int | None = None, amp: bool | str = True
) -> list[PlanRow]:
    """What each attention layer of a patched model would run in training and in validation.

    Validation is planned for square pictures, since its data are not known here; a run plans for its own data.

    Args:
        model: What `patch_model` returned.
        imgsz: Side of the training images in pixels, rounded up as `train` does.
        batch: Training images a step; validation takes twice as many in most tasks.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Precision of the training on a GPU, as in Ultralytics: float16 where True, `bf16`, float32 where False.

    Returns:
        One row a layer and mode. `model.trainer.flash_plan` holds the plan of the last training run.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer, or was wrong or raised in its trial.
        ValueError: The model is not patched, or there is no such precision.

    Examples:
        >>> model = patch_model(YOLO("yolo12n.yaml"), layers={"model.8.*": "stock"}, autotune=False)
        >>> rows = plan(model, imgsz=640, batch=2, device="cpu")
        >>> {row.layer[:7]: row.decision.backend for row in rows if row.mode == "train"}
        {'model.6': 'sdpa_flash', 'model.8': 'stock'}
    """
    network: Any = unwrap_model(model.model if isinstance(model, Model) else model)
    dispatcher = _dispatcher_of(network)
    if dispatcher is None:
        raise ValueError("this model has no patched attention layer: call patch_model first")
    where = resolve_device(device)
    run_inputs = assumed_inputs(network, rounded_size(network, imgsz), batch, amp, where.type == "cuda")
    measure = functools.partial(autotune.measure, device=where) if dispatcher.config.autotune else None
    dispatcher.recall(where)
    return make_plan(network, dispatcher, detect(where), run_inputs, measure)


@functools.lru_cache
def _model_class(base: Any) -> type[FlashModelMixin]:
    return type(f"Flash{base.__name__}", (FlashModelMixin, base), {"_stock": base, "__module__": __name__})


def _dispatcher_of(network: Any) -> Dispatcher | None:
    """What the patched blocks of a network share; None if there are none."""
    blocks = network.modules() if isinstance(network, nn.Module) else ()
    return next((block._flash_dispatcher for block in blocks if isinstance(block, FlashBlock)), None)


def _patch(module: nn.Module, config: FlashConfig, earlier: Dispatcher | None = None) -> None:
    """`patch_modules` for predictions: recurring shapes may be measured, and trials of an `earlier` run are known."""
    dispatcher = Dispatcher(config)
    if earlier is not None:
        dispatcher.take_over(earlier)
    patch_modules(module, config, dispatcher)
    dispatcher.measure = lambda specs, device: autotune.measure(specs, device)
    dispatcher.layers = max(1, sum(isinstance(block, FlashBlock) for block in module.modules()))
