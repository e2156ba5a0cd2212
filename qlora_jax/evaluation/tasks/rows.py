"""The task `rows`: loss of the answers in rows of training data, and whether greedy decoding generates them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.encoder import check_rows, encode_rows, expand_examples
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import OPTIONAL_COLUMNS
from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.token_spans import encode_segments
from qlora_jax.data.readers.files import Problem, Row, raise_problems
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_lengths, groups_by, read_task_rows
from qlora_jax.evaluation.tasks.text import TextTask
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import (
    Comparison,
    Metric,
    RowScores,
    RowValues,
    loss_change,
    loss_metrics,
    loss_of_rows,
    share,
    share_change,
    share_of_rows,
)
from qlora_jax.models.partition import ModelParts

_SEVERAL_TEXTS = (
    "the chat template writes a turn differently in later prompts, so the row's turns are in several texts, which "
    "answer_start does not apply to. Remove answer_start, or split the row into one per answer"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsTask(TextTask):
    """Loss of answers, and whether greedy decoding generates them; scored as a text's windows are.

    Attributes:
      rows: the texts to score. A row whose turns are in several texts has several.
      row_of_text: the index of the row that each text belongs to, ascending; None: each text is a row.
      groups: the indices of the rows of each group, by its description; their losses are also reported one by one.
    """

    name: str = "rows"
    row_of_text: Int64[np.ndarray, "_"] | None = None
    groups: Mapping[str, Int64[np.ndarray, "_"]] = dataclasses.field(default_factory=dict)

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> RowScores:
        """Scores one model on each row."""
        scores = super().score(parts, progress, cache)
        return scores if self.row_of_text is None else joined_scores(scores, self.row_of_text)

    def metrics(self, scores: RowScores) -> list[Metric]:
        """Perplexity, loss, the shares of rows whose answer greedy decoding generates, and the loss of each group."""
        return [
            *loss_metrics(scores),
            share("begins with the answer", scores.begins),
            share("is exactly the answer", scores.exact),
            *(
                metric._replace(name=f"{metric.name}, {group}")
                for group, rows in self.groups.items()
                for metric in loss_metrics(scores.of(rows))[1:]
            ),
        ]

    def compare(self, before: RowScores, after: RowScores) -> list[Comparison]:
        """The changes of the loss, of both shares, and of the loss of each group."""
        return [
            loss_change(before, after),
            share_change("begins with the answer", before.begins, after.begins),
            share_change("is exactly the answer", before.exact, after.exact),
            *(
                change._replace(name=f"{change.name}, {group}")
                for group, rows in self.groups.items()
                for change in [loss_change(before.of(rows), after.of(rows))]
            ),
        ]

    def row_values(self, scores: RowScores) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {
            "loss per token": loss_of_rows(scores),
            "begins with the answer": share_of_rows(scores.begins),
            "is exactly the answer": share_of_rows(scores.exact),
        }


def build(settings: TaskArgs, context: TaskContext) -> RowsTask:
    """Builds the task that the settings describe."""
    assert settings.rows is not None
    return rows_task(
        settings.rows,
        context.tokenizer,
        max_rows=settings.max_rows,
        max_positions=context.max_positions,
        answer_start=settings.answer_start,
        by=settings.by,
        file_columns=settings.file_columns,
    )


def rows_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    max_rows: int | None,
    max_positions: int,
    answer_start: str | None = None,
    by: str | None = None,
    file_columns: Mapping[str, str] | None = None,
) -> RowsTask:
    """Reads rows in a format of training data; the tokens that training would learn are scored.

    Args:
      answer_start: how every answer begins; it is given to the model, and only what follows it is scored.
      by: column whose values group the rows; None: no groups.
      file_columns: see `task_file.read_task_rows`.

    Raises:
      ValueError: rows that cannot be scored; the message lists them.
    """
    rows: Sequence[Row] = read_task_rows(path, "rows", file_columns, max_rows, OPTIONAL_COLUMNS)
    row_format = detect_format(path, rows, names=file_columns, setting="file_columns")
    check_rows(path, rows, row_format)
    rows, row_format = expand_examples(rows, row_format)
    encoded = encode_rows(path, rows, row_format, tokenizer)
    scored = [whole_texts(row.ids, row.supervised, row.branches) for row in encoded]
    texts, title = sum(map(len, scored)), f"{path}: answers of {len(rows)} rows"
    if texts > len(rows):
        title += f" in {texts} texts"
    if answer_start is not None:
        several = [(row.place, _SEVERAL_TEXTS) for row, one in zip(rows, encoded, strict=True) if one.branches]
        raise_problems(path, several, len(rows))
        scored = _after_start(path, rows, [text for (text,) in scored], tokenizer, answer_start)
        title += f", after {answer_start!r}"
    check_lengths(path, rows, scored, max_positions)
    return RowsTask(
        title=title,
        rows=[text for one in scored for text in one],
        row_of_text=np.repeat(np.arange(len(rows)), [*map(len, scored)]) if texts > len(rows) else None,
        groups={} if by is None else groups_by(path, rows, by),
    )


def joined_scores(scores: RowScores, row_of_text: Int64[np.ndarray, "_"]) -> RowScores:
    """Returns the scores of rows from those of their texts. A row's answers are exact if those of all its texts are."""
    first = np.flatnonzero(np.diff(row_of_text, prepend=-1))
    return RowScores(
        nll=np.add.reduceat(scores.nll, first),
        tokens=np.add.reduceat(scores.tokens, first),
        exact=np.logical_and.reduceat(scores.exact, first),
        begins=np.logical_and.reduceat(scores.begins, first),
    )


def _after_start(
    path: str, rows: Sequence[Row], scored: Sequence[ScoredIds], tokenizer: Tokenizer, answer_start: str
) -> list[list[ScoredIds]]:
    """The rows with the tokens of `answer_start`, with which each answer must begin, not scored."""
    start = np.array(tokenizer.encode(answer_start), np.int32)
    after: list[list[ScoredIds]] = []
    problems: list[Problem] = []
    for row, (ids, supervised) in zip(rows, scored, strict=True):
        answer_positions = np.flatnonzero(supervised)[: len(start)]
        if not np.array_equal(ids[answer_positions], start):
            beginning = tokenizer.decode(ids[answer_positions].tolist())
            problems.append((row.place, f"the answer begins with {beginning!r}, expected {answer_start!r}"))
        rest = supervised.copy()
        rest[answer_positions] = False
        after.append([(ids, rest)])
    raise_problems(path, problems, len(rows))
    return after


def encode_continuations(
    question: str, plain_prompt: str, options: Sequence[str], tokenizer: Tokenizer
) -> list[ScoredIds]:
    """Encodes each option as the reply to `question`; without a chat template, after `plain_prompt` and a space."""
    if tokenizer.chat_template is None:
        prompt, replies = plain_prompt, [f" {option}" for option in options]
    else:
        messages = [{"role": "user", "content": question}]
        prompt, replies = tokenizer.render(messages, add_generation_prompt=True), options
    # A chat template writes bos itself.
    bos = [tokenizer.bos_id] if tokenizer.add_bos_token and tokenizer.chat_template is None else []
    encodings = tokenizer.encode_spans([prompt + reply for reply in replies])
    encoded = [
        encode_segments(tokenizer, [Segment(prompt, False), Segment(reply, True)], encoding)
        for reply, encoding in zip(replies, encodings, strict=True)
    ]
    return [
        (np.array([*bos, *row.ids], np.int32), np.concatenate([np.zeros(len(bos), bool), row.supervised]))
        for row in encoded
    ]
