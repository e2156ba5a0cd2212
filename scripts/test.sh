#!/usr/bin/env bash
# Sets up and runs the test suite. Arguments are passed to pytest: `bash scripts/test.sh -m slow`, `... -k config`.
# CI runs part of the slow tests. Before a release, run the others with `-m exhaustive`: every shape, card and method.
#
# Tests against torch, transformers, peft and bitsandbytes skip until you run scripts/setup_oracle.sh.
# Tests that run GGUF files with llama.cpp skip until you run scripts/setup_llama_cpp.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# QLORA_JAX_TEST_PYTHON=PATH runs the tests in another environment, which is not set up here.
python=${QLORA_JAX_TEST_PYTHON:-.venv/bin/python}
[ -n "${QLORA_JAX_TEST_PYTHON:-}" ] || QLORA_JAX_EXTRAS="${QLORA_JAX_EXTRAS:-} dev" bash scripts/setup.sh
# Compiling is half of the time, so compiled programs are cached: for tests that share one, and for later runs and clones
# on the same kind of processor, for which alone machine code is valid.
processor=$(grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null | cksum | cut -d' ' -f1)
programs=${XDG_CACHE_HOME:-${HOME:-$PWD}/.cache}/qlora_jax/test_programs-$processor
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$programs}"
mkdir -p "$programs" && find "$programs" -type f -mtime +14 -delete # older ones compile again
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.02
export PYTHONDONTWRITEBYTECODE= # else each of some hundred processes compiles the modules again
# Two processes; all tests of a file run in one, because they may share fixtures.
exec "$python" -m pytest --numprocesses 2 --dist loadfile "$@"
