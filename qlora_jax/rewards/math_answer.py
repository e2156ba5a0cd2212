"""A ready-made reward: the reply's last formula equals the answer, by math-verify (extra `math`)."""

from collections.abc import Sequence

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from qlora_jax.rewards.answers import Completion, text_of

_LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
)


def math_answer(
    completions: Sequence[Completion], answer: Sequence[object], **columns: object
) -> list[float | Exception | None]:
    """1 if the reply's formula in LaTeX equals the answer; None if the answer has no formula, as TRL's."""
    return [
        float(verify(right, parse(text_of(completion), extraction_config=[_LATEX], extraction_mode="first_match")))
        if (right := parse(str(given)))
        else None
        for completion, given in zip(completions, answer, strict=True)
    ]
