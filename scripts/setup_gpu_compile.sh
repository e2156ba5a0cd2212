#!/usr/bin/env bash
# Adds to .venv what compiles for NVIDIA cards that are absent (pallas_kernels.aot): 1 GB, no driver, no root. A second
# call takes seconds.
#
# It is the extra `gpu-compile`. With it installed JAX looks for a card at every start, and where there is neither card
# nor driver it prints a traceback and goes on with the CPU, except in this project's commands. JAX_PLATFORMS=cpu spares
# that, and compiling needs it.
set -euo pipefail
cd "$(dirname "$0")/.."

QLORA_JAX_EXTRAS="${QLORA_JAX_EXTRAS:-} gpu-compile" bash scripts/setup.sh
JAX_PLATFORMS=cpu .venv/bin/python - <<'PYTHON'
import sys

from pallas_kernels.aot import problem
from pallas_kernels.gpu_specs import CARDS

if found := problem():
    sys.exit(f"gpu-compile: {found}")
print(f"gpu-compile: ready for {', '.join(CARDS)}")
PYTHON
