"""`python -m qlora_jax.train`: one finetuning run, from a model and rows on disk to checkpoints and a loss plot."""

import itertools
import shlex
import sys
from pathlib import Path

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import read_command_line, run_main

STOPPED = 143  # what shells report for SIGTERM; the run was saved and can go on
PROG = "python -m qlora_jax.train"
SWITCHES = {
    "resume": "go on from the newest checkpoint in `output`: --config RUN/config.yaml --resume",
    "dry_run": "report on the data and plan memory, also to report.html and report.json in `output`, then stop",
    "oversized": "start although the memory plan says that the run does not fit",
}


def main(argv: list[str]) -> None:
    """Configuration, data report, model, banner, steps, plot; raises ValueError or OSError for bad input."""
    _check_settings_named(argv)
    config, given = read_command_line(argv, PROG, SWITCHES)
    run = Path(config.output)
    console = Console()
    # After the configuration: jax starts when these are imported, and a typing error should not wait for it.
    from qlora_jax import runtime
    from qlora_jax.training.run import check_folder, dry_run, train

    runtime.start()
    check_folder(run, resume="resume" in given)
    if "dry_run" in given:
        dry_run(config, run, oversized="oversized" in given, console=console)
        return
    if not train(config, run, resume="resume" in given, oversized="oversized" in given, console=console):
        sys.exit(STOPPED)


def _check_settings_named(argv: list[str]) -> None:
    """Where a run is to go on, its settings are given or named: a folder alone is not read for them."""
    words = [part for word in argv for part in word.split("=", 1)]
    if "--resume" in words and not {"--config", "--model.path", "--help", "-h"} & set(words):
        run = Path(dict(itertools.pairwise(words)).get("--output", "RUN"))
        raise ValueError(
            "--resume: the run's settings are not given; they are in its folder, for --config to name:\n"
            f"  {PROG} --config {shlex.quote(str(run / 'config.yaml'))} --resume"
        )


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
