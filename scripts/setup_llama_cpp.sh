#!/usr/bin/env bash
# Makes .llama_cpp: llama-cpp-python, which tests run exported GGUF files with. Python 3.11 or newer.
#
# It is no dependency: only files pass between it and the project. There are no wheels of it on the package index, so
# it is built here, with CMake that pip brings along and a C++ compiler that has to be there: three minutes on two cores.
# Built for x86-64 with AVX2, not for what this processor alone has, so that a copied environment still runs.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=scripts/bench/opponents/requirements-llama.txt

if cmp -s "$requirements" .llama_cpp/requirements.txt; then
    echo "llama.cpp: ready"
    exit 0
fi
skip() {
    echo "llama.cpp: skipped, for there is no $1 here; tests that run exported GGUF files with it will skip"
    exit 0
}
command -v c++ >/dev/null || skip "C++ compiler"
python=$(bash scripts/find_python.sh 3.11 3.14 ensurepip) || skip "Python 3.11 or newer"
echo "llama.cpp: making .llama_cpp with $python"
"$python" -m venv --clear .llama_cpp
CMAKE_ARGS="-DGGML_NATIVE=OFF" .llama_cpp/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
.llama_cpp/bin/python -c 'import llama_cpp' # a broken build shows here, not in a test
cp "$requirements" .llama_cpp/requirements.txt
echo "llama.cpp: ready"
