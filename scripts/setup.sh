#!/usr/bin/env bash
# Makes .venv in this checkout with the versions of uv.lock. Needs no root; a second call takes a second.
#
#     bash scripts/setup.sh
#
#   QLORA_JAX_PYTHON=PATH   interpreter of a new .venv (default: a Python >= 3.12 that runs, else uv downloads one)
#   QLORA_JAX_EXTRAS=...    extras to install besides the core, separated by spaces: dev, hub, lm-eval, ... (default: none)
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(bash scripts/find_uv.sh)

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    python=${QLORA_JAX_PYTHON:-$(bash scripts/find_python.sh 3.12 3.99 || echo 3.13)}
    echo "setup: making .venv with Python: $python"
    # pip goes in too: scripts/fetch_smollm2.py downloads with it.
    "$uv" venv --quiet --clear --seed --python "$python" .venv
fi

extras=()
for extra in ${QLORA_JAX_EXTRAS:-}; do extras+=(--extra "$extra"); done
echo "setup: installing the locked versions (the first time some 400 MB are downloaded)"
# Inexact: what another call installed as an extra stays.
"$uv" sync --quiet --frozen --inexact --python .venv/bin/python ${extras[@]+"${extras[@]}"}
# Optional: C++ loops that dequantize and decode faster on a CPU.
JAX_PLATFORMS=cpu .venv/bin/python -m pallas_kernels.native.build | sed 's/^/setup: CPU loops /' || true
echo "setup: ready: $(.venv/bin/python --version), jax $(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))'); to use it: source .venv/bin/activate"
