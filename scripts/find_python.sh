#!/usr/bin/env bash
# Prints the path of a working Python whose version is in a range and that has the given modules, or fails.
#
#     bash scripts/find_python.sh 3.12 3.14 ensurepip
#
# It runs each candidate, because version managers put shims on PATH that fail when called.
set -euo pipefail

candidates() {
    # Every match on PATH, because a shim may come before a working Python.
    for name in python3.13 python3.12 python3.14 python3.11 python3 python; do type -aP "$name" || true; done
    # Version managers keep interpreters that are not on PATH.
    printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python3
}

check='
import sys
low, high = (tuple(map(int, text.split("."))) for text in sys.argv[1:3])
if not low <= sys.version_info[:2] <= high:
    sys.exit(1)
for module in ["ssl", *sys.argv[3:]]:
    __import__(module)
print(sys.executable)
'

while read -r candidate; do
    if found=$("$candidate" -c "$check" "$@" 2>/dev/null </dev/null); then
        echo "$found"
        exit 0
    fi
done < <(candidates)
exit 1
