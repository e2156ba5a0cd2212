"""Checks token ids before a model reads them: the embedding's look-up promises that every id has a row."""

from collections.abc import Iterable, Sequence

import numpy as np

from qlora_jax.models.decoder import CausalLM


def id_problems(name: str, rows: Iterable[Sequence[int] | np.ndarray], model: CausalLM) -> list[str]:
    """Returns a message for each row with an id that the model's embedding has no row for.

    Args:
      name: of one row, such as "prompt".
    """
    limit = model.model.embed_tokens.num_ids
    spans = [(int(ids.min()), int(ids.max())) if ids.size else (0, 0) for ids in map(np.asarray, rows)]
    return [
        f"{name} {index}: an id has no row in the embedding (found ids {low} to {high}, expected 0 to {limit - 1}). "
        "Use the tokenizer that was loaded with the model"
        for index, (low, high) in enumerate(spans)
        if low < 0 or high >= limit
    ]
