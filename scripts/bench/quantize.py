"""Times quantization to NF4 with double quantization, and dequantization, against bitsandbytes on the same CPU.

    python -m scripts.bench.quantize [--opponent_python .oracle/bin/python]

Both run in turns, in two processes, one of which waits; a ratio is that of medians. Both quantize the same f32 weights
and must produce the same codes. Each dequantizes to bf16 from its training layout.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("576x576", "1536x576", "2048x2048", "4096x4096")
# An idle OpenMP or XLA thread may spin for some milliseconds before it sleeps.
REST_SECONDS = 0.05

Operations = dict[str, Callable[[], object]]


def weight_of(shape: str) -> np.ndarray:
    """Returns the random f32 weight of a shape such as 576x576."""
    rows, columns = map(int, shape.split("x"))
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


def seconds(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def digest(codes: np.ndarray) -> str:
    return hashlib.sha256(codes.tobytes()).hexdigest()


def our_operations(shape: str) -> tuple[Operations, str]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.formats.layouts import repack
    from qlora_jax import quant

    weight = jnp.asarray(weight_of(shape))
    qt = quant.quantize(weight)
    as_trained = repack(qt, "row_planar")
    operations = {
        "quantize": lambda: jax.block_until_ready(quant.quantize(weight)),
        "dequantize": lambda: jax.block_until_ready(quant.dequantize(as_trained, "bfloat16")),
    }
    return operations, digest(np.asarray(qt.codes))


def their_operations(shape: str) -> tuple[Operations, str]:
    import torch  # pyright: ignore[reportMissingImports]
    from bitsandbytes import functional as bnb  # pyright: ignore[reportMissingImports]

    weight = torch.from_numpy(weight_of(shape))
    settings = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    codes, state = bnb.quantize_4bit(weight, **settings)
    state.dtype = torch.bfloat16
    operations = {
        "quantize": lambda: bnb.quantize_4bit(weight, **settings),
        "dequantize": lambda: bnb.dequantize_4bit(codes, state),
    }
    return operations, digest(codes.numpy())


def serve() -> None:
    """Runs as the opponent: per JSON line [shape] or [shape, operation], prints the digest of the codes or seconds."""
    operations: dict[str, Operations] = {}
    for line in sys.stdin:
        shape, *operation = json.loads(line)
        if operation:
            print(seconds(operations[shape][operation[0]]), flush=True)
        else:
            operations[shape], codes = their_operations(shape)
            print(codes, flush=True)


class Opponent:
    """The process that runs `serve` in the Python of bitsandbytes."""

    def __init__(self, python: Path) -> None:
        # -P: otherwise the files next to this one would shadow packages.
        command = [str(python), "-P", __file__, "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *question: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the opponent stopped (exit status {self.process.wait()}). See its error above.")
        return answer.strip()


def compare(shape: str, opponent: Opponent, repeats: int) -> list[dict]:
    """Returns one row per operation: medians over interleaved runs."""
    ours, our_codes = our_operations(shape)
    if our_codes != opponent.ask(shape):
        raise RuntimeError(f"{shape}: ours and bitsandbytes made different codes")
    rows = []
    for name, operation in ours.items():
        times: dict[str, list[float]] = {"ours": [], "bitsandbytes": []}
        for _ in range(repeats + 1):  # the first run of each warms up
            times["ours"].append(seconds(operation))
            time.sleep(REST_SECONDS)
            times["bitsandbytes"].append(float(opponent.ask(shape, name)))
            time.sleep(REST_SECONDS)
        medians = {who: statistics.median(runs[1:]) for who, runs in times.items()}
        rows.append({"operation": name, "shape": shape, **medians, "ratio": medians["bitsandbytes"] / medians["ours"]})
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"{'operation':<12}{'shape':<12}{'ours, ms':>10}{'bitsandbytes, ms':>18}{'times faster':>14}")
    for row in rows:
        ours, theirs = row["ours"] * 1e3, row["bitsandbytes"] * 1e3
        print(f"{row['operation']:<12}{row['shape']:<12}{ours:>10.2f}{theirs:>18.2f}{row['ratio']:>14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opponent_python", type=Path, default=ROOT / ".oracle/bin/python")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    from scripts.bench.support.progress import phases  # the opponent's process cannot import it

    os.environ["JAX_PLATFORMS"] = "cpu"
    opponent = Opponent(args.opponent_python)
    rows = [row for shape in phases("shape", args.shapes) for row in compare(shape, opponent, args.repeats)]
    print_table(rows)
    print(json.dumps({"benchmark": "quantize", "cores": os.cpu_count(), "repeats": args.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
