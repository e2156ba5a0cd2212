"""Chooses the next token from logits: greedy, or drawn after temperature, top-k and top-p, in that order.

Dimension key: B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; hashable, so that they can be a static argument of a jitted function.

    Attributes:
      temperature: divides the logits; 0 is greedy: the likeliest token, the first if several are equal.
      top_k: restricts draws to the k likeliest tokens; 0 for all.
      top_p: restricts draws to the smallest set of likeliest tokens whose probabilities reach p; 1 for all.
      seed: seed of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: found {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            problems.append(f"top_k: found {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: found {self.top_p}, expected more than 0 and at most 1")
        if problems:
            raise ValueError("; ".join(problems))


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
