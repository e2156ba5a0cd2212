"""Asks a run's questions and samples replies at every evaluation; questions are scored as `evaluate` does."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.config import QuestionArgs
from qlora_jax.config.schema import TrainArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.registry import build_tasks
from qlora_jax.evaluation.task import AnyTask, TaskContext
from qlora_jax.inference.decode import generate
from qlora_jax.inference.lowering import ProgramMemory, most_memory
from qlora_jax.inference.prompts import encode_prompts, prompter, read_prompts, stop_ids
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.model_source import ModelSource
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.step_metrics import flatten_metrics


class Questions:
    """The questions of a run."""

    def __init__(self, tasks: Sequence[AnyTask]):
        self.tasks = tasks
        self._memory: ProgramMemory | None = None

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

    def memory(self, parts: ModelParts) -> ProgramMemory:
        """The most memory that any of their programs needs; compiles them on the first call.

        Args:
          parts: the run's model at any step, or ShapeDtypeStructs.
        """
        if self._memory is None:
            self._memory = max(most_memory(f"questions.{task.name}", task.lower(parts)) for task in self.tasks)
        return self._memory


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts that are answered greedily, so that the replies of two steps differ only by what was learned.

    Attributes:
      rows: the rows of the prompts' file.
      ids: the token ids of each prompt.
      stops: the ids that end a reply.
      max_new_tokens: the maximum length of a reply.
    """

    rows: Sequence[Mapping[str, object]]
    ids: Sequence[list[int]]
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_new_tokens: int

    def replies(self, parts: ModelParts, step: int) -> list[Record]:
        """Returns a record per prompt: `step`, `prompt` (its columns), `reply`, and `end` (why the reply ended)."""
        replies = generate(
            parts, self.ids, sampling=Sampling(), max_new_tokens=self.max_new_tokens, stop_ids=self.stops
        )
        return [
            {"step": step, "prompt": row, "reply": self.tokenizer.decode(reply.ids), "end": reply.end}
            for row, reply in zip(self.rows, replies, strict=True)
        ]


def open_samples(train: TrainArgs, tokenizer: Tokenizer, source: ModelSource, max_positions: int) -> Samples | None:
    """Opens the prompts of `train.samples`; returns None if it is not set.

    Raises:
      ValueError: rows that are not prompts, or that leave no positions for a reply; lists all of them.
    """
    if train.samples is None:
        return None
    asking = prompter(tokenizer, raw=False, system=None)
    rows = read_prompts(train.samples)
    return Samples(
        rows=[row.data for row in rows],
        ids=encode_prompts(train.samples, rows, asking, max_positions),
        tokenizer=tokenizer,
        stops=stop_ids(tokenizer, source.tokenizer["stop_token_ids"], chat=asking.chat),
        max_new_tokens=train.sample_tokens,
    )
