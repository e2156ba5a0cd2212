"""Multiple choice by letter, as MMLU is scored: the options stand in the prompt, the likeliest letter is the answer.

Dimension key: B prompts of a batch, T positions, M = B T, D embed, V vocab, K letters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from qlora_jax.inference.scoring import batches_by_length
from qlora_jax.models.partition import Lora, combine


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
    graphdef: nnx.GraphDef,
    lora: Lora,
    base: nnx.State,
    questions: Sequence[Lettered],
    progress: Callable[[int], None] = lambda questions_done: None,
) -> LetterScores:
    """The scores of each question, from f32 logits after its prompt."""
    right, tied, done = np.zeros(len(questions), bool), np.zeros(len(questions), bool), 0
    for indices, tokens_BT in batches_by_length([question.ids for question in questions]):
        asked = [questions[index] for index in indices]
        last_B = np.zeros(len(tokens_BT), np.int32)
        last_B[: len(asked)] = [len(question.ids) - 1 for question in asked]
        logits_BV = np.asarray(_next_logits(graphdef, lora, base, tokens_BT, last_B))
        for index, question, logits_V in zip(indices, asked, logits_BV, strict=False):
            lead = _lead(logits_V[list(question.letters)], question.answer)
            right[index], tied[index] = lead > 0, lead == 0
        done += len(indices)
        progress(done)
    return LetterScores(right=right, tied=tied)


def _lead(logits_K: np.ndarray, answer: int) -> float:
    return float(logits_K[answer] - np.delete(logits_K, answer).max())


@partial(jax.jit, static_argnames="graphdef")
def _next_logits(
    graphdef: nnx.GraphDef, lora: Lora, base: nnx.State, tokens_BT: Int[Array, "B T"], last_B: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """f32 logits of what follows place `last` of each row."""
    model = combine(graphdef, lora, base)
    rows, length = tokens_BT.shape
    return model.head.logits(model.hidden(tokens_BT)[jnp.arange(rows) * length + last_B])


def mean_over_subjects(right: Bool[np.ndarray, " questions"], subjects: Sequence[str]) -> float:
    """The unweighted mean of the subjects' shares of right answers."""
    names = np.array(subjects)
    return float(np.mean([right[names == name].mean() for name in sorted(set(subjects))]))
