"""Scores models on tasks, one model at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.evaluation.reporter import Reporter
from qlora_jax.evaluation.results import Evaluation, task_result
from qlora_jax.evaluation.tasks.task import AnyTask, PreparedTask, ReferenceTask
from qlora_jax.inference.result_cache import open_cache
from qlora_jax.models.partition import ModelParts


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
    reporter: Reporter,
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
    for name, parts, reference in models:
        cache = open_cache(cache_folder, parts)  # hashes the model, once for all tasks
        for task in tasks[name]:
            with reporter.scoring(labels[name], task, cache) as progress:
                scores[task.name][name] = task.score(parts, progress, cache)
            if isinstance(task, ReferenceTask) and reference is not None:
                before = open_cache(cache_folder, reference)
                with reporter.scoring(f"{labels[name]}, its reference", task, before) as progress:
                    found = task.with_reference(scores[task.name][name], parts, reference, progress, cache, before)
                    scores[task.name][name] = found
        del parts, reference  # before the next model is loaded
    return Evaluation(labels=dict(labels), tasks={task.name: task_result(task, scores[task.name]) for task in first})


def prepare_tasks(tasks: Iterable[AnyTask], report: Callable[[str], object]) -> None:
    """Prepares the tasks that need it, before a model is loaded; `report` is called with lines for people."""
    for task in tasks:
        if isinstance(task, PreparedTask):
            task.prepare(report)
