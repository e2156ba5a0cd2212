"""What trains of embedding and head: rows of new tokens, or whole tables; and what the tables are with it put in."""

from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM, Embedding
from qlora_jax.nn.new_token_rows import NewTokenRows
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


def add_tables(model: CausalLM, ids: tuple[int, ...], lora: LoraArgs) -> None:
    """Sets what trains of embedding and head: the tables of `trainable_table_names`, and else rows of the tokens `ids`.

    Raises:
      ValueError: a name that is neither, or a head that has a bias.
    """
    add_token_rows(model, ids, lora.dtype)
    whole = trainable_table_names(model.config, lora)
    for name, table in tables(model):
        if name in whole:
            table.make_trainable(ids, lora.dtype)


def trainable_table_names(config: ModelConfig, lora: LoraArgs) -> list[str]:
    """Our names of the tables that train whole.

    With lora.method=full all of them, else those of modules_to_save, by our last part of the name or the family's own.

    Raises:
      ValueError: a name that is neither, or a head that has a bias.
    """
    ours = ["model.embed_tokens", *([] if config.tie_embeddings else ["lm_head"])]
    if lora.method == "full":
        if config.head_bias:
            raise ValueError("lora.method=full: the head of this model has a bias, and does not train whole here")
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
        problems.append("'lm_head': a head with a bias does not train whole here; its new tokens' rows do")
    if problems:
        raise ValueError(f"lora.modules_to_save: {'; '.join(problems)}")
    return names


def set_tables(model: CausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Puts whole tables, by our names, in place of the model's; they are frozen, and may have more rows."""
    for name, table in tables(model):
        if name in weights:
            table.weight = Frozen(jnp.asarray(weights[name], table.weight[...].dtype))


def merged_tables(model: CausalLM, replaced: Collection[str]) -> dict[str, jax.Array]:
    """By our names, weights and biases of tables in which rows train, with these put in, and of those `replaced`."""
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
