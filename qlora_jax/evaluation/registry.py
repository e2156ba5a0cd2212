"""Registers the evaluation tasks: the setting that names a task's input, and the function that builds the task."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.data.readers.files import stream_rows

if TYPE_CHECKING:
    from qlora_jax.config import QuestionArgs
    from qlora_jax.evaluation.task import AnyTask, TaskContext

# (settings, context) -> task. The settings are QuestionArgs or a subclass, such as TaskArgs.
Builder = Callable[..., "AnyTask"]


def _lazy(module: str) -> Builder:
    """Returns the function `build` of a module that is imported on the first call.

    The tasks import JAX, which takes seconds, but a wrong setting should be reported at once.
    """

    def build(settings: "QuestionArgs", context: "TaskContext") -> "AnyTask":
        return importlib.import_module(module).build(settings, context)

    return build


# Tasks are scored and shown in this order.
TASKS: dict[str, Builder] = {
    "text": _lazy("qlora_jax.evaluation.tasks.text"),
    "choices": _lazy("qlora_jax.evaluation.tasks.choices"),
    "letters": _lazy("qlora_jax.evaluation.tasks.letters"),
    "labels": _lazy("qlora_jax.evaluation.tasks.labels"),
    "answers": _lazy("qlora_jax.evaluation.tasks.answers"),
    "programs": _lazy("qlora_jax.evaluation.tasks.programs"),
    "rows": _lazy("qlora_jax.evaluation.tasks.rows"),
    "pairs": _lazy("qlora_jax.evaluation.tasks.pairs"),
    "embeddings": _lazy("qlora_jax.evaluation.tasks.embeddings"),
    "harness": _lazy("qlora_jax.evaluation.lm_eval.task"),
}


def check_files(settings: "QuestionArgs") -> None:
    """Raises ValueError for a task's file that does not exist; called before a model is opened, or fetched."""
    paths = [path for name in TASKS if isinstance(path := getattr(settings, name, None), str)]
    for path in paths:
        if not Path(path).exists():
            next(stream_rows(path), None)


def build_tasks(settings: "QuestionArgs", context: "TaskContext") -> "list[AnyTask]":
    """Builds a task for each input that the settings name, in the order of the table.

    Raises:
      ValueError: rows that do not match the task or are too long for the model; the message lists all of the first
        file that has any.
    """
    return [build(settings, context) for name, build in TASKS.items() if getattr(settings, name, None) is not None]
