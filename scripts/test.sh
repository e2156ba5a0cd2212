#!/usr/bin/env bash
# Sets up and runs the test suite. Arguments go to pytest: `bash scripts/test.sh -m slow`, `... -k config`.
#
# Tests against torch, transformers, peft and bitsandbytes skip until scripts/setup_oracle.sh has been run, those that run
# GGUF files with llama.cpp until scripts/setup_llama_cpp.sh has been.
set -euo pipefail
cd "$(dirname "$0")/.."

QLORA_JAX_EXTRAS="${QLORA_JAX_EXTRAS:-} dev" bash scripts/setup.sh
# Two processes at a time, the tests of a file in one: most of their time is the compiler's, which has one thread.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
