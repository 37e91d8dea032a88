#!/usr/bin/env bash
# Set up .venv and run the tests. Usage: bash scripts/test.sh [any argument of pytest]
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev,export
exec python -m pytest "$@"
