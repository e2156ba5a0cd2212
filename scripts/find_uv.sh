#!/usr/bin/env bash
# Prints the path of uv. If it is not on PATH, installs it into .cache/uv of this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v uv && uv --version >/dev/null 2>&1; then
    exit 0
fi
uv=$PWD/.cache/uv/bin/uv
if ! "$uv" --version >/dev/null 2>&1; then
    echo "setup: uv is not on PATH; installing it into .cache/uv" >&2
    # venv's pip comes from ensurepip, which Debian and Ubuntu package separately.
    python=$(bash scripts/find_python.sh 3.8 3.99 ensurepip) || {
        echo "setup: found neither uv nor a Python that can install it. Install uv (or, on Debian, python3-venv)." >&2
        exit 1
    }
    "$python" -m venv --clear .cache/uv >&2
    .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv >&2
fi
echo "$uv"
