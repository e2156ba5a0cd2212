#!/usr/bin/env bash
# Sets up and runs the test suite. Arguments are passed to pytest: `bash scripts/test.sh -m slow`, `... -k config`.
# CI runs part of the slow tests. Before a release, run the others with `-m exhaustive`: every shape, card and method.
#
# Tests against torch, transformers, peft and bitsandbytes skip until you run scripts/setup_oracle.sh.
# Tests that run GGUF files with llama.cpp skip until you run scripts/setup_llama_cpp.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

QLORA_JAX_EXTRAS="${QLORA_JAX_EXTRAS:-} dev" bash scripts/setup.sh
# Compiling is half of the time, so compiled programs are cached, for tests that share one and for the next run.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/programs}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
# Two processes; all tests of a file run in one, because they may share fixtures.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
