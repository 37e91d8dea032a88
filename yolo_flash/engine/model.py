"""`YOLO` and `RTDETR` objects whose attention is patched: patch_model and unpatch_model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from ..config import FlashConfig, known_keys
from ..dispatch.dispatcher import Dispatcher
from ..machine import detect, resolve_device
from ..patching.blocks import FlashBlock
from ..patching.class_swap import StockPickle, become, restore
from ..patching.patch import known_blocks, layer_choices, patch_modules, unpatch_modules
from ..planning import autotune
from ..planning.plan import PlanRow, assumed_inputs, make_plan, rounded_size
from .predictor import predictor_class
from .trainer import trainer_class

if TYPE_CHECKING:
    from ultralytics.engine.model import Model as _ModelBase
else:  # the mixin comes before a class that is chosen at run time
    _ModelBase = object

M = TypeVar("M", bound=nn.Module)


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
        finally:  # the next prediction knows what this training has measured
            _patch_inner(self, getattr(getattr(self, "trainer", None), "_flash_dispatcher", None))

    def predict(self, source: Any = None, stream: bool = False, *args: Any, **kwargs: Any) -> Any:
        """As `YOLO.predict`, with the network from CUDA graphs if `flash.graphs_predict` says so."""
        stock: Any = type(self)._stock
        plain = stock.predict is Model.predict  # YOLOE's takes prompts, and a predictor for them
        if plain and self._flash_config.enabled and self._flash_config.graphs_predict:
            given = args[0] if args else kwargs.pop("predictor", None)
            args = (predictor_class(given or self._smart_load("predictor")),)
        return super().predict(source, stream, *args, **kwargs)

    def export(self, **kwargs: Any) -> Any:
        """As `YOLO.export`, of the stock model."""
        if not isinstance(self.model, nn.Module):
            return super().export(**kwargs)
        dispatcher = next((b._flash_dispatcher for b in self.model.modules() if isinstance(b, FlashBlock)), None)
        unpatch_modules(self.model)
        try:
            return super().export(**kwargs)
        finally:
            if dispatcher is not None:
                patch_modules(self.model, self._flash_config, dispatcher)

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
            _patch(model, config)
            warn_no_targets(model)
        else:
            unpatch_model(model)
        return model
    if config.enabled and isinstance(model.model, nn.Module):
        layer_choices(model.model, config)  # raises before anything is changed
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
    model: nn.Module, imgsz: int = 640, batch: int = 16, device: str | int | None = None, amp: bool | str = True
) -> list[PlanRow]:
    """What each attention layer of a patched model would run in training and in validation.

    Validation is planned for square pictures, as its data are not known here; a run plans for those of its own.

    Args:
        model: What `patch_model` returned.
        imgsz: Side of the training images in pixels, rounded up as `train` does.
        batch: Training images a step; validation takes twice as many in most tasks.
        device: As in Ultralytics: `cpu`, `0`; the GPU if there is one.
        amp: Precision of the training on a GPU, as in Ultralytics: float16 where True, `bf16`, float32 where False.

    Returns:
        One row a layer and mode. `model.trainer.flash_plan` holds the plan of the last training run.

    Raises:
        BackendNotSupportedError: A backend asked for by name cannot run a layer.
        ValueError: The model is not patched, or there is no such precision.
    """
    inner: Any = model.model if isinstance(model, Model) else model
    blocks = inner.modules() if isinstance(inner, nn.Module) else ()
    block = next((b for b in blocks if isinstance(b, FlashBlock)), None)
    if block is None:
        raise ValueError("this model has no patched attention layer: call patch_model first")
    where = resolve_device(device)
    network = unwrap_model(inner)
    run_inputs = assumed_inputs(network, rounded_size(network, imgsz), batch, amp, where.type == "cuda")
    dispatcher = block._flash_dispatcher
    measure = functools.partial(autotune.measure, device=where) if dispatcher.config.autotune else None
    dispatcher.recall(where)
    return make_plan(inner, dispatcher, detect(where), run_inputs, measure)


def warn_no_targets(model: nn.Module) -> None:
    """One line when there is nothing to patch, so that nobody waits for a gain."""
    if known_blocks(model):
        return
    config = getattr(model, "yaml", None)
    name = Path(str(config.get("yaml_file") if isinstance(config, dict) else type(model).__name__)).stem
    LOGGER.warning(
        f"yolo-flash: {name} has no attention layer that the plugin knows (of YOLOv10, YOLO11, YOLO12, YOLO26 or "
        f"RT-DETR): its blocks run stock."
    )


@functools.lru_cache
def _model_class(base: Any) -> type[FlashModelMixin]:
    return type(f"Flash{base.__name__}", (FlashModelMixin, base), {"_stock": base, "__module__": __name__})


def _patch_inner(model: Any, earlier: Dispatcher | None = None) -> None:
    """Patch the model inside, which may be a new one; the predictor holds a copy of the old one.

    Args:
        model: A `YOLO` or `RTDETR` object.
        earlier: Has trials that the new decisions shall know, even where the files of `trial_cache` cannot be written.
    """
    if isinstance(model.model, nn.Module) and model._flash_config.enabled:
        _patch(model.model, model._flash_config, earlier)
    model.predictor = None


def _patch(module: nn.Module, config: FlashConfig, earlier: Dispatcher | None = None) -> None:
    """`patch_modules` for a model that predicts: shapes that come again may be measured."""
    dispatcher = Dispatcher(config)
    if isinstance(earlier, Dispatcher):
        dispatcher.take_over(earlier)
    patch_modules(module, config, dispatcher)
    dispatcher.measure = lambda specs, device: autotune.measure(specs, device)
    dispatcher.layers = max(1, sum(isinstance(block, FlashBlock) for block in module.modules()))
