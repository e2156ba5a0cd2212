#!/usr/bin/env bash
# Creates .verifiers with the package verifiers, whose environments train a model. Python 3.11 or newer.
#
# It is not a dependency: it needs other versions of packages that the tests use, and exchanges only messages with us.
set -euo pipefail
cd "$(dirname "$0")/.."
requirement="verifiers==0.4.0"

if [ "$(cat .verifiers/requirement.txt 2>/dev/null)" = "$requirement" ]; then
    echo "verifiers: ready"
    exit 0
fi
python=$(bash scripts/find_python.sh 3.11 3.14 ensurepip) || {
    echo "verifiers: skipped, because Python 3.11 or newer is missing. Tests of its environments will skip."
    exit 0
}
echo "verifiers: creating .verifiers with $python"
"$python" -m venv --clear .verifiers
.verifiers/bin/python -m pip install --quiet --disable-pip-version-check "$requirement"
.verifiers/bin/python -c 'import verifiers.v1' # finds a broken install before the tests do
echo "$requirement" >.verifiers/requirement.txt
echo "verifiers: ready"
