"""Compares decoding speed with transformers + bitsandbytes and llama.cpp: SmolLM2, batch 1, greedy.

    python -m scripts.bench.decode [--new_tokens 128] [--blocks 5] [--output results.json] [--quick]

All read the same GGUF file. Ours and transformers quantize it to NF4 with double quantization; llama.cpp uses its Q4_1.
Each process replies to the same prompt once when it starts, which loads, compiles and warms up. Then they take turns of
one counted reply after one that does not count. All figures are medians:

  tokens/s    over the last three quarters of a reply, without the prompt and the first tokens
  prompt      milliseconds from the call to the first token, compiled and warmed up
  first       seconds from the start of the process to the end of its first reply, with empty compilation caches
  MiB         peak resident memory of the process
  speed       ours relative to each opponent, over neighbouring blocks
  fast        the same of `generate --fast`, which rounds to integers of 8 bits, as llama.cpp does
  same        leading tokens that equal ours; llama.cpp has other weights, so it may differ early

The fastest configuration of transformers counts. `compiled` is a static cache and torch.compile, which on a CPU needs a
private switch of transformers. transformers runs in the oracle environment (scripts/setup_oracle.sh), llama.cpp in one
that is built for this processor (scripts/setup_llama_cpp.sh native); a row says so if its environment is missing.
--quick is a smoke test with short replies, one block and kept caches; its figures are meaningless.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from scripts.bench.support.environment import LLAMA_CPP, OPPONENTS, ORACLE, OURS, compilation_caches
from scripts.bench.support.interleave import Record, Turns, WorkerGroup, median_ratio
from scripts.fetch_smollm2 import fetch_smollm2

TEXT = """The history of the lighthouse goes back to fires that were lit on hilltops, and later on platforms, to guide
ships into port. A lighthouse on the island of Pharos, built in the third century before our era, was long among the
tallest buildings made by people. What follows is a short account of how such towers were built and tended, and why"""
PROMPT_TOKENS = 64
TRANSFORMERS = "transformers"
FAST = f"{OURS}, fast"
CONFIGURATIONS = (("bf16", "dynamic"), ("bf16", "compiled"), ("fp32", "dynamic"))


def commands_of(model: Path, new_tokens: int) -> dict[str, list[str]]:
    """Returns the command of each worker by name."""
    arguments = ["--model", str(model), "--new_tokens", str(new_tokens), "--prompt", *map(str, prompt_ids(model))]
    torch = [ORACLE, str(OPPONENTS / "torch_decode.py"), *arguments]
    theirs = {f"{TRANSFORMERS} {d}, {c}": [*torch, "--dtype", d, "--cache", c] for d, c in CONFIGURATIONS}
    ours = [sys.executable, "-m", "scripts.bench.workers.reply", *arguments]
    fast = {FAST: [*ours, "--fast", "--head_bits", "8"]}
    return {OURS: ours, **fast, **theirs, "llama.cpp": [LLAMA_CPP, str(OPPONENTS / "llama_cpp_decode.py"), *arguments]}


def prompt_ids(model: Path) -> list[int]:
    """Returns the first tokens of TEXT."""
    from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
    from qlora_jax.io.open_model import open_model

    return load_tokenizer(open_model(model).tokenizer).encode(TEXT)[:PROMPT_TOKENS]


def rate(reply: Record) -> float:
    """Returns tokens/s over the last three quarters of a reply."""
    start = len(reply["seconds"]) // 4
    return (len(reply["seconds"]) - 1 - start) / (reply["seconds"][-1] - reply["seconds"][start])


def measure(commands: dict[str, list[str]], blocks: int, quick: bool, timeout_s: float) -> Record:
    """Returns the figures of all workers, the fastest transformers, ratios, and failures."""
    with compilation_caches(keep=quick) as environment, WorkerGroup(environment, timeout_s) as workers:
        firsts = {name: workers.start(name, command) for name, command in commands.items()}
        turns = workers.run(blocks)
    rates = {name: [rate(turn[-1]) for turn in turns[name]] for name in turns}
    players = {name: summary(firsts[name], turns, name, rates[name]) for name in turns}
    fastest = max((n for n in players if n.startswith(TRANSFORMERS)), key=lambda n: players[n]["rate"], default=None)
    theirs = [name for name in players if name not in (OURS, FAST)]
    speed, fast = (
        {name: median_ratio(rates[one], rates[name]) for name in theirs} if one in players else {}
        for one in (OURS, FAST)
    )
    return {"players": players, "opponent": fastest, "speed": speed, "fast": fast, "failures": workers.failures}


def summary(first: Record | None, turns: dict[str, Turns], name: str, rates: list[float]) -> Record:
    """Returns the figures of one worker."""
    assert first is not None, "a worker with turns has started"
    replies = [turn[-1] for turn in turns[name]]
    return {
        "rate": statistics.median(rates),
        "prompt_s": statistics.median([reply["seconds"][0] for reply in replies]),
        "first_s": first["since_start_s"],
        "peak_rss_mib": replies[-1]["peak_rss_mib"],
        "same": same_start(replies[-1]["ids"], turns[OURS][-1][-1]["ids"]) if OURS in turns else None,
    }


def same_start(ids: list[int], others: list[int]) -> int:
    """Returns the number of equal leading ids."""
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))])


def show(result: Record) -> None:
    """Prints the table."""
    columns = ("tokens/s", "prompt, ms", "first, s", "MiB", "speed", "fast", "same")
    print(f"{'':<28}" + "".join(f"{column:>12}" for column in columns))
    for name, figures in result["players"].items():
        speed, fast = (f"{result[kind][name]:.2f}x" if name in result[kind] else "-" for kind in ("speed", "fast"))
        same = "-" if figures["same"] is None else str(figures["same"])
        numbers = f"{figures['rate']:>12.1f}{1e3 * figures['prompt_s']:>12.0f}{figures['first_s']:>12.1f}"
        print(f"{name:<28}{numbers}{figures['peak_rss_mib']:>12.0f}{speed:>12}{fast:>12}{same:>12}")
    for name, failure in result["failures"].items():
        print(f"{name}: NOT AVAILABLE: {failure}")
    print(f"fastest of transformers: {result['opponent']}")


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=5, help="turns per worker")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a reply counts as failed")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 24 tokens, 1 block, caches kept")
    args = parser.parse_args()
    new_tokens, blocks = (24, 1) if args.quick else (args.new_tokens, args.blocks)
    result = measure(commands_of(fetch_smollm2(), new_tokens), blocks, args.quick, args.timeout)
    show(result)
    if args.output:
        args.output.write_text(json.dumps({"quick": args.quick, "new_tokens": new_tokens, **result}, indent=1))


if __name__ == "__main__":
    main()
