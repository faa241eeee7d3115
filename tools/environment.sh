# Sourced by quickstart.sh and test.sh: makes .venv on first use, installs the project into it with the pinned versions
# of constraints.txt, and activates it. Argument: the extras, such as "[test]".
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
    echo "error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3." >&2
    exit 1
}
if [ ! -x .venv/bin/python ]; then
    echo "Making the virtual environment .venv"
    "$python" -m venv .venv || {
        echo "error: python3 -m venv failed; on Debian and Ubuntu install the package python3-venv." >&2
        exit 1
    }
fi
# shellcheck disable=SC1091
. .venv/bin/activate
echo "Installing the project and its requirements into .venv"
python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".$1"
