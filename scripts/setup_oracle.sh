#!/usr/bin/env bash
# Creates .oracle with torch, transformers, peft and bitsandbytes, with which tests and benchmarks compare. Python 3.11.
#
# They are not dependencies: the project exchanges only files with them. It uses pip, not uv, so that pip's settings can
# select a CPU build of torch. On x86-64 Linux the package index serves the CUDA build (about 3 GB). To avoid it:
#
#     PIP_FIND_LINKS=FOLDER bash scripts/setup_oracle.sh
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=scripts/bench/opponents/requirements.txt

if cmp -s "$requirements" .oracle/requirements.txt; then
    echo "oracle: ready"
    exit 0
fi
python=$(bash scripts/find_python.sh 3.11 3.11 ensurepip) || {
    echo "oracle: skipped, because Python 3.11 is missing. Tests that compare with torch, peft and bitsandbytes will skip."
    exit 0
}
echo "oracle: creating .oracle with $python"
"$python" -m venv --clear .oracle
.oracle/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
.oracle/bin/python -c 'import bitsandbytes, peft, torch, transformers' # finds a broken install before the tests do
cp "$requirements" .oracle/requirements.txt
echo "oracle: ready"
