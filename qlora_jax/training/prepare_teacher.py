"""Gives a run its teacher: predictions in files for the data's tokens, or the model itself for sampled replies."""

import itertools
from pathlib import Path

from rich.console import Console

from qlora_jax.config import Config
from qlora_jax.io.loading.progress import loading
from qlora_jax.training.device_mesh import rows_of_batch
from qlora_jax.training.run_spec import RunSpec
from qlora_jax.training.teacher.logprob_cache import DistilledBatches, LiveTeacher, StoredTeacher, Teacher

FOLDER = "teacher"  # predictions, in `data.cache` or in the run's folder


def prepare_teacher(run: RunSpec, console: Console) -> DistilledBatches | None:
    """Returns the teacher's predictions for the run's batches; None without a teacher.

    For the data's tokens, all are computed now, and the teacher is freed before the run's own weights are loaded.
    """
    source = run.inputs.teacher
    if source is None:
        return None

    def load() -> Teacher:
        with loading(console) as progress:
            return source.load(run.mesh, progress)

    if run.inputs.rollouts is not None:
        return LiveTeacher(load())
    folder, dataset = predictions_folder(run.config), run.inputs.dataset
    stored = StoredTeacher(folder=folder, key=source.key, count=source.count)
    rows = source.rows or rows_of_batch(run.config, run.mesh)
    held_out = 0 if dataset.report.eval is None else dataset.report.eval.kept
    total = dataset.report.train.kept + held_out
    batches = itertools.chain(dataset.each_row_once(rows), dataset.eval_batches(rows))
    with console.status("teacher") as status:
        stored.fill(batches, load, lambda done: status.update(f"teacher: {done:,} of {total:,} rows"))
    console.print(f"teacher: predictions for {total:,} rows in {folder}", highlight=False, markup=False, soft_wrap=True)
    return stored


def predictions_folder(config: Config) -> Path:
    """Returns the folder of the predictions."""
    return Path(config.output if config.data.cache is None else config.data.cache) / FOLDER
