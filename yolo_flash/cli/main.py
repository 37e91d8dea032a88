"""The command line: every mode and argument of `yolo`, plus `flash.*` settings and commands of our own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .._version import __version__

HELP = """
yolo-flash {version}: the `yolo` command with exact, fused attention (YOLOv10, YOLO11, YOLO12, YOLO26, RT-DETR).

  yolo-flash MODE ARGS            any `yolo` command: train, val, predict, export, track, benchmark, settings, cfg, ...
  yolo-flash checks [device=0] [--json]      what this device can run; --clear-cache forgets what was measured
  yolo-flash plan model=yolo12n.yaml imgsz=640 batch=16 [train|val] [--fit] [--json]      what a run would use
  yolo-flash verify model=best.pt [source=images] [imgsz=640] [batch=2] [all=true] [--json]      ours, stock, float64
  yolo-flash bench step model=yolo12n.yaml imgsz=640 batch=16      a training step, stock against ours
  yolo-flash bench predict model=yolo12n.yaml imgsz=640,1280       a prediction, stock against every backend
  yolo-flash bench train|run model=yolo12n.yaml data=coco8.yaml    iterations of real training; whole runs and mAP
  yolo-flash bench op             every fused attention alone, on the layers of the models
  yolo-flash bench plot FILE.csv ...         pictures of what these measured with csv=FILE.csv
  yolo-flash convert FILE.pt [--to authors] [--out FILE.pt]      weights of YOLOv12's authors for Ultralytics, and back
  yolo-flash help                 this screen; `yolo help` explains Ultralytics' own arguments

Examples
  yolo-flash train data=coco8.yaml epochs=3 imgsz=640
  yolo-flash train model=yolo12n.yaml data=coco8.yaml flash.backend=sdpa_flash
  yolo-flash predict model=runs/detect/train/weights/best.pt source=image.jpg

Settings (flash.KEY=VALUE; also YOLO_FLASH_KEY in the environment, or a `flash:` section in a cfg= file)
  flash.backend=auto              or stock, or a name from the list of `yolo-flash checks`, as sdpa_flash
  flash.layers='model.6.*:stock'  for some layers; sparse_window (approximate) takes flash.window=33 or 256px
  flash.deterministic=prefer      or strict: only bitwise reproducible backends
  flash.config=strict             a shipped or own YAML file of settings
  flash.enabled=false             stock attention; so does YOLO_FLASH=0
  flash.autotune=false            choose by rules instead of measuring before the first step
  flash.graphs=auto               training steps and validation from CUDA graphs; on: predictions too; off: none
  flash.log=false                 no plan in the log

In Python: from yolo_flash import patch_model; patch_model(YOLO("yolo12n.yaml")).train(data="coco8.yaml")
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Raises:
        SystemExit: A mistake in what the user typed, with the message; 1 where `verify` finds something off.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command = args[0].lstrip("-").lower() if args else "help"
    if command in ("help", "h"):  # needs neither torch nor Ultralytics, which take seconds to import
        print(HELP.format(version=__version__))
        return
    from ..backends.registry import BackendNotSupportedError
    from ..config import FlashConfigError
    from ..graphs.graphed_step import FlashGraphError
    from ..patching.fallback import FlashKernelError
    from .arguments import UsageError
    from .commands import COMMANDS
    from .yolo import run_yolo

    try:
        if command in COMMANDS:
            COMMANDS[command](args[1:])
        else:
            run_yolo(args)
    except (FlashConfigError, BackendNotSupportedError, FlashKernelError, FlashGraphError, UsageError) as error:
        raise SystemExit(f"yolo-flash: {error}") from error
