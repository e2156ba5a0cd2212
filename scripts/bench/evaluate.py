"""Compares evaluation speed with transformers + torch: perplexity and multiple choice on SmolLM2.

    python -m scripts.bench.evaluate [--bases none nf4] [--dtypes float32 bfloat16] [--blocks 3]
        [--output results.json] [--small]

Both score the same ids: overlapping windows of a text (the passages of examples/titles, window 512, stride 256), and
the options of questions (examples/multiple_choice), each as the reply to its question. The base is unquantized ("none":
16 or 32 bits, by dtype) or in NF4 with double quantization. The opponent uses the layers of bitsandbytes, which
multiply in bf16 on a processor with bf16 products, whatever the dtype. "rounded" is float32 in that mode; "float32"
disables it. Each process scores all jobs once when it starts, which compiles. Then they take turns of one counted run
after one that does not count. All figures are medians:

  seconds   of a job, from its ids to the scores
  first     extra seconds of the first run with empty compilation caches, mostly compilation
  apart     difference from our f32 loss, in nats per token over all tokens of the job
  speed     ours in each dtype, relative to the fastest opponent that is at least as exact, over neighbouring blocks

In f32 both must give the same loss to a thousandth, otherwise the script ends with an error. The opponent runs in the
oracle environment (scripts/setup_oracle.sh). --small is a smoke test with few rows, one block and kept caches; its
figures are meaningless.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pallas_kernels.native.library import fast_bfloat16
from scripts.bench.support.environment import OPPONENTS, ORACLE, OURS, ROOT, compilation_caches
from scripts.bench.support.interleave import Record, Turns, WorkerGroup
from scripts.fetch_smollm2 import fetch_smollm2

DTYPES = ("float32", "bfloat16")
THEIRS = "transformers"
EXAMPLES = ROOT / "examples"
WINDOW, STRIDE = 512, 256
TOLERANCE = 1e-3  # nats per token
Jobs = dict[str, list[tuple[list[int], int]]]  # per job, rows of (ids, index of the first scored id)


def make_jobs(model: Path, tokens: int, questions: int) -> Jobs:
    """Returns the rows of both jobs, made by the evaluation code of qlora_jax."""
    from qlora_jax.evaluation.tasks.choices import choices_task
    from qlora_jax.evaluation.tasks.text import text_task
    from qlora_jax.io.pretrained import open_pretrained

    opened = open_pretrained(model=str(model))
    max_positions = opened.features.max_positions
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(passages((EXAMPLES / "titles/heldout.jsonl").read_text(encoding="utf-8")))
        file.flush()
        sizes = {"window": WINDOW, "stride": STRIDE, "max_tokens": tokens}
        text = text_task(file.name, opened.tokenizer, **sizes, max_positions=max_positions)
    path = str(EXAMPLES / "multiple_choice/openbookqa_500.jsonl.gz")
    choices = choices_task(path, opened.tokenizer, max_rows=questions, max_positions=max_positions).choices
    rows = {"text": text.rows, "choices": [option for choice in choices for option in choice.options]}
    return {job: [(ids.tolist(), int(scored.argmax())) for ids, scored in each] for job, each in rows.items()}


def passages(lines: str) -> str:
    """Returns the texts of the questions, joined in order."""
    asked = [json.loads(line)["messages"][0]["content"] for line in lines.splitlines()]
    return "\n\n".join(text.rpartition("\n\n")[0] for text in asked)


def commands_of(model: Path, jobs: Path, base: str, dtypes: Sequence[str]) -> dict[str, list[str]]:
    """Returns the command of each worker by name."""
    arguments = ["--model", str(model), "--jobs", str(jobs), "--quant", base]
    programs = {
        OURS: [sys.executable, "-m", "scripts.bench.workers.scoring"],
        THEIRS: [ORACLE, str(OPPONENTS / "torch_evaluate.py")],
    }
    players = [(who, dtype) for dtype in dtypes for who in programs]
    commands = {f"{who} {dtype}": [*programs[who], *arguments, "--dtype", dtype] for who, dtype in players}
    exact = f"{THEIRS} float32"
    if base == "nf4" and exact in commands and fast_bfloat16():
        commands[f"{exact} rounded"] = [*commands[exact], "--rounded"]
    return commands


def measure(commands: dict[str, list[str]], jobs: Jobs, blocks: int, quick: bool, timeout_s: float) -> Record:
    """Returns the figures of all workers by job, and failures."""
    with compilation_caches(keep=quick) as environment, WorkerGroup(environment, timeout_s) as workers:
        firsts = {name: workers.start(name, command) for name, command in commands.items()}
        turns = workers.run(blocks)
    return {
        "jobs": {job: figures(job, rows, firsts, turns) for job, rows in jobs.items()},
        "failures": workers.failures,
    }


def figures(job: str, rows: list, firsts: dict[str, Record | None], turns: dict[str, Turns]) -> Record:
    """Returns the workers' figures of one job, and our speed in each dtype."""
    seconds = {name: [turn[-1][job]["seconds"] for turn in each] for name, each in turns.items()}
    losses = {name: loss(rows, each[-1][-1][job]["nll"]) for name, each in turns.items()}
    players = {name: {"seconds": statistics.median(each)} for name, each in seconds.items()}
    for name, player in players.items():
        first = firsts[name]
        assert first is not None, "a worker with turns has started"
        player["first_s"] = first[job]["seconds"] - player["seconds"]
        player["loss"] = losses[name]
        player["apart"] = abs(losses[name] - losses[f"{OURS} float32"]) if f"{OURS} float32" in losses else None
    return {"players": players, "speed": speeds(seconds)}


def loss(rows: list[tuple[list[int], int]], nll: list[float]) -> float:
    """Returns nats per scored token, with equal weights."""
    return sum(nll) / sum(len(ids) - max(first, 1) for ids, first in rows)


def speeds(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Returns, for each of our workers, the time of its fastest opponent over its time: the median over blocks."""
    found = {}
    for name in (name for name in seconds if name.startswith(OURS)):
        opponents = opponents_of(name, seconds)
        if opponents:
            fastest = min(opponents, key=lambda opponent: statistics.median(seconds[opponent]))
            found[name] = statistics.median(a / b for a, b in zip(seconds[fastest], seconds[name], strict=True))
    return found


def opponents_of(ours: str, names: Iterable[str]) -> list[str]:
    """Returns the opponents that multiply at least as exactly."""
    exact = f"{THEIRS} float32"
    return [name for name in names if name == exact or (name.startswith(THEIRS) and not ours.endswith("float32"))]


def disagreement(result: Record) -> list[str]:
    """Returns the jobs whose f32 losses differ by more than TOLERANCE."""
    apart = {job: of["players"].get(f"{THEIRS} float32", {}).get("apart") for job, of in result["jobs"].items()}
    return [f"{job}: {value:.2g} nats per token apart" for job, value in apart.items() if value and value > TOLERANCE]


def show(base: str, result: Record) -> None:
    """Prints one table per job."""
    for job, of in result["jobs"].items():
        print(f"\n{job}, base {base}")
        print(f"{'':<30}" + "".join(f"{column:>10}" for column in ("seconds", "first", "loss", "apart", "speed")))
        for name, player in of["players"].items():
            speed = f"{of['speed'][name]:.2f}x" if name in of["speed"] else "-"
            apart = "-" if player["apart"] is None else f"{player['apart']:.1e}"
            numbers = f"{player['seconds']:>10.2f}{player['first_s']:>10.2f}{player['loss']:>10.4f}"
            print(f"{name:<30}{numbers}{apart:>10}{speed:>10}")
    for name, failure in result["failures"].items():
        print(f"{name}: NOT AVAILABLE: {failure}")
    sys.stdout.flush()


def main() -> None:
    """Measures and prints two tables per base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--blocks", type=int, default=3, help="turns per worker")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a worker counts as failed")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--small", action="store_true", help="a smoke test: 1024 tokens, 8 questions, 1 block")
    args = parser.parse_args()
    tokens, questions, blocks = (1024, 8, 1) if args.small else (args.tokens, args.questions, args.blocks)
    model, results = fetch_smollm2(), {}
    jobs = make_jobs(model, tokens, questions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(jobs))
        for base in args.bases:
            results[base] = measure(commands_of(model, path, base, args.dtypes), jobs, blocks, args.small, args.timeout)
            show(base, results[base])
    if args.output:
        shape = {"small": args.small, "tokens": tokens, "questions": questions}
        args.output.write_text(json.dumps({**shape, "bases": results}, indent=1))
    sys.exit("\n".join(problem for base in args.bases for problem in disagreement(results[base])) or None)


if __name__ == "__main__":
    main()
