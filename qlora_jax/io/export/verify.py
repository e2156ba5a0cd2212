"""How far the logits of an exported model are from those of base and adapter, on real prompts.

Dimension key: B prompts, T tokens of the longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.models.partition import ModelParts, combine

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Frage: Wie viele Beine haben drei Spinnen? Antwort:",
)
# A merge is refused where it is off by more than this share of what the adapter does, and of the logits themselves;
# 16-bit computation alone makes some 2^-6 of the latter.
OF_ADAPTER, OF_LOGITS = 1 / 4, 1 / 16


class Difference(NamedTuple):
    """Of logits, over all tokens of the prompts: how far the merge is off, and what there is to be off from.

    Fields:
      largest: of the merge's, from those of base and adapter; rms likewise.
      adapter_largest, adapter_rms: of what the adapter adds to the base's.
      spread: standard deviation of the logits.
    """

    largest: float
    rms: float
    adapter_largest: float
    adapter_rms: float
    spread: float

    @property
    def is_small(self) -> bool:
        """Whether the merge does what base and adapter do."""
        return self.rms <= max(OF_ADAPTER * self.adapter_rms, OF_LOGITS * self.spread)

    def __str__(self) -> str:
        return (
            f"largest difference of its logits from those of base and adapter, on {len(PROMPTS)} prompts: "
            f"{self.largest:.3g} (rms {self.rms:.2g}); the adapter itself moves them by up to "
            f"{self.adapter_largest:.3g} (rms {self.adapter_rms:.2g})"
        )


class Prompts(NamedTuple):
    """Prompts in one array, and which of its places hold a token: the others are to their right."""

    tokens_BT: Int32[np.ndarray, "B T"]
    real_BT: Bool[np.ndarray, "B T"]


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Prompts:
    """The texts' tokens."""
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) for row in ids])
    real_BT = np.arange(lengths.max())[None] < lengths[:, None]
    tokens_BT = np.zeros(real_BT.shape, np.int32)
    tokens_BT[real_BT] = np.concatenate(ids)
    return Prompts(tokens_BT, real_BT)


def difference(
    merged: Float[np.ndarray, "real V"], with_adapter: Float[np.ndarray, "real V"], without: Float[np.ndarray, "real V"]
) -> Difference:
    """How far a merge's logits are from those of base and adapter."""
    off, added = merged - with_adapter, with_adapter - without
    largest, rms = (lambda x: float(np.max(np.abs(x)))), (lambda x: float(np.sqrt(np.mean(np.square(x)))))
    return Difference(largest(off), rms(off), largest(added), rms(added), float(np.std(with_adapter)))


def logits_of(parts: ModelParts, prompts: Prompts) -> np.ndarray:
    """[real tokens, V] in f32."""

    @jax.jit
    def logits(parts: ModelParts, tokens_BT: jax.Array) -> jax.Array:
        model = combine(parts)
        return model.head.logits(model.hidden(tokens_BT))

    return np.asarray(logits(parts, prompts.tokens_BT))[prompts.real_BT.reshape(-1)]
