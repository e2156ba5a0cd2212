"""Compares steps that learn from rewards with TRL's GRPOTrainer: seconds per step, its parts, and peak memory.

    python -m scripts.bench.rollouts [--steps 6] [--prompts 8] [--generations 8] [--length 64] [--turns 2]

SmolLM2-135M, LoRA of rank 16 on all linear layers, the same prompts, a reward that differs between replies. Ours holds
the base in NF4, theirs in the dtype that is faster of bfloat16 and float32. Turns alternate; a ratio is that of medians
over all steps but the first of each turn. TRL runs in the oracle environment (scripts/setup_oracle.sh). Replies have
other lengths in both, so seconds per sampled token are the figure to read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_jax.training.metrics.metrics_file import METRICS_FILE, read_metrics
from scripts.fetch_smollm2 import fetch_smollm2

HERE = Path(__file__).parent
ORACLE = os.environ.get("QLORA_ORACLE_PYTHON", ".oracle/bin/python")
REWARD = '''
def parity(completions, **columns):
    """Returns a reward that differs between replies."""
    return [float(sum(map(ord, one)) % 2) for one in completions]
'''


def main() -> None:
    """Prints a line per turn, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 6), ("prompts", 8), ("generations", 8), ("length", 64), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    found: dict[str, list[dict]] = {"ours": [], "bfloat16": [], "float32": []}
    with tempfile.TemporaryDirectory() as folder:
        rows, rewards = Path(folder, "prompts.jsonl"), Path(folder, "rewards.py")
        count = args.prompts * (args.steps + 1)
        prompts = [{"prompt": f"Tell me a story about {number} rivers."} for number in range(count)]
        rows.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        rewards.write_text(REWARD)
        for turn in range(args.turns):
            for player, results in found.items():
                own = _ours(args, rows, rewards, turn) if player == "ours" else _theirs(args, rows, player)
                results.append(own)
                print(player, json.dumps(own), flush=True)
    _print_ratios(found)


def _ours(args: argparse.Namespace, rows: Path, rewards: Path, turn: int) -> dict:
    run = rows.parent / f"run{turn}"
    command = [sys.executable, "-m", "qlora_jax.train", "--model", str(fetch_smollm2()), "--objective", "grpo"]
    command += ["--data.train", str(rows), "--reward", f"{rewards}:parity", "--output", str(run)]
    command += ["--rollouts.num_generations", str(args.generations), "--data.max_length", str(args.length + 64)]
    command += ["--rollouts.max_completion_length", str(args.length), "--train.micro_batch_size", str(args.prompts)]
    command += ["--train.accumulation", "1", "--train.steps", str(args.steps + 1), "--optim.learning_rate", "1e-6"]
    command += ["--optim.warmup_ratio", "0", "--lora.rank", "16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"training failed with status {status}")
    steps = [record for record in read_metrics(run / METRICS_FILE) if "loss" in record][1:]
    return {
        "seconds": [step["seconds"] + step["rollout_seconds"] + step["reward_seconds"] for step in steps],
        "rollout_seconds": [step["rollout_seconds"] for step in steps],
        "tokens": [step["reply_tokens"] for step in steps],
        "peak_mib": usage.ru_maxrss / 1024,
    }


def _theirs(args: argparse.Namespace, rows: Path, dtype: str) -> dict:
    command = [ORACLE, str(HERE / "opponents/trl_grpo.py"), "--model", str(fetch_smollm2()), "--rows", str(rows)]
    command += ["--dtype", dtype]
    for name in ("steps", "prompts", "generations", "length"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _print_ratios(found: dict[str, list[dict]]) -> None:
    per_token = {player: _per_token(turns, "seconds") for player, turns in found.items()}
    memory = {player: max(turn["peak_mib"] for turn in turns) for player, turns in found.items()}
    best = min((player for player in found if player != "ours"), key=per_token.__getitem__)
    share = _per_token(found["ours"], "rollout_seconds") / per_token["ours"]
    print(f"theirs in {best}; speed per sampled token, ours / theirs: {per_token[best] / per_token['ours']:.2f}")
    print(f"peak memory, ours / theirs: {memory['ours'] / memory[best]:.2f} ({memory['ours']:,.0f} MiB)")
    print(f"share of our step that samples: {share:.0%}")


def _per_token(turns: list[dict], part: str) -> float:
    """Returns the median over steps of the seconds of a part for each token of a mean reply."""
    return statistics.median(
        seconds / tokens for turn in turns for seconds, tokens in zip(turn[part], turn["tokens"], strict=True)
    )


if __name__ == "__main__":
    main()
