"""`logits`: the scores of every next token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.api.provenance import parts_of
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine


def logits(
    model: CausalLM, ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array
) -> Float[Array, "*B T V"]:
    """Returns the logits of the token after each position, in f32.

    >>> q.logits(model, tokenizer.encode("Hello")).shape  # positions, vocabulary
    (5, 258)

    All [B, T, V] are in memory at once; for losses, `token_nll` needs no such array.

    Args:
      ids: token ids of one text [T], or of texts of equal length [B, T], such as
        `tokenizer.encode("Hello")`.

    Raises:
      ValueError: ids are not whole numbers of the vocabulary, there are none, there are more than the model has
        positions, or the model has a head on whole sequences.
    """
    found, longest = np.asarray(ids), model.config.max_positions
    length = found.shape[-1] if found.ndim else 0
    problems = {
        f"shape {found.shape}, expected [T] or [B, T] with tokens": found.ndim not in (1, 2) or not found.size,
        f"{found.dtype}, expected whole numbers": not np.issubdtype(found.dtype, np.integer),
        f"{length} tokens, expected at most {longest}, the model's positions": length > longest,
    }
    if wrong := [problem for problem, applies in problems.items() if applies]:
        raise ValueError(f"ids: found {'; '.join(wrong)}")
    parts, tokens = parts_of(model), jax.ShapeDtypeStruct(np.atleast_2d(found).shape, jnp.int32)
    size = jax.eval_shape(_logits, parts, tokens).shape[-1]
    if found.min() < 0 or found.max() >= size:
        raise ValueError(f"ids: found {found.min()} to {found.max()}, expected 0 to {size - 1}, the vocabulary")
    return _logits(parts, jnp.atleast_2d(jnp.asarray(found, jnp.int32))).reshape(*found.shape, -1)


@jax.jit
def _logits(parts: ModelParts, tokens_BT: Int[Array, "B T"]) -> Float[Array, "M V"]:
    model = combine(parts)
    return model.head.logits(model.hidden(tokens_BT))
