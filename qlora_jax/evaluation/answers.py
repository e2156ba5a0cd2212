"""Questions whose answer is a text: whether a greedy reply is it."""

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Bool

from qlora_jax.inference.decode import Reply
from qlora_jax.inference.replies import greedy_replies
from qlora_jax.inference.result_cache import Kept
from qlora_jax.models.partition import ModelParts

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One question: its prompt's ids, and the texts that are right, as `normalised` gives them."""

    ids: Sequence[int]
    answers: Collection[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """What is right, in which replies no answer was found, and which were cut off: by max_new_tokens, or where the
    model has no position left."""

    right: Bool[np.ndarray, " questions"]
    unanswered: Bool[np.ndarray, " questions"]
    cut: Bool[np.ndarray, " questions"]


def normalised(text: str, pattern: re.Pattern | None) -> str | None:
    """The answer in a text: without a pattern all of it, without white space around it.

    With one, what the last match holds: its first group that took part, or all of it where it has none; without white
    space around it, commas between thousands, and a full stop at its end. None where nothing matches.
    """
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = next((group for group in matches[-1].groups() if group is not None), matches[-1].group())
    return _THOUSANDS.sub("", found.strip()).removesuffix(".")


def answer_replies(
    parts: ModelParts,
    questions: Sequence[Asked],
    *,
    decode: Callable[[Sequence[int]], str],
    pattern: re.Pattern | None,
    max_new_tokens: int,
    stop_ids: Collection[int],
    progress: Callable[[int], None],
    kept: Kept,
) -> AnswerScores:
    """The scores of a model's greedy replies.

    Args:
      decode: the text of a reply's ids.
    """
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    prompts = [question.ids for question in questions]
    replies = greedy_replies(parts, prompts, **limits, progress=progress, kept=kept)
    return judged(replies, questions, lambda reply: normalised(decode(reply.ids), pattern))


def judged(replies: Sequence[Reply], questions: Sequence[Asked], read: Callable[[Reply], str | None]) -> AnswerScores:
    """The scores of replies, of which `read` gives the answer."""
    found = [read(reply) for reply in replies]
    return AnswerScores(
        right=np.array([text in asked.answers for text, asked in zip(found, questions, strict=True)], bool),
        unanswered=np.array([text is None for text in found], bool),
        cut=np.array([reply.end != "stop" for reply in replies], bool),
    )
