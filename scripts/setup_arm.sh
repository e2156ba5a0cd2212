#!/usr/bin/env bash
# Creates .arm: a Python for 64-bit ARM with the locked dependencies, to test the C++ loops for NEON under QEMU.
#
#     bash scripts/setup_arm.sh
#     .arm/python -m pytest tests/pallas_kernels/attention/test_contract.py                        # with bf16 instructions
#     QEMU_CPU=cortex-a72 .arm/python -m pytest tests/pallas_kernels/attention/test_contract.py    # without
#
# It requires Debian or Ubuntu with qemu-user, takes 1.2 GB, and changes nothing outside this folder. The libraries come
# from the wheel for ARM, which scripts/build_wheels.py builds if dist/ has none of these sources.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.arm native=pallas_kernels/native wheels=$PWD/.arm/wheels

skip() {
    echo "ARM: skipped, because $1 is missing"
    exit 0
}
command -v qemu-aarch64 >/dev/null || skip "qemu-aarch64 (Debian's package qemu-user)"
command -v apt-get >/dev/null || skip "apt-get"

if [ ! -e "$folder/root/ready" ]; then
    echo "ARM: downloading Debian's Python"
    apt=$folder/apt root=$folder/root
    rm -rf "$apt" "$root"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$root/usr/lib"
    touch "$apt/status" # apt believes that nothing is installed, so it downloads every dependency
    printf '%s\n' 'APT::Architecture "arm64";' '#clear APT::Architectures;' 'APT::Architectures { "arm64"; };' \
        "Dir::State \"$apt\";" "Dir::State::status \"$apt/status\";" "Dir::Cache \"$apt\";" >"$apt/apt.conf"
    export APT_CONFIG=$apt/apt.conf
    apt-get update -qq
    apt-get install -qq --yes --download-only --no-install-recommends python3 libstdc++6 >/dev/null
    ln -s usr/lib "$root/lib"
    for package in "$apt"/archives/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink; done
    rm -rf "$apt"
    touch "$root/ready"
fi

cat >"$folder/python" <<'SH'
#!/bin/sh
# Python for 64-bit ARM. QEMU_CPU names the processor; `max` has every instruction set, bf16 among them.
here=$(dirname "$(realpath "$0")")
export PYTHONPATH="$here:$here/packages${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu QEMU_CPU="${QEMU_CPU:-max,pauth-impdef=on}"
# numpy's OpenBLAS would choose its SME kernels, which compute wrong products under QEMU 10.0.
export OPENBLAS_CORETYPE=ARMV8
exec qemu-aarch64 -L "$here/root" "$here/root/usr/bin/python3" "$@"
SH
echo "import sys; sys.executable = '$folder/python'  # processes that a program starts run under QEMU, too" >"$folder/sitecustomize.py"
chmod +x "$folder/python"

echo "ARM: installing the locked versions"
uv=$(bash scripts/find_uv.sh)
version=$("$folder/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$uv" export --quiet --frozen --no-emit-project --no-hashes --extra dev --prune pyright --prune playwright \
    --output-file "$folder/locked.txt" >/dev/null
"$uv" pip install --quiet --python .venv/bin/python --python-version "$version" --python-platform aarch64-manylinux_2_31 \
    --only-binary :all: --target "$folder/packages" --requirement "$folder/locked.txt"

built() { "$folder/python" -c 'from pallas_kernels.native import build as b; import sys; sys.exit(not all(b.library_path(v).exists() for v in ("neon", "neon_bf16")))'; }
if ! built; then
    echo "ARM: compiling the loops"
    JAX_PLATFORMS=cpu .venv/bin/python -m scripts.build_wheels --platform manylinux_2_27_aarch64 --out "$wheels"
    rm -rf "$wheels/unpacked"
    python3 -m zipfile -e "$wheels"/*.whl "$wheels/unpacked"
    cp "$wheels/unpacked/$native"/loops-neon*.so "$native/"
    built
fi
echo "ARM: ready: $("$folder/python" --version), .arm/python"
