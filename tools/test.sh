#!/usr/bin/env bash
# Lint and all tests, in a virtual environment that is made on first use. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[test]"
ruff check .
ruff format --check .
python -m pytest "$@"
