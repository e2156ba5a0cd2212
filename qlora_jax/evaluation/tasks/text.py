"""The task `text`: perplexity of a text in windows."""

import dataclasses
from collections.abc import Iterator, Sequence

from qlora_jax.data.readers.files import read_text
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds, lower_scoring, score_rows, windows
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowScores, RowValues, loss_change, loss_metrics, loss_of_rows
from qlora_jax.models.partition import ModelParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """Perplexity of windows of a text; see evaluation/task.py for the members."""

    title: str
    rows: Sequence[ScoredIds]
    name: str = "text"

    @property
    def size(self) -> int:
        """The number of windows."""
        return len(self.rows)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each window's ids, and the mask of the scored ones."""
        return self.rows

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> RowScores:
        """Scores one model on each window."""
        return score_rows(parts, self.rows, progress, cache)

    def metrics(self, scores: RowScores) -> list[Metric]:
        """Perplexity and loss."""
        return loss_metrics(scores)

    def compare(self, before: RowScores, after: RowScores) -> list[Comparison]:
        """The change of the loss."""
        return [loss_change(before, after)]

    def row_values(self, scores: RowScores) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {"loss per token": loss_of_rows(scores)}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batches."""
        return lower_scoring(parts, self.rows)


def build(settings: TaskArgs, context: TaskContext) -> TextTask:
    """Builds the task that the settings describe."""
    assert settings.text is not None
    return text_task(
        settings.text,
        context.tokenizer,
        window=settings.window,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
        max_positions=context.max_positions,
    )


def text_task(
    path: str, tokenizer: Tokenizer, *, window: int, stride: int | None, max_tokens: int | None, max_positions: int
) -> TextTask:
    """Splits the text of a file into windows; no special tokens are added.

    Each token is scored once, in the first window that contains it.

    Args:
      window: tokens per window.
      stride: tokens from the start of a window to the start of the next; None: `window`, no overlap.
      max_tokens: use only the first tokens of the text; None: all.

    Raises:
      ValueError: the window is too long for the model, or the text has fewer than two tokens.
    """
    if window > max_positions:
        raise ValueError(f"window: too long (found {window}; the model has {max_positions} positions). Reduce --window")
    text = read_text(path)
    try:
        ids = tokenizer.encode(text)[:max_tokens]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(ids) < 2:
        raise ValueError(f"{path}: found {len(ids)} tokens to score, expected at least 2")
    rows = windows(ids, window, stride)
    scored = sum(int(mask[1:].sum()) for _, mask in rows)
    overlap = "" if stride is None else f", {stride} apart"
    return TextTask(title=f"{path}: {len(rows)} windows of {window} tokens{overlap}, {scored:,} scored", rows=rows)
