"""Rows for new tokens: where a model gets them, and what its tables are with them put in."""

from collections.abc import Iterator

import jax
from jax.typing import DTypeLike

from qlora_jax.models.decoder import CausalLM, Embedding


def tables(model: CausalLM) -> Iterator[tuple[str, Embedding]]:
    """(name, table) of the embedding, and of the head where that is one of its own."""
    yield "model.embed_tokens", model.model.embed_tokens
    if not model.config.tie_embeddings:
        yield "lm_head", model.lm_head


def add_token_rows(model: CausalLM, ids: tuple[int, ...], dtype: DTypeLike) -> None:
    """Sets rows that train for the tokens `ids` on embedding and head, each the mean of its table; none where no ids.

    An id may lie beyond the table, or in a row of it, as the first new ones do where a table is longer than its
    vocabulary: that row is then replaced.
    """
    for _, table in tables(model):
        table.set_rows(ids, dtype)


def whole_tables(model: CausalLM) -> dict[str, jax.Array]:
    """Weights and biases of the tables with their rows put in, by our names; empty where no rows train."""
    whole = {}
    for name, table in tables(model):
        if table.adapter is not None:
            whole[f"{name}.weight"] = table.adapter.put_into(table.weight[...])
            if table.bias is not None:
                whole[f"{name}.bias"] = table.adapter.bias_put_into(table.bias[...])
    return whole
