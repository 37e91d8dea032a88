# Sourced by train.sh, test.sh and matrix.sh: makes .venv with the project, once, and puts it on PATH.
# Usage: . scripts/setup.sh base            or, with extras of pyproject.toml: . scripts/setup.sh dev,export
# PYTHON=python3.12 chooses the interpreter, VENV=folder another place, PINS="torch==2.5.*" what pip is held to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:?which extras? base, or a list such as dev,export}
venv=${VENV:-.venv} pins=${PINS:-}

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

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  python=$(find_python)
  rm -rf "$venv"
  if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "'$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi

# The project's metadata, the interpreter and the place decide what is installed: with an equal stamp nothing is to do.
stamp="$(cksum <pyproject.toml) $("$venv/bin/python" --version) $PWD $pins"
if [ "$(cat "$venv/.installed-$extras" 2>/dev/null)" != "$stamp" ]; then
  echo "Setting up $venv (once; torch is large)..." >&2
  set -f # pins are words, and their stars are pip's
  pip_install torch torchvision $pins
  if [ "$extras" = base ]; then project=.; else project=".[$extras]"; fi
  pip_install --editable "$project" $pins
  set +f
  # opencv-python wants the system's libGL, which servers and containers lack
  if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
    "$venv/bin/python" -m pip uninstall --quiet --yes opencv-python
    pip_install opencv-python-headless
  fi
  "$venv/bin/python" -c 'import cv2, torch, torchvision, ultralytics, yolo_flash'
  echo "$stamp" >"$venv/.installed-$extras"
fi
export PATH="$PWD/$venv/bin:$PATH"
