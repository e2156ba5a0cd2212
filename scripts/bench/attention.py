"""Times causal attention of one layer, forward and backward, against PyTorch's SDPA (flash) on the same CPU.

    python -m scripts.bench.attention [--lengths 512 2048] [--batches 1 4] [--dtypes bfloat16] [--window 1024]

The heads are those of SmolLM2-135M: 9 query heads, 3 key heads, width 64. On our side forward and backward are two
programs, as in a training step, where the second has only what the first saved. The two processes take turns of a few
runs each; a ratio is the median over neighbouring turns. The opponent needs the oracle environment
(scripts/setup_oracle.sh). Prints a table, then one line of JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from scripts.bench.support.environment import OPPONENTS, ORACLE
from scripts.bench.support.interleave import Record, WorkerGroup, block_medians, median_of, median_ratio
from scripts.bench.support.progress import phases

HEADS = {"heads": 9, "kv_heads": 3, "head_dim": 64}


def make_run(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, window: int | None
) -> Callable[[], object]:
    """Returns a function that makes one forward and backward pass of fixed random inputs."""
    import jax
    import numpy as np

    from pallas_kernels.attention import causal_attention

    rng = np.random.default_rng(0)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (jax.numpy.asarray(rng.standard_normal(s, np.float32)).astype(dtype) for s in shapes)

    def attention(q, k, v):
        return causal_attention(q, k, v, head_dim**-0.5, window=window)

    forward = jax.jit(lambda q, k, v: jax.vjp(attention, q, k, v))
    backward = jax.jit(lambda vjp, do: vjp(do))
    return lambda: jax.block_until_ready(backward(forward(q, k, v)[1], do))


def serve(case: Record) -> None:
    """Runs as our worker, like opponents/torch_attention.py: one pass per input line."""
    run = make_run(**case)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def compare(case: Record, blocks: int) -> Record:
    """Returns one row: medians over all runs, and the median ratio of neighbouring turns."""
    arguments = json.dumps(case)
    commands = {
        "ours": [sys.executable, "-m", "scripts.bench.attention", "--serve", arguments],
        "theirs": [ORACLE, str(OPPONENTS / "torch_attention.py"), arguments],
    }
    counted = max(2, min(20, 20 * 1024 // (case["length"] * case["batch"])))
    with WorkerGroup({"JAX_PLATFORMS": "cpu"}) as workers:
        for name, command in commands.items():
            workers.start(name, command, counted)
        turns = workers.run(blocks)
        if workers.failures:
            raise RuntimeError(f"{case}: {workers.failures}")
    medians = {f"{name}_ms": median_of(turns[name], "seconds") * 1e3 for name in commands}
    ours, theirs = (block_medians(turns[name], "seconds") for name in commands)
    return case | medians | {"ratio": median_ratio(theirs, ours)}


def _show(row: Record) -> None:
    window = "" if row["window"] is None else f", window {row['window']}"
    case = f"{row['dtype']}, batch {row['batch']}, {row['length']} tokens{window}"
    print(f"{case:<48}{row['ours_ms']:>10.2f}{row['theirs_ms']:>11.2f}{row['ratio']:>8.2f}x", flush=True)


def main() -> None:
    """Measures and prints every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--window", type=int)
    parser.add_argument("--blocks", type=int, default=5, help="turns per worker")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    print(f"{'one layer, forward and backward':<48}{'ours, ms':>10}{'torch, ms':>11}{'ratio':>9}")
    rows = []
    for dtype in args.dtypes:
        for batch in args.batches:
            for length in phases(f"{dtype}, batch {batch}, length", args.lengths):
                case = {"batch": batch, "length": length, "dtype": dtype, "window": args.window} | HEADS
                rows.append(compare(case, args.blocks))
                _show(rows[-1])
    print(json.dumps({"benchmark": "attention", "cores": os.cpu_count(), "blocks": args.blocks, "rows": rows}))


if __name__ == "__main__":
    from qlora_jax import allocator

    allocator.tune()
    main()
