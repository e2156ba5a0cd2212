#!/usr/bin/env bash
# Makes .oracle: torch, transformers, peft and bitsandbytes, which tests and benchmarks compare with. Python 3.11.
#
# They are no dependencies: only files pass between them and the project. pip, not uv, so that a torch CPU build is
# taken from wherever pip is configured to find one; on x86-64 Linux the package index serves torch's CUDA build (about
# 3 GB), so point pip at CPU wheels first if that matters:  PIP_FIND_LINKS=FOLDER bash scripts/setup_oracle.sh
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=scripts/bench/opponents/requirements.txt

if cmp -s "$requirements" .oracle/requirements.txt; then
    echo "oracle: ready"
    exit 0
fi
python=$(bash scripts/find_python.sh 3.11 3.11 ensurepip) || {
    echo "oracle: skipped, for there is no Python 3.11 here; tests that compare with torch, peft and bitsandbytes will skip"
    exit 0
}
echo "oracle: making .oracle with $python"
"$python" -m venv --clear .oracle
.oracle/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
.oracle/bin/python -c 'import bitsandbytes, peft, torch, transformers' # a broken install shows here, not in a test
cp "$requirements" .oracle/requirements.txt
echo "oracle: ready"
