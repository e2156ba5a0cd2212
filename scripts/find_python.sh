#!/usr/bin/env bash
# Prints the path of a Python that really runs and whose version is in a range, or fails.
#
#     bash scripts/find_python.sh 3.12 3.14
#
# A name on PATH is no proof: version managers put shims there that fail when they are called.
set -euo pipefail
lowest=$1 highest=$2

candidates() {
    local minor
    for minor in 13 12 14 11; do echo "python3.$minor"; done
    echo python3
    echo python
    # Version managers keep interpreters that are not on PATH.
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3
}

check='
import sys
low, high = (tuple(map(int, text.split("."))) for text in sys.argv[1:])
if not low <= sys.version_info[:2] <= high:
    sys.exit(1)
import ssl, venv  # an interpreter without them can install nothing
print(sys.executable)
'

while read -r candidate; do
    if found=$("$candidate" -c "$check" "$lowest" "$highest" 2>/dev/null </dev/null); then
        echo "$found"
        exit 0
    fi
done < <(candidates)
exit 1
