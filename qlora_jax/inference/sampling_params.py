"""Settings by which the next token is chosen; `engine.token_sampler` chooses it."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; hashable, so that they can be a static argument of a jitted function.

    Penalties and biases change the logits first. Then the temperature divides them, and filters drop tokens: top-k,
    top-p, min-p, in that order.

    Attributes:
      temperature: divides the logits; 0 is greedy: the likeliest token, the first if several are equal.
      top_k: restricts draws to the k likeliest tokens; 0 for all.
      top_p: restricts draws to the smallest set of likeliest tokens whose probabilities reach p; 1 for all.
      min_p: restricts draws to tokens with at least this share of the likeliest token's probability; 0 for all.
      repetition_penalty: divides positive logits of tokens of the prompt and the reply, and multiplies negative ones,
        as transformers' RepetitionPenaltyLogitsProcessor; 1 changes nothing.
      presence_penalty: is subtracted from the logits of the reply's tokens, as in OpenAI's API.
      frequency_penalty: is subtracted from a token's logit for each time that the reply has it, as in OpenAI's API.
      logit_bias: (id, value) of each token whose logit gets a value added.
      seed: seed of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        problems = [
            f"{name}: found {getattr(self, name)}, expected {expected}"
            for name, (holds, expected) in _BOUNDS.items()
            if not holds(getattr(self, name))
        ]
        if problems := problems + _bias_problems(self.logit_bias):
            raise ValueError("; ".join(problems))


_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < float("inf"), "0 (greedy) or more"),
    "top_k": (lambda value: value >= 0, "0 (all tokens) or more"),
    "top_p": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "0 (all tokens) to 1"),
    "repetition_penalty": (lambda value: 1e-6 <= value <= 1e6, "1e-6 to 1e6; 1 changes nothing"),
    "presence_penalty": (math.isfinite, "a finite number"),
    "frequency_penalty": (math.isfinite, "a finite number"),
}


def _bias_problems(biases: Sequence[tuple[int, float]]) -> list[str]:
    counts = collections.Counter(token for token, _ in biases)
    problems = [f"logit_bias: found id {token}, expected 0 or more" for token in counts if token < 0]
    problems += [f"logit_bias: found {count} values for id {token}" for token, count in counts.items() if count > 1]
    return problems + [
        f"logit_bias: found {value} for id {token}, expected a finite number"
        for token, value in biases
        if not math.isfinite(value)
    ]


GREEDY = Sampling()
