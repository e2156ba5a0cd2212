"""What a model answers while it trains: the same questions at every evaluation, scored as `evaluate` scores them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pallas_kernels import aot
from qlora_jax import runtime
from qlora_jax.config import QuestionArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.tasks.registry import QuestionTask, question_tasks
from qlora_jax.inference.result_cache import NOTHING_KEPT
from qlora_jax.io.model_source import ModelSource
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.eval_metrics import flatten_metrics


class QuestionMemory(NamedTuple):
    """What questions take of the device beside the model and its state.

    Fields:
      size: bytes.
      words: in which program.
    """

    size: int
    words: str


class Questions:
    """The questions of a run."""

    def __init__(self, tasks: Sequence[QuestionTask]):
        self.tasks = tasks
        self._need: QuestionMemory | None = None

    def metrics(self, parts: ModelParts, told: Callable[[str], None]) -> dict[str, float]:
        """What a record says of one model's answers; `told` hears how far it is."""
        found: dict[str, float] = {}
        for task in self.tasks:

            def progress(done: int, task: QuestionTask = task) -> None:
                told(f"{task.name}: {done} of {task.size}")

            scores: Any = task.score(parts, progress, NOTHING_KEPT)  # of the task's own kind
            found |= flatten_metrics(task.name, task.measures(scores))
        return found

    def memory(self, parts: ModelParts) -> QuestionMemory:
        """The most that any of their programs takes, compiled for this device the first time that it is asked for.

        Args:
          parts: of the run's model, at any step, or its shapes alone.
        """
        if self._need is None:
            self._need = max(self._needs(parts))
            runtime.give_memory_back()
        return self._need

    def _needs(self, parts: ModelParts) -> Iterator[QuestionMemory]:
        for task in self.tasks:
            for ahead in task.ahead(parts):
                memory = aot.read_memory(ahead.lowered.compile().memory_analysis()).device
                taken = ahead.held + memory.temporaries + memory.outputs - memory.aliases
                yield QuestionMemory(taken, f"questions.{task.name}, {ahead.shape}")


def open_questions(
    args: QuestionArgs, tokenizer: Tokenizer, source: ModelSource, max_positions: int
) -> Questions | None:
    """The questions that a run's settings name; None where they name none.

    Raises:
      ValueError: rows that are no such questions, or too long for the model.
    """
    if not args.given:
        return None
    stops = source.tokenizer["stop_token_ids"]
    return Questions(question_tasks(args, tokenizer, named_stop_ids=stops, max_positions=max_positions))
