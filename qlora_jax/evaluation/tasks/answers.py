"""The task `answers`: questions with an exact answer, compared with the model's greedy reply."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from qlora_jax.answer_text import contains_words, extract_answer, words_f1
from qlora_jax.config import QUESTION_KINDS, QuestionArgs
from qlora_jax.config.question_settings import AnswerMatch
from qlora_jax.data.readers.files import shorten
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_reply_lengths, read_each, read_task_rows, values_of, wrong_value
from qlora_jax.inference.decode import Reply
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.prompts import Prompter, stop_ids
from qlora_jax.inference.replies import greedy_replies, lower_replies
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues, share, share_change, share_of_rows
from qlora_jax.measures.statistics import mean_change_interval, mean_interval
from qlora_jax.models.partition import ModelParts

NEXT_QUESTION = "\nQuestion:"  # a reply in plain text ends before this, which begins the next prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerQuestion:
    """One question: the ids of its prompt, and the answers that are right, extracted and normalized."""

    ids: Sequence[int]
    answers: Collection[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Grades of replies.

    Fields:
      right: the reply equals an answer.
      unanswered: no answer was found in the reply.
      cut_off: the reply ended because of max_new_tokens, or because the model has no position left.
      contains: the words of an answer occur in the reply.
      f1: the largest F1 of the reply's words and those of an answer.
    """

    right: Bool[np.ndarray, " questions"]
    unanswered: Bool[np.ndarray, " questions"]
    cut_off: Bool[np.ndarray, " questions"]
    contains: Bool[np.ndarray, " questions"]
    f1: Float64[np.ndarray, " questions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersTask:
    """Share of greedy replies that are exactly the answer; see evaluation/task.py for the members.

    Attributes:
      pattern: finds the answer in a text; None: the answer is the whole text.
      match: how an answer is compared.
      max_new_tokens: maximum tokens of a reply.
      stop_ids: ids that end a reply.
      until: text that also ends a reply, or None.
    """

    title: str
    questions: Sequence[AnswerQuestion]
    tokenizer: Tokenizer
    pattern: str | None
    max_new_tokens: int
    stop_ids: Collection[int]
    until: str | None
    match: AnswerMatch = "exact"
    name: str = "answers"

    @property
    def size(self) -> int:
        """The number of questions."""
        return len(self.questions)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each question's prompt, answers and stop ids."""
        return [[[*question.ids], sorted(question.answers), sorted(self.stop_ids)] for question in self.questions]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> AnswerScores:
        """Generates and grades one model's replies."""
        replies = greedy_replies(
            parts,
            [question.ids for question in self.questions],
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            progress=progress,
            cache=cache,
        )
        return grade_replies(
            replies, self.questions, lambda reply: extract_answer(self._text(reply.ids), self.pattern, self.match)
        )

    def metrics(self, scores: AnswerScores) -> list[Metric]:
        """The share of right replies, how near the words of the others are, and how many lack an answer or an end."""
        cut_off = Metric(f"replies cut off ({self.max_new_tokens} tokens)", "count", int(scores.cut_off.sum()))
        unanswered = Metric("no answer found (counted as wrong)", "count", int(scores.unanswered.sum()))
        return [
            share("exactly the answer", scores.right),
            *(self._word_metrics(scores) if self.match == "words" else []),
            *([unanswered] if self.pattern else []),
            cut_off,
        ]

    def compare(self, before: AnswerScores, after: AnswerScores) -> list[Comparison]:
        """The change of the share of right replies, and of how near the words of the others are."""
        changes = [share_change("exactly the answer", before.right, after.right)]
        if self.match == "words":
            differences = after.f1 - before.f1
            changes += [
                share_change("contains an answer", before.contains, after.contains),
                Comparison("F1 of words", "share", float(differences.mean()), mean_change_interval(differences)),
            ]
        return changes

    def row_values(self, scores: AnswerScores) -> dict[str, RowValues]:
        """The rows' parts of the measures in `MEASURES`."""
        return {"exactly the answer": share_of_rows(scores.right)}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batch."""
        return lower_replies(parts, [question.ids for question in self.questions], self.max_new_tokens)

    def _word_metrics(self, scores: AnswerScores) -> list[Metric]:
        return [
            share("contains an answer", scores.contains),
            Metric("F1 of words", "share", float(scores.f1.mean()), mean_interval(scores.f1)),
        ]

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode([*ids])
        return text if self.until is None else text.partition(self.until)[0]


def build(settings: QuestionArgs, context: TaskContext) -> AnswersTask:
    """Reads rows with the columns question (or prompt) and answer: a text, or a list of texts that are all right.

    Raises:
      ValueError: rows that are not questions, are too long, or have an answer without a match of the pattern; the
        message lists them.
    """
    assert settings.answers is not None
    path, pattern, match = settings.answers, settings.answer_pattern, settings.answer_match
    tokenizer = context.tokenizer
    chat = tokenizer.chat_template is not None
    prompter = Prompter(tokenizer=tokenizer, chat=chat, system=None)
    rows = read_task_rows(path, "answers", settings.file_columns, settings.max_rows)
    questions = read_each(path, rows, lambda row: _question(row.data, prompter, pattern, match))
    ids = [question.ids for question in questions]
    check_reply_lengths(path, rows, ids, settings.max_new_tokens, context.max_positions)
    read_by = "" if pattern is None else f", read by {pattern}"
    compared = "" if match == "exact" else f", compared by {match}"
    return AnswersTask(
        title=f"{path}: {len(rows)} questions, greedy replies{read_by}{compared}",
        questions=questions,
        tokenizer=tokenizer,
        pattern=pattern,
        match=match,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids(tokenizer, context.stop_ids, chat=chat),
        until=None if chat else NEXT_QUESTION,
    )


def grade_replies(
    replies: Sequence[Reply], questions: Sequence[AnswerQuestion], extract: Callable[[Reply], str | None]
) -> AnswerScores:
    """Grades replies; `extract` returns the answer in a reply, or None."""
    found = [extract(reply) for reply in replies]
    pairs = [(text or "", question.answers) for text, question in zip(found, questions, strict=True)]
    return AnswerScores(
        right=np.array([text in question.answers for text, question in zip(found, questions, strict=True)], bool),
        unanswered=np.array([text is None for text in found], bool),
        cut_off=np.array([reply.end != "stop" for reply in replies], bool),
        contains=np.array([any(contains_words(text, one) for one in answers) for text, answers in pairs], bool),
        f1=np.array([max(words_f1(text, one) for one in answers) for text, answers in pairs], np.float64),
    )


def _question(
    columns: Mapping[str, object], prompter: Prompter, pattern: str | None, match: AnswerMatch
) -> AnswerQuestion:
    question, answer = values_of(columns, QUESTION_KINDS["answers"].columns)
    if not isinstance(question, str):
        raise wrong_value("question", question, "a text")
    given = answer if isinstance(answer, list) else [answer]
    texts = [text for text in given if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(given):
        raise wrong_value("answer", answer, 'a text or a list of texts, none empty; a number in quotes ("4")')
    answers = [extract_answer(text, pattern, match) for text in texts]
    if pattern is not None and None in answers:
        raise ValueError(f"answer: no match of answer_pattern {pattern!r} (found {shorten(repr(answer))})")
    return AnswerQuestion(
        ids=_prompt(question, prompter), answers=frozenset(answer for answer in answers if answer is not None)
    )


def _prompt(question: str, prompter: Prompter) -> list[int]:
    if prompter.chat:
        return prompter.conversation([{"role": "user", "content": question}])
    return prompter.text(f"Question: {question}\nAnswer:")
