"""Scores models on tasks, one model at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.evaluation.reporter import Reporter
from qlora_jax.evaluation.results import Evaluation, task_result
from qlora_jax.evaluation.tasks.task import AnyTask, PreparedTask, ReferenceTask
from qlora_jax.inference.result_cache import ResultCache, open_cache
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
    reporter: Reporter,
) -> object:
    """Scores a model on a task, together with its reference if it has one and the task compares with it."""
    if not isinstance(task, ReferenceTask) or model.reference is None:
        with reporter.scoring(label, task, cache) as progress:
            return task.score(model.parts, progress, cache)
    of_both = cache.joined(open_cache(cache_folder, model.reference))
    with reporter.scoring(f"{label} and its reference", task, of_both) as progress:
        return task.score_with_reference(model.parts, model.reference, progress, of_both)


def prepare_tasks(tasks: Iterable[AnyTask], report: Callable[[str], object]) -> None:
    """Prepares the tasks that need it, before a model is loaded; `report` is called with lines for people."""
    for task in tasks:
        if isinstance(task, PreparedTask):
            task.prepare(report)
