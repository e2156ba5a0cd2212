"""`qlora-jax arena`: a tournament between models, runs and recorded replies, decided by judges."""

import sys

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.studies.tournament.settings import ArenaArgs, check_arena
from qlora_jax.terminal.console import Console

COMMAND = Command(
    name="arena",
    summary="Ranks models, runs and recorded replies by pairwise verdicts of judges.",
    example="--output arena --systems '{base: models/base, mine: runs/mine}' --prompts prompts.jsonl "
    "--judges '{me: {kind: person}}'",
    schema=ArenaArgs,
    check=check_arena,
)
WIDTH = 120  # columns of a table, unless a terminal prints it


def main(argv: list[str]) -> None:
    """Prints the rankings, and writes them to the tournament's folder; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.progress_reporter import ConsoleReporter
    from qlora_jax.studies.tournament.results import print_results
    from qlora_jax.studies.tournament.tournament import PAGE_FILE, hold_tournament

    runtime.start()
    messages = Console(stderr=True)
    results = hold_tournament(args, ConsoleReporter(messages))
    print_results(results, Console() if sys.stdout.isatty() else Console(width=WIDTH))
    messages.print(f"results: {args.output}/{PAGE_FILE}", soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
