"""Performs the stages of a study: measures steps, searches learning rates, trains and scores the runs that count."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import rich.table
from rich import box

from qlora_jax.config import Config, ConfigError
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.studies.comparison.budget import matching_rank, steps_within, trainable_parameters
from qlora_jax.studies.comparison.dispatch import Launcher, Report, launcher_of, raise_failures, run_all
from qlora_jax.studies.comparison.page import DIFFERENCE, Table, difference_row, estimate_table, write_page
from qlora_jax.studies.comparison.results import Finished, Results, search_losses, summarize, write_table
from qlora_jax.studies.comparison.run import Run, check_unchanged, run_of
from qlora_jax.studies.comparison.settings import CompareArgs, Settings
from qlora_jax.studies.comparison.study import Pair, Study, data_settings, output_of, read_study
from qlora_jax.terminal.console import Console

Perform = Callable[[Sequence[Run]], None]  # performs runs; raises ConfigError if some failed


def first_rate(study: Study, pair: Pair) -> Settings:
    """Returns the first learning rate of a method as a setting; no setting if the study searches none."""
    rates = study.learning_rates(pair[0])
    return {"optim.learning_rate": rates[0]} if rates else {}


def search_rates(
    study: Study, settings: Mapping[Pair, Settings], perform: Perform, report: Report
) -> dict[Pair, list[Run]]:
    """Performs the runs of the search; returns those of each method and task.

    Raises:
      ConfigError: a run failed, or all learning rates of a method and a task diverged.
    """
    runs = {
        pair: [
            run_of(study, "search", pair, {**settings[pair], "train.seed": seed, "optim.learning_rate": rate})
            for rate, seed in study.searches(pair[0])
        ]
        for pair in study.pairs()
    }
    everything = [run for found in runs.values() for run in found]
    if not everything:
        return runs
    report("searching learning rates")
    perform(everything)
    empty = [", ".join(pair) for pair, found in runs.items() if found and not best_rate(found)]
    if empty:
        raise ConfigError([f"learning_rates: all of {pair} diverged. Add lower ones" for pair in empty])
    return runs


def best_rate(runs: Sequence[Run]) -> Settings:
    """Returns the learning rate with the lowest mean loss of the search; no setting if all of them diverged."""
    losses = search_losses([Finished(run, run.outcome()) for run in runs])
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return {"optim.learning_rate": min(finite, key=lambda rate: finite[rate])} if finite else {}


def sized_settings(study: Study) -> tuple[dict[Pair, Settings], dict[Pair, int]]:
    """Returns the settings that give each method and task its budget of parameters, and the number of parameters.

    Raises:
      ConfigError: some methods cannot have that number; lists all of them.
    """
    budget = study.settings.budget
    settings: dict[Pair, Settings] = {}
    counts: dict[Pair, int] = {}
    problems = []
    for pair in study.pairs():
        config = _plain_config(study, pair, {})
        try:
            rank = None
            if budget.trainable_parameters is not None:
                rank = matching_rank(config, budget.trainable_parameters, budget.tolerance)
            settings[pair] = {} if rank is None else {"lora.rank": rank}
            counts[pair] = trainable_parameters(_plain_config(study, pair, settings[pair]))
        except ValueError as error:
            problems.append(f"methods.{pair[0]}: {error}")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return settings, counts


def _plain_config(study: Study, pair: Pair, settings: Settings) -> Config:
    data = data_settings(study, pair, search=False)
    return study.config(*pair, {**data, **settings, "output": study.settings.output})


def run_study(
    study: Study, sizes: Mapping[Pair, Settings], launcher: Launcher, retries: int, report: Report
) -> list[Run]:
    """Performs all stages; returns the runs that count, and those of the search before them.

    Args:
      sizes: as `sized_settings` returns them.

    Raises:
      ConfigError: runs that were started with other inputs, or failed; all of a stage are listed.
    """

    def perform(runs: Sequence[Run]) -> None:
        check_unchanged(runs)
        raise_failures(run_all(runs, launcher, retries, report))

    lengths = _lengths(study, sizes, perform, report)
    settings = {pair: {**sizes[pair], **lengths[pair]} for pair in study.pairs()}
    searched = search_rates(study, settings, perform, report)
    rates = {pair: best_rate(runs) or first_rate(study, pair) for pair, runs in searched.items()}
    final = [
        run_of(study, "final", pair, {**settings[pair], **rates[pair], "train.seed": seed})
        for pair in study.pairs()
        for seed in study.settings.seeds
    ]
    report("training and scoring the runs that count")
    perform(final)
    return [*(run for runs in searched.values() for run in runs), *final]


def _lengths(study: Study, sizes: Mapping[Pair, Settings], perform: Perform, report: Report) -> dict[Pair, Settings]:
    """Returns the number of steps of each method and task, as the budget says; measures it if the budget is a time."""
    budget = study.settings.budget
    if budget.seconds is None:
        return dict.fromkeys(study.pairs(), {} if budget.steps is None else {"train.steps": budget.steps})
    first = {"train.seed": study.settings.search_seeds[0], "train.steps": budget.calibration_steps}
    runs = {
        pair: run_of(study, "calibration", pair, {**sizes[pair], **first, **first_rate(study, pair)})
        for pair in study.pairs()
    }
    report(f"measuring the time of {budget.calibration_steps} steps")
    perform(list(runs.values()))
    times = {pair: run.outcome()["seconds_per_step"] for pair, run in runs.items()}
    return {pair: {"train.steps": steps_within(budget.seconds, time)} for pair, time in times.items()}


WIDTH = 160  # columns of a table, unless a terminal prints it


def compare(args: CompareArgs, *, dry_run: bool = False) -> Results | None:
    """Performs the unfinished runs, writes the page and the table, and prints the results.

    Args:
      dry_run: only check the study, and print its runs; the result is then None.

    Raises:
      ValueError: problems of the study, or runs that failed.
    """
    study = read_study(args.study, model=args.model, output=args.output)
    sizes, parameters = sized_settings(study)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(_overview(study, {pair: f"{count:,}" for pair, count in parameters.items()}))
    if dry_run:
        return None
    output = output_of(study)
    with lock_run(output, warn=console.print) as lock, launcher_of(args, output) as launcher:
        runs = run_study(study, sizes, launcher, args.retries, console.print)
        results = summarize(study, runs, parameters)
        for task in results.study.tasks.values():
            title = f"{task.name}: {task.settings.measure} ({task.better} is better)"
            console.print(_drawn(title, estimate_table(results, task)))
        if results.differences:
            rows = [(one.task, *difference_row(one)) for one in results.differences]
            console.print(_drawn("differences, paired by seed and row", Table(("task", *DIFFERENCE), rows)))
        lock.check()
        page, table = write_page(results, output), write_table(results, output)
    console.print(f"page: {_near(page)}\ntable: {_near(table)}")
    return results


def _overview(study: Study, parameters: dict[tuple[str, str], str]) -> rich.table.Table:
    rows = [
        (method, task, parameters[method, task], str(len(study.searches(method))), str(len(study.settings.seeds)))
        for method, task in study.pairs()
    ]
    return _drawn(
        "runs", Table(("method", "task", "trainable parameters", "runs of the search", "runs that count"), rows)
    )


def _drawn(title: str, table: Table) -> rich.table.Table:
    drawn = rich.table.Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, head in enumerate(table.heads):
        drawn.add_column(head, justify="left" if index == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _near(path: Path) -> Path:
    """Returns a path from the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
