#!/usr/bin/env bash
# Creates .llama_cpp with llama-cpp-python, with which tests run exported GGUF files. Python 3.11 or newer.
#
# It is not a dependency: the project exchanges only files with it. The package index has no wheels of it, so this
# script builds it, with pip's CMake and an installed C++ compiler: three minutes on two cores. The build targets x86-64
# with AVX2, not this processor, so that a copied environment still runs.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=scripts/bench/opponents/requirements-llama.txt

if cmp -s "$requirements" .llama_cpp/requirements.txt; then
    echo "llama.cpp: ready"
    exit 0
fi
skip() {
    echo "llama.cpp: skipped, because $1 is missing. Tests that run exported GGUF files with it will skip."
    exit 0
}
command -v c++ >/dev/null || skip "C++ compiler"
python=$(bash scripts/find_python.sh 3.11 3.14 ensurepip) || skip "Python 3.11 or newer"
echo "llama.cpp: creating .llama_cpp with $python"
"$python" -m venv --clear .llama_cpp
CMAKE_ARGS="-DGGML_NATIVE=OFF" .llama_cpp/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
.llama_cpp/bin/python -c 'import llama_cpp' # finds a broken build before the tests do
cp "$requirements" .llama_cpp/requirements.txt
echo "llama.cpp: ready"
