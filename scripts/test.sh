#!/usr/bin/env bash
# Set up .venv and run the tests. Usage: bash scripts/test.sh [any argument of pytest; -n0 for one process]
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev,export
exec python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
