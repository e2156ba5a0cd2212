"""Compares training speed, memory and time to the first step with PyTorch + PEFT + bitsandbytes.

    python -m scripts.bench.train [--rows b1-r16 seq2048] [--blocks 4] [--output FILE] [--warm] [--quick] [--list]

Both train LoRA on all linear layers of the same model in NF4 with double quantization, on rows of random tokens. For
each row of the table each program starts twice, alone: with an empty compilation cache ("cold"), then with the cache of
the first start ("warm"). The processes of the second start take turns of a block of steps; the first step of a block
does not count. Two processes that time matrix products of the row's dtype, in jax and in torch, take turns too. All
figures are medians:

  speed   their seconds per step / ours, over neighbouring blocks
  memory  peak resident memory of the process, ours / theirs; the worse of the cold and the warm start
  first   seconds from the start of the process to the end of its first step
  share   of the faster library's product rate: FLOP of a step by formula (train_rows.py) / its time / that rate

In rows ending in -ckpt the opponent uses gradient checkpointing and ours `train.remat: full`; otherwise the opponent
uses none and ours the default, `names`. If a row has several configurations of the opponent, the fastest counts. It
runs in the oracle environment (scripts/setup_oracle.sh). --warm skips the cold start and keeps the caches between runs;
memory is then that of a warm start. --quick is a smoke test: --warm with one step; its figures are meaningless.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from scripts.bench.support.environment import OPPONENTS, ORACLE, OURS, ROOT, compilation_caches
from scripts.bench.support.interleave import Record, Turns, WorkerGroup, block_medians, median_of, median_ratio
from scripts.bench.support.progress import phases
from scripts.bench.support.random_model import make_random_model
from scripts.bench.support.train_rows import ROWS, Row
from scripts.fetch_smollm2 import fetch_smollm2

GEMM_RATE = str(ROOT / "scripts/bench/workers/gemm_rate.py")
PRODUCTS = {"gemm jax": [sys.executable, GEMM_RATE, "--library", "jax"]}
PRODUCTS["gemm torch"] = [ORACLE, GEMM_RATE, "--library", "torch"]
MODELS = {"smollm2": fetch_smollm2, "qwen2-0.5b": lambda: make_random_model("qwen2-0.5b")}


def commands_of(row: Row) -> dict[str, list[str]]:
    """Returns the command of ours, and those of the opponent by configuration."""
    model = str(MODELS[row.model]())
    ours = [sys.executable, "-m", "scripts.bench.workers.train_step", *row.our_arguments(model)]
    opponent = [ORACLE, str(OPPONENTS / "torch_qlora_cpu.py")]
    theirs = {" ".join(c): [*opponent, *row.their_arguments(model, c)] for c in row.opponents}
    return {OURS: ours, **theirs}


def measure(row: Row, blocks: int, steps: int, warm_only: bool, timeout_s: float) -> Record:
    """Returns the figures of a row, and failures."""
    commands = commands_of(row)
    with compilation_caches(keep=warm_only) as environment, WorkerGroup(environment, timeout_s) as workers:
        cold: dict[str, Record | None] = (
            {} if warm_only else {n: first_start(workers, n, c) for n, c in commands.items()}
        )
        alive = [name for name in commands if name not in workers.failures]
        warm = {name: workers.start(name, commands[name], steps) for name in alive}
        for name, command in PRODUCTS.items():
            workers.start(name, [*command, "--dtype", row.dtype()])
        turns = workers.run(blocks)
    players = {n: summary(row, turns, n, cold.get(n), warm[n]) for n in commands if n in turns}
    return {"flop": row.flops(), "players": players, **verdict(turns, players), "failures": workers.failures}


def first_start(workers: WorkerGroup, name: str, command: list[str]) -> Record | None:
    """Returns the record of the first step after a start, and ends the process."""
    record = workers.start(name, command)
    workers.close()
    return record


def summary(row: Row, turns: dict[str, Turns], name: str, cold: Record | None, warm: Record | None) -> Record:
    """Returns the figures of one worker; `cold` is None without a cold start."""
    assert warm is not None, "a worker with turns has started"
    step_s = median_of(turns[name], "seconds")
    return {
        "step_s": step_s,
        "tokens_per_s": row.batch * row.seq / step_s,
        "share": share(row.flops(), turns, name),
        "loss": turns[name][-1][-1]["loss"],
        "warm": {"first_step_s": warm["since_start_s"], "peak_rss_mib": turns[name][-1][-1]["peak_rss_mib"]},
        "cold": cold and {"first_step_s": cold["since_start_s"], "peak_rss_mib": cold["peak_rss_mib"]},
    }


def share(flop: float, turns: dict[str, Turns], name: str) -> float | None:
    """Returns a worker's share of the faster library's product rate, block by block; None without a rate."""
    rates = [block_medians(turns[product], "gflops") for product in PRODUCTS if product in turns]
    if not rates:
        return None
    best = map(max, zip(*rates, strict=True))
    seconds = block_medians(turns[name], "seconds")
    return statistics.median(flop / s / (rate * 1e9) for s, rate in zip(seconds, best, strict=True))


def verdict(turns: dict[str, Turns], players: Record) -> Record:
    """Returns the fastest configuration of the opponent, and both ratios; None if either side failed."""
    gemm = {product: median_of(turns[product], "gflops") for product in PRODUCTS if product in turns}
    theirs = min((name for name in players if name != OURS), key=lambda n: players[n]["step_s"], default=None)
    ratios: Record = {"gemm_gflops": gemm, "opponent": theirs, "speed": None, "memory": None}
    if theirs is None or OURS not in players:
        return ratios
    ratios["speed"] = median_ratio(block_medians(turns[theirs], "seconds"), block_medians(turns[OURS], "seconds"))
    starts = [start for start in ("cold", "warm") if players[OURS][start] and players[theirs][start]]
    ratios["memory"] = max(players[OURS][s]["peak_rss_mib"] / players[theirs][s]["peak_rss_mib"] for s in starts)
    return ratios


COLUMNS = ("tokens/s", "share", "MiB cold", "MiB warm", "first cold", "first warm")


def show(name: str, result: Record) -> None:
    """Prints the table of one row."""
    gemm = ", ".join(f"{product} {rate:.0f}" for product, rate in result["gemm_gflops"].items())
    print(f"\n{name}: {result['flop'] / 1e9:.0f} GFLOP per step; GFLOP/s: {gemm}")
    print(" " * 34 + "".join(f"{column:>12}" for column in COLUMNS))
    for player, figures in result["players"].items():
        cells = f"{figures['tokens_per_s']:>12.0f}" + (
            f"{figures['share']:>12.0%}" if figures["share"] else f"{'-':>12}"
        )
        for field, digits in (("peak_rss_mib", 0), ("first_step_s", 1)):
            starts = [figures[start] for start in ("cold", "warm")]
            cells += "".join(f"{start[field]:>12.{digits}f}" if start else f"{'-':>12}" for start in starts)
        print(f"  {player:<32}{cells}")
    for player, failure in result["failures"].items():
        print(f"  {player}: FAILED: {failure}")
    if result["speed"] is not None:
        print(f"  speed {result['speed']:.2f}x, memory {result['memory']:.2f}x, against {result['opponent']}")
    sys.stdout.flush()


def main() -> None:
    """Measures the requested rows in order, and rewrites the output file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    parser.add_argument("--blocks", type=int, default=4, help="turns per worker")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a step counts as failed")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--warm", action="store_true", help="skip the cold start, keep caches")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 1 block of 1 step, no cold start")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:<14}{row.describe()}" for name, row in ROWS.items()))
        return
    results = {}
    for name in phases("row", args.rows):
        try:
            blocks, steps = (1, 1) if args.quick else (args.blocks, ROWS[name].steps)
            results[name] = measure(ROWS[name], blocks, steps, args.warm or args.quick, args.timeout)
            show(name, results[name])
        except OSError as error:  # its model cannot be fetched
            results[name] = {"failures": {"model": str(error)}}
            print(f"\n{name}: FAILED: {error}", flush=True)
        if args.output:
            args.output.write_text(json.dumps({"quick": args.quick, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
