# Sourced by train.sh and test.sh: makes .venv with the project and the extras that are named, once, and puts it on PATH.
# Usage: . scripts/setup.sh [extra,...]      PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "yolo-flash needs Python 3.10 or newer; ${PYTHON:-python3} is $(${PYTHON:-python3} --version 2>&1 || true)." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  python=$(find_python)
  rm -rf .venv
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "'$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi

# What is installed is known by the project's metadata, the extras and the interpreter: an equal stamp means nothing to do.
stamp="$(cat pyproject.toml | cksum) $(.venv/bin/python --version) $PWD"
for extra in ${extras//,/ } base; do
  if [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" != "$stamp" ]; then
    echo "Setting up .venv (once; torch is large)..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    # opencv-python wants the system's libGL, which servers and containers lack
    if ! .venv/bin/python -c 'import cv2' 2>/dev/null; then
      .venv/bin/python -m pip uninstall --quiet --yes opencv-python
      .venv/bin/python -m pip install --quiet --disable-pip-version-check opencv-python-headless
    fi
    .venv/bin/python -c 'import cv2, torch, torchvision, ultralytics, yolo_flash'
    for done in ${extras//,/ } base; do echo "$stamp" >".venv/.installed-$done"; done
    break
  fi
done
export PATH="$PWD/.venv/bin:$PATH"
