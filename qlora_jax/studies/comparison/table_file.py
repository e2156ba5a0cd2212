"""Writes runs.csv: one line per run that counts, with its value, and per run of the search, with its search loss."""

import csv
import io
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.studies.comparison.results import Finished, Results

TABLE_FILE = "runs.csv"
COLUMNS: tuple[str, ...] = (
    "stage",
    "method",
    "task",
    "seed",
    "learning_rate",
    "steps",
    "measure",
    "value",
    "search_loss",
    "trainable_parameters",
    "seconds",
    "peak_bytes",
    "folder",
)


def write_table(results: Results, folder: Path) -> Path:
    """Writes the file into the study's folder; returns its path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_line(results, one, folder) for one in results.runs)
    write_text(folder / TABLE_FILE, text.getvalue())
    return folder / TABLE_FILE


def _line(results: Results, one: Finished, folder: Path) -> dict[str, object]:
    run, outcome = one.run, one.outcome
    parameters = {(each.method, each.task): each.parameters for each in results.estimates}
    return {
        "stage": run.stage,
        "method": run.method,
        "task": run.task,
        "seed": run.seed,
        "learning_rate": run.config.optim.learning_rate,
        "steps": outcome["steps"],
        "measure": run.study.tasks[run.task].settings.measure,
        "value": one.value,
        "search_loss": outcome["search_loss"],
        "trainable_parameters": parameters[run.method, run.task],
        "seconds": outcome["seconds"],
        "peak_bytes": outcome["peak_bytes"],
        "folder": run.folder.relative_to(folder),
    }
