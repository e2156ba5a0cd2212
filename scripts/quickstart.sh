#!/usr/bin/env bash
# From nothing to a finetuned model: sets up, fetches SmolLM2-135M-Instruct, teaches it to name the title of a passage on
# this machine's CPU or GPU, and shows what changed. About ten minutes on two cores.
#
#     bash scripts/quickstart.sh                    # into runs/quickstart
#     bash scripts/quickstart.sh --train.seed 1 --output runs/seed1     # any setting of qlora_jax.train
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py "$@"
