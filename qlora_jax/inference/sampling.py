"""Chooses the next token from logits: greedy, or drawn after temperature, top-k and top-p, in that order.

Dimension key: B batch, V vocab.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


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
    "repetition_penalty": (lambda value: 0 < value < float("inf"), "more than 0; 1 changes nothing"),
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


def keep_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the k largest logits of each row to -inf; logits equal to the k-th stay."""
    largest_BK, _ = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
    return jnp.where(logits_BV >= largest_BK[:, -1:], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Sets all logits to -inf except the fewest largest whose probabilities sum to at least p.

    Equal logits stay together, and at least one token stays.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # The likeliest token stays, whatever the rounding of `before`.
    kept_BV = (before_BV < p).at[:, 0].set(True)
    threshold_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits that tokens are drawn from: divided by the temperature, then filtered by top-k, then by top-p."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV


def choose(logits_BV: Float[Array, "B V"], keys_B: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """Chooses the next token of each row; a row's draw depends only on its key and logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)
