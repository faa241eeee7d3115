#!/usr/bin/env bash
# Lint and all tests, in a virtual environment that is made on first use. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[test]"
ruff check .
ruff format --check .
# Two workers of one thread each: most of the time goes into processes that are started one after the other.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
