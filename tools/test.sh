#!/usr/bin/env bash
# Lint and tests, in a virtual environment that is made on first use. Arguments go to pytest.
# With "integration" as the first argument: the slow tests, and those with the real servers of others, each of which lives
# in an environment of its own, .venv-NAME, made of the complete list of packages in tests/integration/NAME.txt.
# With "lowest": the tests of custom/ and of the configs with the lowest versions that setup.cfg allows, in .venv-lowest.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[test]"
# By itself: it asks for timm and torchvision, which its U-Nets do not need.
resenc=(--no-deps -c tools/constraints.txt dynamic-network-architectures)
python -m pip install --quiet --disable-pip-version-check "${resenc[@]}"
if [ "${1-}" = integration ]; then
    for list in tests/integration/*.txt; do
        environment=".venv-$(basename "$list" .txt)"
        cmp --silent "$list" "$environment/installed.txt" || {
            echo "Making the virtual environment $environment"
            python -m venv --clear "$environment"
            if grep --quiet "^# On top of .venv" "$list"; then
                python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
                    > "$(echo "$environment"/lib/python*/site-packages)/venv.pth"
            fi
            "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$list"
            cp "$list" "$environment/installed.txt"
        }
    done
    set -- tests/integration "${@:2}"
elif [ "${1-}" = lowest ]; then
    python -m pip install --quiet --disable-pip-version-check uv
    uv venv --quiet --clear --python "$(command -v python)" .venv-lowest
    uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e ".[test]"
    uv pip install --quiet --python .venv-lowest/bin/python "${resenc[@]}"
    . .venv-lowest/bin/activate
    set -- tests/custom tests/bundles/test_configs.py "${@:2}"
else
    ruff check .
    ruff format --check .
    mypy
fi
# Two workers of one thread each: most of the time goes into processes that are started one after the other. Files in the
# order of their folders, since the longest have the fewest tests, which xdist would leave for the end.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 "$@"
