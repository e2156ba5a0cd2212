"""Scores of replies."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.evaluation.tasks.answer_matching import extract_answer
from qlora_jax.studies.variance.questions import Question
from qlora_jax.studies.variance.replies import Observed
from qlora_jax.studies.variance.settings import Measure

TITLES: dict[Measure, str] = {
    "answer": "right answers (0 or 1)",
    "likelihood": "log likelihood of the answer, nats per token",
    "length": "length of the reply, tokens",
    "judge": "the judge's preference for the reply over that of the first model, from -1 to 1",
}


def score(
    measure: Measure, observed: Observed, questions: Sequence[Question], pattern: str | None
) -> Float64[np.ndarray, " prompts"]:
    """The score of each reply.

    Args:
      pattern: finds the answer in a reply, see `extract_answer`.
    """
    match measure:
        case "answer":
            pairs = zip(observed.replies, questions, strict=True)
            return np.array([_is_right(reply["reply"], question, pattern) for reply, question in pairs], np.float64)
        case "length":
            return np.array([reply["tokens"] for reply in observed.replies], np.float64)
        case "likelihood":
            assert observed.likelihood is not None
            return observed.likelihood
        case "judge":
            assert observed.preference is not None
            return observed.preference


def _is_right(reply: str, question: Question, pattern: str | None) -> bool:
    found = extract_answer(reply, pattern)
    return found is not None and found in [extract_answer(answer, pattern) for answer in question.answers]
