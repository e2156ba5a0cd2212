"""`qlora-jax pairs`: preference pairs of a model's own replies, for training with objective=dpo."""

import shlex
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.rollouts.pairs_settings import PairsArgs, check_pairs
from qlora_jax.terminal.console import Console

if TYPE_CHECKING:
    from qlora_jax.api.pairs import PairsFound

COMMAND = Command(
    name="pairs",
    summary="Draws replies to prompts, and writes the best and the worst by rewards as preference pairs.",
    example="--run runs/mine --prompts prompts.jsonl --reward rewards.py:correct --output pairs.jsonl",
    schema=PairsArgs,
    check=check_pairs,
    common=("rollouts.num_generations", "rollouts.max_completion_length", "rollouts.temperature", "rewards.functions"),
)


def main(argv: list[str]) -> None:
    """Writes the pairs and prints a summary; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.pairs import write_pairs
    from qlora_jax.progress_reporter import ConsoleReporter

    runtime.start()
    found = write_pairs(args, ConsoleReporter(Console(stderr=True)))
    for line in (*_summary(args, found), "next:", *_next_commands(args, found)):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(args: PairsArgs, found: "PairsFound") -> list[str]:
    prompts = len(found.rows) + found.left_out.total()
    means = [np.nanmean(rewards) for rewards in (found.chosen, found.rejected, found.rewards)]
    lines = [
        f"{args.output}: {len(found.rows):,} pairs of {prompts:,} prompts",
        "mean reward: {:.4g} chosen, {:.4g} rejected, {:.4g} of all replies".format(*means),
        f"replies: {len(found.rewards):,}, of which {found.cut:,} were cut and are in no pair",
    ]
    lines += [found.reasons] if found.left_out else []
    return lines + ([f"rewards that are missing because a function failed: {found.failed:,}"] if found.failed else [])


def _next_commands(args: PairsArgs, found: "PairsFound") -> list[str]:
    """Returns the commands that train on the pairs, from the run's adapter if a run replied."""
    run, words, before = found.opened.run, ["--model", args.model or found.opened.args.path], []
    if run is not None:
        is_run = run.step is not None
        step = [] if args.step is None else ["--step", str(args.step)]
        adapter = f"{args.run}/peft" if is_run else str(args.run)
        before = [["qlora-jax", "export", "--run", str(args.run), *step, "--format", "peft"]] if is_run else []
        rank, alpha = run.lora_args.rank, run.lora_args.alpha
        words += ["--lora.start", adapter, "--lora.rank", str(rank), "--lora.alpha", f"{alpha:g}"]
    words += [] if args.chat_template is None else ["--data.chat_template", args.chat_template]
    words += ["--data.train", args.output, "--output", "runs/dpo"]
    return [f"  {shlex.join(each)}" for each in (*before, ["qlora-jax", "train", "--objective", "dpo", *words])]


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
