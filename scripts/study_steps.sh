#!/usr/bin/env bash
# The training steps of docs/results/steps-*.md: stock against the plugin, on one GPU. Tables on standard output, numbers
# as JSON in the folder that is named. Usage: bash scripts/study_steps.sh folder [rounds] [steps] [model-imgsz ...]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?a folder for the numbers}
rounds=${2:-3}
steps=${3:-10}
only=" ${*:4} "
step() {
  [[ "$only" == "  " || "$only" == *" $1-$2 "* ]] || return 0
  python3 -m yolo_flash bench step "model=$1.yaml" "imgsz=$2" "batch=$3" "arms=$4" "rounds=${5:-$rounds}" "steps=$steps" \
    "json=$folder/step-$1-$2-b$3.json" 2>/dev/null | grep -v '━'
  echo
}
step yolo12x 640 16 unpatched,sdpa_flash,triton_area
step yolo12m 1280 8 unpatched,sdpa_flash,triton_area
step yolo12n 2048 4 unpatched,sdpa_flash,triton_area
step yolo12n 4096 1 unpatched,triton_area 1
step yolo26n 640 64 unpatched,sdpa_cudnn,triton_area
step yolo12n 640 64 unpatched,sdpa_flash,sdpa_cudnn,triton_area
