#!/usr/bin/env bash
# Creates .venv in this checkout with the versions of uv.lock. Needs no root. A second call takes seconds.
#
#     bash scripts/setup.sh
#
#   QLORA_JAX_PYTHON=PATH   interpreter of a new .venv (default: an installed Python >= 3.12, or one that uv downloads)
#   QLORA_JAX_EXTRAS=...    extras to install, separated by spaces: dev, hub, lm-eval, ... (default: none)
set -euo pipefail
cd "$(dirname "$0")/.."

# jaxlib has wheels for these machines only.
machine="$(uname -sm), $(getconf GNU_LIBC_VERSION 2>/dev/null || echo "no glibc"), $(getconf LONG_BIT) bits"
supported=false
case "$machine" in
    "Darwin arm64"*) supported=true ;;
    "Linux x86_64, glibc "*" 64 bits" | "Linux aarch64, glibc "*" 64 bits")
        version=${machine#*glibc } && version=${version%%,*}
        [ "$(printf '%s\n' 2.27 "$version" | sort -V | head -n 1)" = 2.27 ] && supported=true
        ;;
esac
if ! "$supported"; then
    echo "setup: JAX has no wheel for this machine ($machine). Use 64-bit Linux on x86-64 or ARM with glibc 2.27 or newer (not musl), or a Mac with Apple's processor." >&2
    exit 1
fi

uv=$(bash scripts/find_uv.sh)

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    python=${QLORA_JAX_PYTHON:-$(bash scripts/find_python.sh 3.12 3.99 || echo 3.13)}
    echo "setup: creating .venv with Python: $python"
    # --seed installs pip, with which scripts/fetch_smollm2.py downloads.
    "$uv" venv --quiet --clear --seed --python "$python" .venv
fi

extras=()
for extra in ${QLORA_JAX_EXTRAS:-}; do extras+=(--extra "$extra"); done
echo "setup: installing the locked versions (the first call downloads about 400 MB)"
# --inexact keeps extras that another call installed. Bytecode saves a command two of its first seconds, also where
# PYTHONDONTWRITEBYTECODE keeps Python from storing it.
"$uv" sync --quiet --frozen --inexact --compile-bytecode --python .venv/bin/python ${extras[@]+"${extras[@]}"}
.venv/bin/python -m compileall -q qlora_jax pallas_kernels || true # works only where the folder can be written
# Optional: C++ loops that dequantize and decode faster on a CPU.
JAX_PLATFORMS=cpu .venv/bin/python -m pallas_kernels.native.build | sed 's/^/setup: CPU loops /' || true
echo "setup: ready: $(.venv/bin/python --version), jax $(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))'); to use it: source .venv/bin/activate"
