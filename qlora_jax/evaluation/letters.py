"""Multiple choice by letter, as MMLU is scored: the options stand in the prompt, the likeliest letter is the answer.

Dimension key: B prompts of a batch, T positions, M = B T, D embed, V vocab, K letters.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from qlora_jax.evaluation.batches import Batch, batches_by_length, stacked
from qlora_jax.inference.lowering import Ahead, lowered
from qlora_jax.inference.result_cache import NOTHING_KEPT, Kept
from qlora_jax.models.partition import ModelParts, combine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lettered:
    """One question: its prompt's ids, the ids of the letters that may follow, and which of those is right."""

    ids: Int32[np.ndarray, "_"]
    letters: Sequence[int]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LetterScores:
    """Which questions a model has right: the right letter's logit is above all others'; tied where it is shared."""

    right: Bool[np.ndarray, " questions"]
    tied: Bool[np.ndarray, " questions"]


def letter_scores(
    parts: ModelParts,
    questions: Sequence[Lettered],
    progress: Callable[[int], None] = lambda questions_done: None,
    kept: Kept = NOTHING_KEPT,
) -> LetterScores:
    """The scores of each question, from f32 logits after its prompt."""
    right, tied, done = np.zeros(len(questions), bool), np.zeros(len(questions), bool), 0
    for batch in batches_by_length([len(question.ids) for question in questions]):
        asked = [questions[index] for index in batch.rows]
        inputs = _inputs(batch, questions)
        (logits_BK,) = kept.result(inputs, lambda inputs=inputs: [_letter_logits(parts, *inputs)])
        for index, question, logits_K in zip(batch.rows, asked, logits_BK, strict=False):
            lead = _lead(logits_K[: len(question.letters)], question.answer)
            right[index], tied[index] = lead > 0, lead == 0
        done += len(asked)
        progress(done)
    return LetterScores(right=right, tied=tied)


def _inputs(batch: Batch, questions: Sequence[Lettered]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, the place of each row's last one, and the letters that may follow, as many as any question has."""
    asked, most = [questions[index] for index in batch.rows], max(len(question.letters) for question in questions)
    tokens_BT, last_B = stacked(batch, [question.ids for question in asked]), np.zeros(batch.size, np.int32)
    last_B[: len(asked)] = [len(question.ids) - 1 for question in asked]
    letters_BK = np.zeros((batch.size, most), np.int32)
    for place, question in enumerate(asked):
        letters_BK[place, : len(question.letters)] = question.letters
    return tokens_BT, last_B, letters_BK


def letters_ahead(parts: ModelParts, questions: Sequence[Lettered]) -> Iterator[Ahead]:
    """The programs of the batch of the most positions and of that of the most rows, each of which has logits."""
    batches = batches_by_length([len(question.ids) for question in questions])
    largest = max(batches, key=lambda batch: batch.positions), max(batches, key=lambda batch: batch.size)
    for batch in {batch.shape: batch for batch in largest}.values():
        yield lowered(batch.shape, _letter_logits, parts, _inputs(batch, questions))


def _lead(logits_K: np.ndarray, answer: int) -> float:
    return float(logits_K[answer] - np.delete(logits_K, answer).max())


@jax.jit
def _letter_logits(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    last_B: Int[Array, " B"],
    letters_BK: Int[Array, "B K"],
) -> Float[Array, "B K"]:
    """f32 logits of the letters after place `last` of each row."""
    model = combine(parts)
    rows, length = tokens_BT.shape
    logits_BV = model.head.logits(model.hidden(tokens_BT)[jnp.arange(rows) * length + last_B])
    return jnp.take_along_axis(logits_BV, letters_BK, axis=1)


def mean_over_subjects(right: Bool[np.ndarray, " questions"], subjects: Sequence[str]) -> float:
    """The unweighted mean of the subjects' shares of right answers."""
    names = np.array(subjects)
    return float(np.mean([right[names == name].mean() for name in sorted(set(subjects))]))
