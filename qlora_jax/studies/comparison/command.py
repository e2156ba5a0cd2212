"""Performs a study from its file to its page, for the command line."""

import sys
from pathlib import Path

import rich.table
from rich import box

from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.studies.comparison.launchers import launcher_of
from qlora_jax.studies.comparison.page import DIFFERENCE, Table, difference_row, estimate_table, write_page
from qlora_jax.studies.comparison.results import Results, summarize
from qlora_jax.studies.comparison.run_study import run_study, sized_settings
from qlora_jax.studies.comparison.settings import CompareArgs
from qlora_jax.studies.comparison.study import Study, output_of, read_study
from qlora_jax.studies.comparison.table_file import write_table
from qlora_jax.terminal.console import Console

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
        _print(results, console)
        lock.check()
        page, table = write_page(results, output), write_table(results, output)
    console.print(f"page: {_near(page)}\ntable: {_near(table)}")
    return results


def _overview(study: Study, parameters: dict[tuple[str, str], str]) -> rich.table.Table:
    rows = [
        (method, task, parameters[method, task], str(len(study.learning_rates(method))), str(len(study.settings.seeds)))
        for method, task in study.pairs()
    ]
    return _drawn(
        "runs", Table(("method", "task", "trainable parameters", "runs of the search", "runs that count"), rows)
    )


def _print(results: Results, console: Console) -> None:
    for task in results.study.tasks.values():
        title = f"{task.name}: {task.settings.measure} ({task.better} is better)"
        console.print(_drawn(title, estimate_table(results, task)))
    if results.differences:
        rows = [(one.task, *difference_row(one)) for one in results.differences]
        console.print(_drawn("differences, paired by seed and row", Table(("task", *DIFFERENCE), rows)))


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
