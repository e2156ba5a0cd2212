"""Embedding and head in a PEFT adapter: rows of tokens that were trained, and whole tables.

PEFT saves whole tables under `modules_to_save`, and by itself where a vocabulary has become larger.

Dimension key: N rows that train, W rows of a table, D embed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.io.entries import TensorEntry
from qlora_jax.io.peft import PREFIX
from qlora_jax.io.peft_tokens import DELTA, module_of
from qlora_jax.models.config import ModelConfig

WHOLE = ("weight", "modules_to_save.weight")  # of a table, the first that is there; both where there are both
# Frozen: those of the base, or what rows that train stand in.
FROZEN = ("token_adapter.base_layer.weight", "original_module.weight")
SETTINGS = ("trainable_token_indices", "modules_to_save", "ensure_weight_tying")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """What an adapter holds of embedding and head.

    Attributes:
      ids: of the tokens whose rows were trained.
      rows: {"model.embed_tokens": {"rows": [N, D]}} in f32, by our names.
      whole: {"model.embed_tokens": [W, D]}, tables in place of the base's.
    """

    ids: tuple[int, ...]
    rows: dict[str, dict[str, np.ndarray]]
    whole: dict[str, np.ndarray]


def read_tables(
    config: Mapping[str, Any], entries: Sequence[TensorEntry], model: ModelConfig
) -> tuple[Tables, list[TensorEntry], list[str]]:
    """(what of the adapter belongs to embedding and head, the other tensors, what does not fit the model)."""
    names = ["model.embed_tokens", "lm_head"]
    leaves = {f"{PREFIX}{module_of(name, model)}.{leaf}": (name, leaf) for name in names for leaf in LEAVES}
    found = {leaves[entry.name]: entry for entry in entries if entry.name in leaves}
    others = [entry for entry in entries if entry.name not in leaves]
    of_each = _ids(config, model)
    deltas = {name: found[name, DELTA] for name in names if (name, DELTA) in found}
    if model.tie_embeddings:
        deltas.pop("lm_head", None)  # a copy of the embedding's, which it is
    whole = {} if deltas else _whole(names, found)
    if problems := _row_problems(deltas, of_each, model) + _whole_problems(whole, model):
        return Tables(ids=(), rows={}, whole={}), others, problems
    rows = {name: {"rows": np.asarray(entry.read(), np.float32)} for name, entry in deltas.items()}
    ids = of_each.get("model.embed_tokens", ()) if rows else ()
    tables = {name: np.array(entry.read()) for name, entry in whole.items()}
    if model.tie_embeddings and "lm_head" in tables:
        del tables["lm_head"]
    return Tables(ids=ids, rows=rows, whole=tables), others, []


LEAVES = (DELTA, *WHOLE, *FROZEN)


def setting_problems(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """What is not supported of an adapter's settings for embedding and head."""
    known, asked = _known(model), _asked(config, model)
    named = {"trainable_token_indices": asked, "modules_to_save": config.get("modules_to_save") or []}
    problems = [
        f"{setting}: {module}: neither embedding nor head ({', '.join(known)}), and no other module is read so"
        for setting, modules in named.items()
        for module in modules
        if module.rpartition(".")[2] not in known
    ]
    if len({tuple(ids) for ids in asked.values()}) > 1:
        problems.append("trainable_token_indices: other tokens of the head than of the embedding are not supported")
    return problems


def _known(model: ModelConfig) -> dict[str, str]:
    """The last part of a table's name in transformers -> ours."""
    return {module_of(name, model).rpartition(".")[2]: name for name in ("model.embed_tokens", "lm_head")}


def _asked(config: Mapping[str, Any], model: ModelConfig) -> dict[str, list[int]]:
    asked = config.get("trainable_token_indices") or {}
    return {module_of("model.embed_tokens", model): asked} if isinstance(asked, list) else asked


def _ids(config: Mapping[str, Any], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows train, by our name of each table."""
    return {_known(model)[name.rpartition(".")[2]]: tuple(ids) for name, ids in _asked(config, model).items()}


def _row_problems(
    deltas: Mapping[str, TensorEntry], of_each: Mapping[str, tuple[int, ...]], model: ModelConfig
) -> list[str]:
    wanted = ["model.embed_tokens"] + ([] if model.tie_embeddings else ["lm_head"]) if of_each or deltas else []
    ids = next(iter(of_each.values()), ())
    problems = [
        f"{module_of(name, model)}.{DELTA} is missing: rows of embedding and head train together here"
        for name in wanted
        if name not in deltas
    ]
    return problems + [
        f"{entry.name}: shape {list(entry.shape)}, expected {[len(ids), model.embed_dim]}"
        for entry in deltas.values()
        if entry.shape != (len(ids), model.embed_dim)
    ]


def _whole(names: Sequence[str], found: Mapping[tuple[str, str], TensorEntry]) -> dict[str, TensorEntry]:
    held = {name: [found[name, leaf] for leaf in WHOLE if (name, leaf) in found] for name in names}
    return {name: entries[0] for name, entries in held.items() if entries}


def _whole_problems(whole: Mapping[str, TensorEntry], model: ModelConfig) -> list[str]:
    problems = [
        f"{entry.name}: shape {list(entry.shape)}, expected [{model.vocab_size} or more, {model.embed_dim}]"
        for entry in whole.values()
        if len(entry.shape) != 2 or entry.shape[0] < model.vocab_size or entry.shape[1] != model.embed_dim
    ]
    if not problems and len({entry.shape for entry in whole.values()}) > 1:
        problems.append("embedding and head are of different lengths")
    grown = any(entry.shape[0] > model.vocab_size for entry in whole.values())
    if not model.tie_embeddings and grown and len(whole) < 2:
        problems.append("one of embedding and head is longer than the base's, and the other is not there")
    if model.tie_embeddings and not problems and "lm_head" in whole:
        embedding = whole.get("model.embed_tokens")
        if embedding is None or not np.array_equal(embedding.read(), whole["lm_head"].read()):
            problems.append(
                "the head of this model is its embedding, and the adapter's two differ: PEFT trained them apart "
                "(modules_to_save), which is not supported; merge with peft (merge_and_unload), and untie them"
            )
    if model.head_bias and "lm_head" in whole:
        problems.append("a whole head beside a bias is not supported; merge with peft (merge_and_unload)")
    return problems
