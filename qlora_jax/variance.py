"""`qlora-jax variance STUDY.yaml`: splits differences between models into model, prompts and sampling."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.studies.variance.settings import VarianceArgs, check_variance
from qlora_jax.terminal.console import Console

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from qlora_jax.studies.variance.analysis import Split

COMMAND = Command(
    name="variance",
    summary="Splits the difference between models into model, prompts, sampling and so on; one thing varies at a time.",
    example="--output study --models '{base: models/base, mine: runs/mine}' --prompts heldout.jsonl "
    "--fixed.temperature 1 --vary '{seed: [0, 1, 2]}'",
    schema=VarianceArgs,
    check=check_variance,
    positional="config",
)


def main(argv: list[str]) -> None:
    """Runs a study and writes its results and page; raises ValueError or OSError for bad input.

    One process at a time writes in the study's folder.
    """
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.io.run_folder.run_lock import lock_run
    from qlora_jax.progress_reporter import ConsoleReporter
    from qlora_jax.studies.variance.analysis import add_preferences, analyse, build_study_judge
    from qlora_jax.studies.variance.page import PageContent, write_results
    from qlora_jax.studies.variance.questions import read_questions
    from qlora_jax.studies.variance.replies import observe
    from qlora_jax.studies.variance.settings import design_of

    runtime.start()
    design, questions = design_of(args), read_questions(args)
    reporter = ConsoleReporter(Console(stderr=True))
    with lock_run(Path(args.output), reporter.message) as lock:
        judge = build_study_judge(args, reporter)
        observations = observe(args, design, questions, reporter)
        if judge is not None:
            observations = add_preferences(args, judge, questions.asked, observations, reporter)
        splits = analyse(args, design, questions.asked, observations)
        lock.check()
        path = write_results(PageContent(args, design, questions, observations, splits))
    _print(splits, Console())
    Console(stderr=True).print(f"page: {path}", markup=False, highlight=False, soft_wrap=True)


def _print(splits: "list[Split]", console: "RichConsole") -> None:
    """Prints the parts of each difference between two models."""
    for split in splits:
        if len(split.models) > 1:
            first, second = split.models
            low, high = split.mean_interval
            parts = ", ".join(f"{part.name} {part.share:.0%}" for part in split.parts)
            console.print(
                f"{split.measure}, {second} - {first}, {split.factor} varies: "
                f"{split.mean:.3g} [{low:.3g}, {high:.3g}]; {parts}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
