#!/usr/bin/env bash
# Creates .llama_cpp with llama-cpp-python, with which tests run exported GGUF files. Python 3.11 or newer.
#
#     bash scripts/setup_llama_cpp.sh           # .llama_cpp, for x86-64 with AVX2: a copied environment still runs
#     bash scripts/setup_llama_cpp.sh native    # .llama_cpp_native, for this processor: scripts/bench/decode.py measures it
#
# It is not a dependency: the project exchanges only files with it. The package index has no wheels of it, so this
# script builds it, with pip's CMake and an installed C++ compiler: three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=scripts/bench/opponents/requirements-llama.txt
case "${1-}" in
    "") folder=.llama_cpp native=OFF cache=() ;;
    native) folder=.llama_cpp_native native=ON cache=(--no-cache-dir) ;; # the wheel must not be used elsewhere
    *)
        echo "usage: bash scripts/setup_llama_cpp.sh [native]" >&2
        exit 2
        ;;
esac

if cmp -s "$requirements" "$folder/requirements.txt"; then
    echo "llama.cpp: ready in $folder"
    exit 0
fi
skip() {
    echo "llama.cpp: skipped, because $1 is missing. Tests that run exported GGUF files with it will skip."
    exit 0
}
command -v c++ >/dev/null || skip "C++ compiler"
python=$(bash scripts/find_python.sh 3.11 3.14 ensurepip) || skip "Python 3.11 or newer"
echo "llama.cpp: creating $folder with $python"
"$python" -m venv --clear "$folder"
CMAKE_ARGS="-DGGML_NATIVE=$native -DLLAVA_BUILD=OFF" "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${cache[@]+"${cache[@]}"} --requirement "$requirements"
"$folder/bin/python" -c 'import llama_cpp' # finds a broken build before the tests do
cp "$requirements" "$folder/requirements.txt"
echo "llama.cpp: ready in $folder"
