"""Scores models on tasks, one model at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.evaluation.results import Evaluation, task_result
from qlora_jax.evaluation.task import AnyTask, PreparedTask, ProgressCallback, ReferenceTask
from qlora_jax.inference.result_cache import ResultCache, open_cache
from qlora_jax.models.partition import ModelParts
from qlora_jax.progress_reporter import ProgressReporter


class ScoredModel(NamedTuple):
    """A model in memory.

    Fields:
      reference: the model before its training, for tasks that compare with it; None if it has none.
    """

    name: str
    parts: ModelParts
    reference: ModelParts | None = None


def score_models(
    models: Iterable[ScoredModel],
    tasks: Mapping[str, Sequence[AnyTask]],
    labels: Mapping[str, str],
    *,
    cache_folder: str | Path | None,
    reporter: ProgressReporter,
) -> Evaluation:
    """Scores each model on its tasks, and compares each model with the next.

    Args:
      models: yields the models. Each is released before the next is requested.
      tasks: the tasks of each model, by the model's name. All models have the same tasks in the same order, each with
        the ids of the model's tokenizer.
      labels: a description of each model, in order.
      cache_folder: caches results, so that an interrupted evaluation resumes; None: no cache.
    """
    first = next(iter(tasks.values()))
    scores: dict[str, dict[str, object]] = {task.name: {} for task in first}  # each task has its own type of scores
    for model in models:
        cache = open_cache(cache_folder, model.parts)  # hashes the model, once for all tasks
        for task in tasks[model.name]:
            scores[task.name][model.name] = _score(model, task, labels[model.name], cache, cache_folder, reporter)
        del model  # before the next one is loaded
    return Evaluation(labels=dict(labels), tasks={task.name: task_result(task, scores[task.name]) for task in first})


def _score(
    model: ScoredModel,
    task: AnyTask,
    label: str,
    cache: ResultCache,
    cache_folder: str | Path | None,
    reporter: ProgressReporter,
) -> object:
    """Scores a model on a task, together with its reference if it has one and the task compares with it."""
    if not isinstance(task, ReferenceTask) or model.reference is None:
        with _reported(f"{label}: {task.name}", task, cache, reporter) as progress:
            return task.score(model.parts, progress, cache)
    of_both = cache.joined(open_cache(cache_folder, model.reference))
    with _reported(f"{label} and its reference: {task.name}", task, of_both, reporter) as progress:
        return task.score_with_reference(model.parts, model.reference, progress, of_both)


@contextlib.contextmanager
def _reported(label: str, task: AnyTask, cache: ResultCache, reporter: ProgressReporter) -> Iterator[ProgressCallback]:
    """Reports how many rows are scored, and at the end how many batches were cached."""
    hits, misses = cache.hits, cache.misses
    with reporter.counting(label, task.size) as progress:
        yield progress
    hits, misses = cache.hits - hits, cache.misses - misses  # both 0 without a cache
    if hits + misses:
        reporter.message(f"{label}: {hits:,} of {hits + misses:,} batches cached")


def prepare_tasks(tasks: Iterable[AnyTask], report: Callable[[str], object]) -> None:
    """Prepares the tasks that need it, before a model is loaded; `report` is called with lines for people."""
    for task in tasks:
        if isinstance(task, PreparedTask):
            task.prepare(report)
