#!/usr/bin/env bash
# The tests on the oldest supported and the newest torch and ultralytics, on every Python here; a table at the end.
# Usage: bash scripts/matrix.sh [any argument of pytest]
# ONLY=oldest-newest runs one of torch-ultralytics, PYTHONS="python3.10 python3.12" names interpreters.
# Environments and logs stay in .matrix, so that a second run installs nothing; what was the newest stays the newest until
# `rm -r .matrix`. pip's torch is the CUDA build, about 5 GB each; PIP_INDEX_URL with CPU wheels makes it 1 GB.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .matrix
lowest() { sed -nE "s/^ *\"$1>=([0-9.]+)\",?\$/\1/p" pyproject.toml | head -1; }
declare -A torch=([oldest]="torch==$(lowest torch).*" [newest]="")
declare -A ultralytics=([oldest]="ultralytics==$(lowest ultralytics)" [newest]="")

declare -A seen=()
rows=() failed=0
for python in ${PYTHONS:-python3 python3.10 python3.11 python3.12 python3.13}; do
  minor=$("$python" -c 'import sys; sys.version_info >= (3, 10) and print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
  [ -n "$minor" ] && [ -z "${seen[$minor]:-}" ] || continue
  seen[$minor]=yes
  for combination in ${ONLY:-oldest-oldest oldest-newest newest-oldest newest-newest}; do
    name="py$minor-$combination" log=".matrix/py$minor-$combination.log" SECONDS=0
    echo "$name: running, see $log" >&2
    (
      export VENV=".matrix/$name" PYTHON="$python" PINS="${torch[${combination%-*}]} ${ultralytics[${combination#*-}]}"
      . scripts/setup.sh dev,export
      python -c 'import torch, ultralytics; print("versions", torch.__version__, ultralytics.__version__)'
      exec python -m pytest -n logical --maxprocesses 4 --dist worksteal -q "$@"
    ) >"$log" 2>&1 </dev/null
    status=$?
    [ $status = 0 ] || failed=1
    read -r _ has_torch has_ultralytics < <(grep -m1 '^versions ' "$log" || echo "versions - -")
    outcome=$(grep -E '^=*.*(passed|failed|no tests ran|error).* in [0-9.]+s' "$log" | tail -1 | tr -d '=' | sed -E 's/^ +| +$//g')
    rows+=("| $minor | $has_torch | $has_ultralytics | ${outcome:-not run: $(tail -1 "$log" | cut -c1-80)} | $SECONDS s |")
  done
done
echo "| Python | torch | ultralytics | tests | with set-up |"
echo "| --- | --- | --- | --- | --- |"
printf '%s\n' "${rows[@]}"
exit $failed
