#!/usr/bin/env bash
# The training steps of docs/results/steps-*.md: stock against the plugin, on one GPU. Tables on standard output, numbers
# as JSON in the folder that is named. Usage: bash scripts/study_steps.sh folder [rounds] [steps]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?a folder for the numbers}
rounds=${2:-3}
steps=${3:-10}
step() {
  python3 -m yolo_flash bench step "model=$1" "imgsz=$2" "batch=$3" "arms=$4" "rounds=$rounds" "steps=$steps" \
    "json=$folder/step-${1%.yaml}-$2-b$3.json" 2>/dev/null | grep -v '━'
  echo
}
step yolo12x.yaml 640 16 unpatched,auto
step yolo12m.yaml 1280 8 unpatched,auto
step yolo12n.yaml 2048 4 unpatched,auto
rounds=1 step yolo12n.yaml 4096 1 unpatched,auto
step yolo26n.yaml 640 64 unpatched,auto
step yolo12n.yaml 640 64 unpatched,auto,sdpa_cudnn
