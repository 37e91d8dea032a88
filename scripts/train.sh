#!/usr/bin/env bash
# Set up .venv and train on coco8 with fused attention; on a stand-in where nothing can be downloaded.
# Usage: bash scripts/train.sh [any argument of `yolo-flash train`]      e.g. epochs=1 imgsz=64
set -euo pipefail
. "$(dirname "$0")/setup.sh" base
exec yolo-flash train data=coco8.yaml "project=$PWD/runs" epochs=3 "$@"
