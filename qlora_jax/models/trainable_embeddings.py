"""Trainable parts of embedding and head: rows of new tokens, or full tables; and the tables merged with them."""

from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM, Embedding
from qlora_jax.nn.lm_head.new_token_rows import NewTokenRows
from qlora_jax.nn.variables import Frozen


def tables(model: CausalLM) -> Iterator[tuple[str, Embedding]]:
    """Yields (name, table) of the embedding, and of the language-model head if it is a separate table."""
    yield "model.embed_tokens", model.model.embed_tokens
    if model.has_lm_head:
        yield "lm_head", model.lm_head


def add_token_rows(model: CausalLM, ids: tuple[int, ...], dtype: DTypeLike) -> None:
    """Adds trainable rows for the tokens `ids` to embedding and head, each initialized to the mean of its table.

    An id may lie beyond the table. It may also be a row of the table, as in tables longer than their vocabulary; that
    row is then replaced.
    """
    for _, table in tables(model):
        table.set_rows(ids, dtype)


def add_tables(model: CausalLM, ids: tuple[int, ...], lora: LoraArgs) -> None:
    """Makes the tables of `trainable_table_names` trainable, and in other tables the rows of the tokens `ids`.

    Raises:
      ValueError: a name that is neither embedding nor head, or a head that has a bias.
    """
    add_token_rows(model, ids, lora.dtype)
    whole = trainable_table_names(model.config, lora)
    for name, table in tables(model):
        if name in whole:
            table.make_trainable(ids, lora.dtype)


def trainable_table_names(config: ModelConfig, lora: LoraArgs) -> list[str]:
    """Returns our names of the tables that train in full.

    With lora.method=full these are all tables, otherwise those of lora.modules_to_save. A module may be named by the
    last part of our name or of the family's name.

    Raises:
      ValueError: a name that is neither embedding nor head, or a head that has a bias.
    """
    ours = ["model.embed_tokens", *([] if config.tie_embeddings else ["lm_head"])]
    if METHODS[lora.method].whole_model:
        if config.head_bias:
            raise ValueError(
                "lora.method=full: a head with a bias cannot train (this model's head has one). Use lora.method=lora."
            )
        return ours
    modules = lora.modules_to_save
    known = {named.rpartition(".")[2]: name for name in ours for named in (name, config.hugging_face_name(name))}
    problems = [
        f"{module!r}: expected some of {', '.join(known)}" + config.tie_embeddings * ", which is the head too here"
        for module in modules
        if module not in known
    ]
    names = [known[module] for module in modules if module in known]
    if config.head_bias and "lm_head" in names:
        problems.append("'lm_head': a head with a bias cannot train, only rows of new tokens can. Remove it")
    if problems:
        raise ValueError(f"lora.modules_to_save: {'; '.join(problems)}")
    return names


def rows_train(config: ModelConfig, lora: LoraArgs, new_ids: Collection[int]) -> bool:
    """Returns True if rows of embedding or head train: those of new tokens, or whole tables."""
    return bool(new_ids) or bool(trainable_table_names(config, lora))


def set_tables(model: CausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Replaces tables of the model by frozen ones, which may have more rows.

    Args:
      weights: {our name of a table: [V, D]}.
    """
    for name, table in tables(model):
        if name in weights:
            table.weight = Frozen(jnp.asarray(weights[name], table.weight[...].dtype))


def merged_tables(model: CausalLM, replaced: Collection[str]) -> dict[str, jax.Array]:
    """Returns {our name: weight or bias} of tables with trainable parts, merged, and of those in `replaced`."""
    whole = {}
    for name, table in tables(model):
        if table.adapter is None and name not in replaced:
            continue
        leaves = {"weight": table.weight} if table.bias is None else {"weight": table.weight, "bias": table.bias}
        for leaf, variable in leaves.items():
            trained = table.adapter
            if trained is not None and leaf == "weight":
                whole[f"{name}.{leaf}"] = trained.insert_into(variable[...])
            else:
                rows = isinstance(trained, NewTokenRows)
                whole[f"{name}.{leaf}"] = trained.insert_bias_into(variable[...]) if rows else variable[...]
    return whole
