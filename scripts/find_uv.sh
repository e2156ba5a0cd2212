#!/usr/bin/env bash
# Prints the path of uv, installing it into .cache/uv of this checkout where it is not on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v uv && uv --version >/dev/null 2>&1; then
    exit 0
fi
uv=$PWD/.cache/uv/bin/uv
if ! "$uv" --version >/dev/null 2>&1; then
    echo "setup: uv is not on PATH; installing it into .cache/uv" >&2
    python=$(bash scripts/find_python.sh 3.8 3.99) || {
        echo "setup: found no Python that runs, and no uv; install one of the two" >&2
        exit 1
    }
    "$python" -m venv --clear .cache/uv >&2 || {
        echo "setup: $python can't make environments (on Debian and Ubuntu: apt install python3-venv), or install uv yourself" >&2
        exit 1
    }
    .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv >&2
fi
echo "$uv"
