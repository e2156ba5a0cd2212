"""Asks a run's questions at every evaluation, and scores them like `evaluate` does."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pallas_kernels import aot
from qlora_jax import runtime
from qlora_jax.config import QuestionArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.registry import build_tasks
from qlora_jax.evaluation.task import AnyTask, TaskContext
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.model_source import ModelSource
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.metrics.eval_metrics import flatten_metrics


class QuestionMemory(NamedTuple):
    """Device memory that questions need in addition to the model and its state.

    Fields:
      size: bytes.
      program: the program that needs most.
    """

    size: int
    program: str


class Questions:
    """The questions of a run."""

    def __init__(self, tasks: Sequence[AnyTask]):
        self.tasks = tasks
        self._memory: QuestionMemory | None = None

    def metrics(self, parts: ModelParts, report: Callable[[str], None]) -> dict[str, float]:
        """Asks the questions and returns their metrics as in metrics.jsonl.

        Args:
          report: called with lines on the progress.
        """
        found: dict[str, float] = {}
        for task in self.tasks:

            def progress(done: int, task: AnyTask = task) -> None:
                report(f"{task.name}: {done} of {task.size}")

            scores = task.score(parts, progress, NO_CACHE)
            found |= flatten_metrics(task.name, task.metrics(scores))
        return found

    def memory(self, parts: ModelParts) -> QuestionMemory:
        """The most memory that any of their programs needs; compiles them on the first call.

        Args:
          parts: the run's model at any step, or ShapeDtypeStructs.
        """
        if self._memory is None:
            self._memory = max(self._memory_of_programs(parts))
            runtime.give_memory_back()
        return self._memory

    def _memory_of_programs(self, parts: ModelParts) -> Iterator[QuestionMemory]:
        for task in self.tasks:
            for program in task.lower(parts):
                memory = aot.read_memory(program.lowered.compile().memory_analysis()).device
                size = program.live_bytes + memory.temporaries + memory.outputs - memory.aliases
                yield QuestionMemory(size, f"questions.{task.name}, {program.shape}")


def open_questions(
    args: QuestionArgs, tokenizer: Tokenizer, source: ModelSource, max_positions: int
) -> Questions | None:
    """Reads the questions that a run's settings name; None if they name none.

    Raises:
      ValueError: rows that are not questions, or are too long for the model.
    """
    if not args.given:
        return None
    stop_ids = source.tokenizer["stop_token_ids"]
    return Questions(
        build_tasks(args, TaskContext(tokenizer=tokenizer, max_positions=max_positions, stop_ids=stop_ids))
    )
