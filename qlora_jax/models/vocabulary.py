"""Rows for new tokens: where a model gets them, and what its tables are with them put in."""

from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.models.decoder import CausalLM, Embedding
from qlora_jax.nn.variables import Frozen


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


def set_tables(model: CausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Puts whole tables, by our names, in place of the model's; they are frozen, and may have more rows."""
    for name, table in tables(model):
        if name in weights:
            table.weight = Frozen(jnp.asarray(weights[name], table.weight[...].dtype))


def whole_tables(model: CausalLM, replaced: Collection[str]) -> dict[str, jax.Array]:
    """By our names, weights and biases of tables in which rows train, with these put in, and of those `replaced`."""
    whole = {}
    for name, table in tables(model):
        if table.adapter is None and name not in replaced:
            continue
        leaves = {"weight": table.weight} if table.bias is None else {"weight": table.weight, "bias": table.bias}
        for leaf, variable in leaves.items():
            rows = table.adapter
            put = None if rows is None else rows.put_into if leaf == "weight" else rows.bias_put_into
            whole[f"{name}.{leaf}"] = variable[...] if put is None else put(variable[...])
    return whole
