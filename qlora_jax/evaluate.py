"""`qlora-jax evaluate`: scores a base unquantized and quantized, and one or two runs, side by side."""

import dataclasses
import json
import sys
from pathlib import Path

from qlora_jax import allocator
from qlora_jax.atomic_files import write_named_text
from qlora_jax.config import Command, run_main
from qlora_jax.evaluation.settings import EvaluateArgs, check_evaluate
from qlora_jax.terminal.console import Console

COMMAND = Command(
    name="evaluate",
    summary="Scores a model unquantized, quantized and finetuned, side by side.",
    example="--run runs/mine --rows heldout.jsonl",
    schema=EvaluateArgs,
    check=check_evaluate,
    flags={"raw": "no chat template: questions and rows are plain text"},
    common=("choices", "letters", "answers"),  # a training run has these, too, but not in its short help
)


def main(argv: list[str]) -> None:
    """Prints a table per task, and writes the scores to a file; raises ValueError or OSError for bad input."""
    args, flags = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.evaluate import evaluate_side_by_side
    from qlora_jax.evaluation.results import WIDTH, print_tables
    from qlora_jax.progress_reporter import ConsoleReporter

    runtime.start()
    reporter = ConsoleReporter(Console(stderr=True))
    evaluation = evaluate_side_by_side(args, raw="raw" in flags, reporter=reporter)
    print_tables(evaluation, Console() if sys.stdout.isatty() else Console(width=WIDTH))
    if args.json is not None:
        data = {"settings": dataclasses.asdict(args)} | evaluation.to_dict(rows=args.json_rows)
        write_named_text(Path(args.json), json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
