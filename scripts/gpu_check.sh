#!/usr/bin/env bash
# Runs every check that needs an NVIDIA GPU, in at most 20 minutes: the contract of every kernel on real shapes, the
# quickstart with its losses compared with the CPU's, the benchmark of products, attention and steps, decoding, and
# paging with real transfers. The last lines list what passed.
#
#     bash scripts/gpu_check.sh                       # on a card
#     bash scripts/gpu_check.sh bench                 # any of: contract quickstart bench decode paging
#     bash scripts/gpu_check.sh --rehearse            # on a CPU: all stages, small and interpreted (minutes)
#
#   QLORA_JAX_PYTHON=PATH   an interpreter with jax for CUDA, pytest and the dependencies; nothing is installed
#                           (default: .venv, which scripts/setup.sh creates with the extras cuda13 and dev)
#   GPU_CHECK_OUTPUT=DIR    folder for logs and results (default: runs/gpu_check)
#
# The quickstart's model comes from the cache ($QLORA_JAX_CACHE, ~/.cache/qlora_jax), or is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."

rehearse="" stages=()
for word in "$@"; do
    case $word in
    --rehearse) rehearse=--rehearse ;;
    contract | quickstart | bench | decode | paging) stages+=("$word") ;;
    *) echo "gpu_check: $word: unknown argument (expected --rehearse, contract, quickstart, bench, decode or paging)" >&2 && exit 2 ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=(contract quickstart bench decode paging)

if [ -z "${QLORA_JAX_PYTHON:-}" ]; then
    extras="dev cuda13"
    [ -z "$rehearse" ] || extras=dev
    QLORA_JAX_EXTRAS=$extras bash scripts/setup.sh || exit 1
fi
python=${QLORA_JAX_PYTHON:-.venv/bin/python}
output=${GPU_CHECK_OUTPUT:-runs/gpu_check}
mkdir -p "$output"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=cuda,cpu
[ -z "$rehearse" ] || export JAX_PLATFORMS=cpu

contract() {
    # Most of the time is compiling, in parallel processes; each allocates memory of the card on demand.
    local parallel=() processes=4 only=gpu
    [ -z "$rehearse" ] || processes=2 only="not slow" # the same tests with the reference on a CPU
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$processes")
    XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m pytest "${parallel[@]}" -m "$only" \
        tests/pallas_kernels/{nf4_matmul,ggml_matmul,grouped_matmul,attention}/test_on_gpu.py
}

quickstart() {
    local run=$output/quickstart
    rm -rf "$run"
    if [ -z "$rehearse" ]; then
        "$python" scripts/quickstart.py --output "$run" || return
    else # two steps, without scores
        local model
        model=$("$python" scripts/fetch_smollm2.py) || return
        "$python" -m qlora_jax.train --config configs/smollm2_titles.yaml --model "$model" --data.eval null \
            --train.steps 2 --output "$run" || return
    fi
    "$python" -m scripts.bench.gpu.compare_losses "$run/metrics.jsonl"
}

bench() { "$python" -m scripts.bench.gpu.run $rehearse --output "$output/bench_gpu.json"; }

decode() { "$python" -m scripts.bench.gpu.decode $rehearse --output "$output/decode_gpu.json"; }

paging() {
    # Pages go to pinned memory of the host and back, and parameters must equal those of plain optax to the bit.
    local how=(--model smollm2 --rounds 10)
    [ -z "$rehearse" ] || how=(--model random-15m --rounds 2 --seq 64)
    "$python" -m scripts.bench.paging "${how[@]}"
}

declare -A limit=([contract]=400 [quickstart]=200 [bench]=420 [decode]=120 [paging]=60)
slack=1
[ -z "$rehearse" ] || slack=5 # a CPU compiles and interprets with few cores; limits are those of a card's machine
"$python" - "$rehearse" <<'PYTHON' || exit 1
import sys

import jax

from pallas_kernels.devices import target_device

device = target_device()
print(f"{sys.executable}, jax {jax.__version__}, {device}")
if not sys.argv[1] and device.compute_capability is None:
    sys.exit("gpu_check: jax finds no NVIDIA GPU. Without one, pass --rehearse.")
PYTHON

summary=() failed=0
export -f contract quickstart bench decode paging
export python output rehearse
for stage in "${stages[@]}"; do
    seconds=$((slack * limit[$stage]))
    printf '\n=== %s (at most %s s; log: %s)\n' "$stage" "$seconds" "$output/$stage.log"
    began=$SECONDS
    timeout --kill-after=10 "$seconds" bash -c "$stage" 2>&1 | tee "$output/$stage.log"
    status=${PIPESTATUS[0]}
    case $status in
    0) result=passed ;;
    124 | 137) result="NOT FINISHED within $seconds s" && failed=1 ;;
    *) result="FAILED (status $status)" && failed=1 ;;
    esac
    summary+=("$(printf '%-12s%-28s%5s s' "$stage" "$result" $((SECONDS - began)))")
done
printf '\n=== gpu_check%s\n' "${rehearse:+, rehearsed on a CPU: figures are meaningless}"
printf '%s\n' "${summary[@]}"
exit $failed
