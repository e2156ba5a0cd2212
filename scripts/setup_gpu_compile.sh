#!/usr/bin/env bash
# Installs the extra `gpu-compile` into .venv, which compiles for NVIDIA cards that are absent (pallas_kernels.aot).
# It takes 1 GB and needs no driver or root. A second call takes seconds.
#
# With this extra, JAX looks for a card at every start. Without card and driver it prints a traceback and continues on
# the CPU, except in this project's commands. JAX_PLATFORMS=cpu avoids the traceback, and compiling requires it.
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
