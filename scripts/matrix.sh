#!/usr/bin/env bash
# The tests on the oldest supported and the newest torch and ultralytics, on every Python here; a table at the end.
# Usage: bash scripts/matrix.sh [any argument of pytest; -n0 for one process]
# ONLY="oldest-newest" runs these pairs torch-ultralytics alone, PYTHONS="python3.10 python3.12" these interpreters;
# those of pyenv, which PATH hides, are PYTHONS="$HOME/.pyenv/versions/3.*/bin/python".
# Environments and logs stay in .matrix: a second run installs nothing, and what was the newest stays so until
# `rm -r .matrix`. pip's torch for Linux is the CUDA build, 5 GB each; PIP_EXTRA_INDEX_URL may name CPU wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .matrix

# What pip is held to: the lower bound in pyproject.toml, or nothing
oldest() { sed -nE "s/^ *\"$1>=([0-9.]+)\",?\$/$1==\1/p" pyproject.toml | head -1; }
pins_for() {
  if [ "${1%-*}" = oldest ]; then echo "$(oldest torch).*"; fi
  if [ "${1#*-}" = oldest ]; then oldest ultralytics; fi
}

rows="" seen=" " failed=0
for python in ${PYTHONS:-python3 python3.10 python3.11 python3.12 python3.13}; do
  minor=$("$python" -c 'import sys; sys.version_info >= (3, 10) and print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
  [ -n "$minor" ] || continue
  case "$seen" in *" $minor "*) continue ;; esac
  seen="$seen$minor "
  for pair in ${ONLY:-oldest-oldest oldest-newest newest-oldest newest-newest}; do
    name="py$minor-$pair" SECONDS=0
    log=".matrix/$name.log"
    echo "$name: running, see $log" >&2
    (
      VENV=".matrix/$name" PYTHON="$python" PINS=$(pins_for "$pair" | xargs)
      . scripts/setup.sh dev,export
      python -c 'import torch, ultralytics; print("versions", torch.__version__, ultralytics.__version__)'
      python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
    ) >"$log" 2>&1 </dev/null || failed=1
    versions=$(sed -n 's/^versions //p' "$log" | head -1)
    outcome=$(grep -E '(passed|failed|no tests ran|error|collected).* in [0-9.]+s' "$log" | tail -1 | sed -E 's/^[= ]+|[= ]+$//g')
    rows="$rows| $minor | ${versions:-no versions} | ${outcome:-not run: $(tail -1 "$log" | cut -c1-90)} | $SECONDS s |"$'\n'
  done
done
echo "| Python | torch, ultralytics | tests | with set-up |"
echo "| --- | --- | --- | --- |"
printf '%s' "$rows"
exit $failed
