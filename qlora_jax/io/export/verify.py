"""Compares the logits of an exported model with those of base and adapter, on fixed prompts.

Dimension key: B prompts, T tokens of the longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.models.partition import ModelParts, combine

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Frage: Wie viele Beine haben drei Spinnen? Antwort:",
)
# A merge is rejected if its error exceeds both of these shares: of what the adapter adds to the logits, and of the
# logits' standard deviation. Computing in 16 bits alone causes an error of about 2^-6 of the latter.
MAX_SHARE_OF_ADAPTER, MAX_SHARE_OF_LOGITS = 1 / 4, 1 / 16


class LogitDifference(NamedTuple):
    """The error of a merged model's logits over all prompt tokens, and the scales to judge it by.

    Attributes:
      largest: maximum absolute difference from the logits of base and adapter.
      rms: root mean square of that difference.
      adapter_largest: maximum absolute difference that the adapter makes to the base's logits.
      adapter_rms: root mean square of the adapter's difference.
      spread: standard deviation of the logits.
    """

    largest: float
    rms: float
    adapter_largest: float
    adapter_rms: float
    spread: float

    @property
    def is_small(self) -> bool:
        """True if the merged model computes what base and adapter compute."""
        return self.rms <= max(MAX_SHARE_OF_ADAPTER * self.adapter_rms, MAX_SHARE_OF_LOGITS * self.spread)

    def __str__(self) -> str:
        return (
            f"largest difference of its logits from those of base and adapter, on {len(PROMPTS)} prompts: "
            f"{self.largest:.3g} (rms {self.rms:.2g}); the adapter itself moves them by up to "
            f"{self.adapter_largest:.3g} (rms {self.adapter_rms:.2g})"
        )


class PromptBatch(NamedTuple):
    """Prompts in one array, padded on the right; `real_BT` is True at positions that hold a token."""

    tokens_BT: Int32[np.ndarray, "B T"]
    real_BT: Bool[np.ndarray, "B T"]


def tokenize_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> PromptBatch:
    """Tokenizes texts into one padded batch."""
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) for row in ids])
    real_BT = np.arange(lengths.max())[None] < lengths[:, None]
    tokens_BT = np.zeros(real_BT.shape, np.int32)
    tokens_BT[real_BT] = np.concatenate(ids)
    return PromptBatch(tokens_BT, real_BT)


def compare_logits(
    merged: Float[np.ndarray, "real V"], with_adapter: Float[np.ndarray, "real V"], without: Float[np.ndarray, "real V"]
) -> LogitDifference:
    """Computes how far a merged model's logits are from those of base and adapter."""
    off, added = merged - with_adapter, with_adapter - without
    largest, rms = (lambda x: float(np.max(np.abs(x)))), (lambda x: float(np.sqrt(np.mean(np.square(x)))))
    return LogitDifference(largest(off), rms(off), largest(added), rms(added), float(np.std(with_adapter)))


def prompt_logits(parts: ModelParts, prompts: PromptBatch) -> Float[np.ndarray, "real V"]:
    """Returns the f32 logits [real tokens, V] of a batch, without those of padding.

    A model with a sequence head has its outputs for each prompt instead, [B, C].
    """

    @jax.jit
    def logits(parts: ModelParts, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        model = combine(parts)
        hidden_MD = model.hidden(tokens_BT)
        if model.score is not None:
            return model.score(hidden_MD, (~real_BT).astype(jnp.int32), 1)[:, 0]
        return model.head.logits(hidden_MD)

    found = np.asarray(logits(parts, prompts.tokens_BT, prompts.real_BT))
    return found if len(found) == len(prompts.tokens_BT) else found[prompts.real_BT.reshape(-1)]
