#!/usr/bin/env bash
# Build the sdist and the wheel, install the wheel into an empty environment, and use it from an empty folder.
# torch, ultralytics and what they need are lent by .venv, so that nothing is downloaded. Usage: bash scripts/smoke.sh
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev,export
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
quietly() { "$@" >"$folder/log" 2>&1 || { cat "$folder/log"; echo "smoke test: this failed: $*" >&2; exit 1; }; }

# The wheel of the sdist and that of the checkout hold the same files
quietly python -m build --no-isolation --outdir "$folder/dist" .
quietly python -m build --no-isolation --wheel --outdir "$folder/checkout" .
files() { python -m zipfile -l "$1" | awk '{print $1, $NF}' | sort; }
diff <(files "$folder"/dist/*.whl) <(files "$folder"/checkout/*.whl)

# An empty environment, and an empty home of Ultralytics without a network: coco8 is replaced by the stand-in
lent=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
python -m venv --without-pip "$folder/env"
quietly python -m pip --python "$folder/env/bin/python" install --no-deps --no-index "$folder"/dist/*.whl
echo "$lent" >"$("$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
for name in $(env | sed -nE 's/^((YOLO_FLASH|PYTHON)[A-Z_]*)=.*/\1/p'); do unset "$name"; done
export PATH="$folder/env/bin:$PATH" YOLO_CONFIG_DIR="$folder/home" YOLO_OFFLINE=true YOLO_AUTOINSTALL=false
mkdir "$folder/home" "$folder/empty"
cd "$folder/empty"

quietly python - <<'EOF'
import sys
import yolo_flash
from yolo_flash.config import FlashConfig, config_folder

assert yolo_flash.__file__.startswith(sys.prefix), yolo_flash.__file__
names = sorted(file.stem for file in config_folder().glob("*.yaml"))
assert names == ["default", "high_resolution", "strict"], names
for name in names:
    FlashConfig.resolve(config=name)
EOF
quietly yolo-flash help
yolo-flash checks device=cpu --json | python -c 'import json, sys; assert "sdpa_flash" in str(json.load(sys.stdin))'
train="train epochs=1 imgsz=64 batch=2 workers=0 plots=False device=cpu flash.backend=sdpa_flash"
quietly yolo-flash $train "project=$PWD/runs"
for line in "A STAND-IN TAKES ITS PLACE" "one step ran 8 x "; do
  grep -q "$line" "$folder/log" || { cat "$folder/log"; echo "smoke test: the training did not say: $line" >&2; exit 1; }
done
test -f runs/train/weights/best.pt -a -f runs/train/TRAINED_ON_A_STAND_IN.txt
echo "smoke test: $(cd "$folder/dist" && ls | xargs) build, install and train outside of the repository"
