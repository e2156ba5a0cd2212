#!/usr/bin/env bash
# Sets up and runs the test suite. Arguments go to pytest: `bash scripts/test.sh -m slow`, `... -k config`. CI runs a part of
# the slow ones; before a release, `-m exhaustive` runs the others: every shape, card and method.
#
# Tests against torch, transformers, peft and bitsandbytes skip until scripts/setup_oracle.sh has been run, those that run
# GGUF files with llama.cpp until scripts/setup_llama_cpp.sh has been.
set -euo pipefail
cd "$(dirname "$0")/.."

QLORA_JAX_EXTRAS="${QLORA_JAX_EXTRAS:-} dev" bash scripts/setup.sh
# Half of the time is the compiler's. Its programs are kept, for tests that share one and for the next time.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/programs}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
# Two processes at a time, the tests of a file in one, which may share what a fixture made.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
