#!/usr/bin/env bash
# All that a change has to pass, what is quick first: lint, types, the packages as users install them, tests.
# Usage: bash scripts/check.sh [any argument of pytest]
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev,export
ruff check .
ruff format --check .
mypy
bash scripts/smoke.sh
exec bash scripts/test.sh "$@"
