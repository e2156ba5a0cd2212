"""Questions with exact answers as a task, and from files."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.config.question_settings import FILE_COLUMNS
from qlora_jax.data.readers.files import raise_problems, shorten
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.answers import AnswerScores, Asked, answer_replies, normalised
from qlora_jax.evaluation.columns import found, read_each, read_named, values_of
from qlora_jax.evaluation.metrics import Comparison, Measure, Progress, share, share_change
from qlora_jax.inference.lowering import Ahead
from qlora_jax.inference.prompts import Prompter, stop_ids
from qlora_jax.inference.replies import replies_ahead
from qlora_jax.inference.result_cache import Kept
from qlora_jax.models.partition import ModelParts

NEXT_QUESTION = "\nQuestion:"  # where a reply in plain text ends, as the prompt begins


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersTask:
    """The share of greedy replies that are exactly the answer.

    Attributes:
      pattern: what finds the answer in a text; None: it is the whole text.
      until: a reply ends before this text too.
    """

    title: str
    questions: Sequence[Asked]
    tokenizer: Tokenizer
    pattern: re.Pattern | None
    max_new_tokens: int
    stop_ids: Collection[int]
    until: str | None
    name: str = "answers"

    @property
    def size(self) -> int:
        """Rows that `score` reports as done, in all."""
        return len(self.questions)

    @property
    def asked(self) -> list[list[Any]]:
        """Of each question, all that its score follows from beside the model."""
        return [[[*one.ids], sorted(one.answers), sorted(self.stop_ids)] for one in self.questions]

    def score(self, parts: ModelParts, progress: Progress, kept: Kept) -> AnswerScores:
        """The scores of one model."""
        limits = {"max_new_tokens": self.max_new_tokens, "stop_ids": self.stop_ids}
        how = {"decode": self._text, "pattern": self.pattern, **limits}
        return answer_replies(parts, self.questions, **how, progress=progress, kept=kept)

    def ahead(self, parts: ModelParts) -> Iterator[Ahead]:
        """The programs of `score` that want most memory."""
        return replies_ahead(parts, [question.ids for question in self.questions], self.max_new_tokens)

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode([*ids])
        return text if self.until is None else text.partition(self.until)[0]

    def measures(self, scores: AnswerScores) -> list[Measure]:
        """What the scores say."""
        cut = Measure(f"replies cut off ({self.max_new_tokens} tokens)", "count", int(scores.cut.sum()))
        unanswered = Measure("no answer found (counted as wrong)", "count", int(scores.unanswered.sum()))
        return [share("exactly the answer", scores.right), *([unanswered] if self.pattern else []), cut]

    def compare(self, before: AnswerScores, after: AnswerScores) -> list[Comparison]:
        """What changed from one model to another."""
        return [share_change("exactly the answer", before.right, after.right)]


def answers_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    named_stop_ids: Collection[int],
    pattern: str | None,
    max_new_tokens: int,
    max_rows: int | None,
    max_positions: int,
    named: Mapping[str, str] | None = None,
) -> AnswersTask:
    """The questions of a file: rows of question (or prompt) and answer, a text or a list of texts that are all right.

    Args:
      named: see `columns.read_named`.

    Raises:
      ValueError: rows that are something else, too long, or in whose answer the pattern finds nothing: all of them.
    """
    finder = None if pattern is None else re.compile(pattern)
    chat = tokenizer.chat_template is not None
    prompter = Prompter(tokenizer=tokenizer, chat=chat, system=None)
    rows = read_named(path, "answers", named, max_rows)
    questions = read_each(path, rows, lambda row: _asked(row.data, prompter, finder))
    problems = [
        (row.place, f"{len(asked.ids)} tokens and {max_new_tokens} of a reply, and the model has {max_positions}")
        for row, asked in zip(rows, questions, strict=True)
        if len(asked.ids) + max_new_tokens > max_positions
    ]
    raise_problems(path, problems, len(rows))
    return AnswersTask(
        title=f"{path}: {len(rows)} questions, greedy replies" + ("" if pattern is None else f", read by {pattern}"),
        questions=questions,
        tokenizer=tokenizer,
        pattern=finder,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer, named_stop_ids, chat=chat),
        until=None if chat else NEXT_QUESTION,
    )


def _asked(columns: Mapping[str, Any], prompter: Prompter, pattern: re.Pattern | None) -> Asked:
    question, answer = values_of(columns, FILE_COLUMNS["answers"])
    if not isinstance(question, str):
        raise found("question", question, "a text")
    given = answer if isinstance(answer, list) else [answer]
    texts = [text for text in given if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(given):
        raise found("answer", answer, 'a text or a list of texts, none empty, a number in quotes ("4")')
    answers = [normalised(text, pattern) for text in texts]
    if pattern is not None and None in answers:
        raise ValueError(f"answer_pattern {pattern.pattern!r} finds nothing in the answer {shorten(repr(answer))}")
    return Asked(ids=_prompt(question, prompter), answers=frozenset(answer for answer in answers if answer is not None))


def _prompt(question: str, prompter: Prompter) -> list[int]:
    if prompter.chat:
        return prompter.conversation([{"role": "user", "content": question}])
    return prompter.text(f"Question: {question}\nAnswer:")
