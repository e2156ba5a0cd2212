"""Embedding and head in a PEFT adapter: rows of tokens that were trained, and whole tables.

PEFT stores whole tables for `modules_to_save`, and also when the vocabulary has grown.

Dimension key: N rows that train, W rows of a table, D embed.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from qlora_jax.config.methods import LORA, METHODS
from qlora_jax.methods.peft_form import PREFIX, PeftKeys
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays, is_table
from qlora_jax.untrusted_json import JsonObject

DELTA = "token_adapter.trainable_tokens_delta"  # PEFT's name of trained rows, although they are the rows themselves
PEFT_NAMES = {"rows": DELTA, "weight": "weight"}
# Modules whose names in transformers differ from those in checkpoints.
MODULES = {"embed_out": "lm_head"}


def split_tables(lora: AdapterArrays) -> tuple[AdapterArrays, AdapterArrays]:
    """Splits LoRA parameters into (adapters of projections, trained rows and tables of embedding and head)."""
    tables = {name: leaves for name, leaves in lora.items() if is_table(name)}
    return {name: leaves for name, leaves in lora.items() if name not in tables}, tables


def module_name(name: str, model: ModelConfig) -> str:
    """The name of embedding or head in transformers, such as "model.embed_tokens" or "lm_head"."""
    named = model.hugging_face_name(name)
    return MODULES.get(named, named)


def table_tensors(tables: AdapterArrays, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of adapter_model.safetensors for rows [N, D] or whole tables [W, D] of embedding and head.

    If head and embedding are tied, PEFT reads a whole table under both names.
    """
    tensors = {
        f"{PREFIX}{module_name(name, model)}.{PEFT_NAMES[leaf]}": np.ascontiguousarray(np.asarray(values))
        for name, leaves in tables.items()
        for leaf, values in leaves.items()
    }
    whole = tables.get("model.embed_tokens", {}).get("weight")
    if model.tie_embeddings and whole is not None:
        tensors[f"{PREFIX}{module_name('lm_head', model)}.weight"] = np.array(whole)
    return tensors


def table_config(tables: AdapterArrays, ids: tuple[int, ...], model: ModelConfig) -> JsonObject:
    """The settings in adapter_config.json for trained tables (modules_to_save) and rows (trainable_token_indices).

    If head and embedding are tied, `ensure_weight_tying` makes PEFT preserve that.

    Args:
      ids: ids of the tokens whose rows were trained.
    """
    last = {name: module_name(name, model).rpartition(".")[2] for name in tables}
    whole = [last[name] for name, leaves in tables.items() if "weight" in leaves]
    config: JsonObject = {"modules_to_save": whole} if whole else {}
    if whole and model.tie_embeddings:
        config["ensure_weight_tying"] = True
    if rows := {last[name]: list(ids) for name, leaves in tables.items() if "rows" in leaves}:
        config["trainable_token_indices"] = rows
    return config


def check_exportable(method: str, tables: AdapterArrays, model: ModelConfig) -> None:
    """Checks that PEFT can compute embedding and head of an adapter.

    Raises:
      ValueError: a method of another peft_type than LORA is combined with trained rows or with a tied head; or rows of
        a head with a bias were trained, which PEFT computes without it.
    """
    leaves, declared = {leaf for table in tables.values() for leaf in table}, METHODS[method]
    other = "" if declared.peft_type == LORA else declared.title
    problems = {
        f"PEFT cannot combine trained rows of tokens with {other}": "rows" in leaves and other,
        f"PEFT does not keep a head tied to the embedding with {other}": "weight" in leaves
        and other
        and model.tie_embeddings,
        "the head of this model adds a bias, which PEFT omits if rows of the head train "
        "(trainable_token_indices), so the logits would differ": "rows" in leaves and model.head_bias,
    }
    if found := [problem for problem, found in problems.items() if found]:
        raise ValueError(f"--format peft: {'; '.join(found)}. Export one model instead: --format hf")


# Names of a whole table; the first that exists is used.
WHOLE = ("weight", "modules_to_save.weight")
# Names of frozen tables: the base's, or those that contain the trained rows.
FROZEN = ("token_adapter.base_layer.weight", "original_module.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTables:
    """The embedding and head of a PEFT adapter.

    Attributes:
      ids: ids of the tokens whose rows were trained.
      rows: {"model.embed_tokens": {"rows": [N, D]}} in f32, by our names.
      whole: {"model.embed_tokens": [W, D]}, tables that replace the base's.
    """

    ids: tuple[int, ...]
    rows: dict[str, dict[str, np.ndarray]]
    whole: dict[str, np.ndarray]


def read_tables(
    config: PeftKeys, entries: Sequence[TensorEntry], model: ModelConfig
) -> tuple[AdapterTables, list[TensorEntry], list[str]]:
    """Reads embedding and head; returns (the tables, all other tensors, problems that make them unusable)."""
    names = ["model.embed_tokens", "lm_head"]
    leaves = {f"{PREFIX}{module_name(name, model)}.{leaf}": (name, leaf) for name in names for leaf in LEAVES}
    found = {leaves[entry.name]: entry for entry in entries if entry.name in leaves}
    others = [entry for entry in entries if entry.name not in leaves]
    ids_by_table = _ids(config, model)
    deltas = {name: found[name, DELTA] for name in names if (name, DELTA) in found}
    if model.tie_embeddings:
        deltas.pop("lm_head", None)  # PEFT stores a copy of the tied embedding
    whole = {} if deltas else _whole(names, found)
    if problems := _row_problems(deltas, ids_by_table, model) + _whole_problems(whole, model):
        return AdapterTables(ids=(), rows={}, whole={}), others, problems
    rows = {name: {"rows": np.asarray(entry.read(), np.float32)} for name, entry in deltas.items()}
    ids = ids_by_table.get("model.embed_tokens", ()) if rows else ()
    tables = {name: np.array(entry.read()) for name, entry in whole.items()}
    if model.tie_embeddings and "lm_head" in tables:
        del tables["lm_head"]
    return AdapterTables(ids=ids, rows=rows, whole=tables), others, []


LEAVES = (DELTA, *WHOLE, *FROZEN)


def setting_problems(config: PeftKeys, model: ModelConfig, others: Collection[str] = ()) -> list[str]:
    """Lists settings for embedding and head that are not supported.

    Args:
      others: other modules that the adapter may have as a whole.
    """
    known, indices = _known(model), _token_indices(config, model)
    named = {"trainable_token_indices": indices, "modules_to_save": config.get("modules_to_save") or []}
    problems = [
        f"{setting}: {module} is neither embedding nor head ({', '.join(known)}), the only modules supported here"
        for setting, modules in named.items()
        for module in modules
        if module.rpartition(".")[2] not in {*known, *others}
    ]
    if len({tuple(ids) for ids in indices.values()}) > 1:
        problems.append("trainable_token_indices: different tokens for head and embedding are not supported")
    # New tokens follow the base's, so that none can be further from its end than there are tokens.
    beyond = [each for ids in indices.values() for each in ids if each >= model.vocab_size + len(ids)]
    if beyond:
        problems.append(
            f"trainable_token_indices: found {max(beyond)}, expected ids of the base's {model.vocab_size} tokens and "
            "of new ones after them"
        )
    return problems


def _known(model: ModelConfig) -> dict[str, str]:
    """Our name of each table, by the last part of its name in transformers."""
    return {module_name(name, model).rpartition(".")[2]: name for name in ("model.embed_tokens", "lm_head")}


def _token_indices(config: PeftKeys, model: ModelConfig) -> dict[str, list[int]]:
    indices = config.get("trainable_token_indices") or {}
    return {module_name("model.embed_tokens", model): indices} if isinstance(indices, list) else indices


def _ids(config: PeftKeys, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The ids of the tokens whose rows train, by our name of the table."""
    return {_known(model)[name.rpartition(".")[2]]: tuple(ids) for name, ids in _token_indices(config, model).items()}


def _row_problems(
    deltas: Mapping[str, TensorEntry], ids_by_table: Mapping[str, tuple[int, ...]], model: ModelConfig
) -> list[str]:
    wanted = ["model.embed_tokens"] + ([] if model.tie_embeddings else ["lm_head"]) if ids_by_table or deltas else []
    ids = next(iter(ids_by_table.values()), ())
    problems = [
        f"{module_name(name, model)}.{DELTA} is missing: rows of embedding and head must be trained together"
        for name in wanted
        if name not in deltas
    ]
    return problems + [
        f"{entry.name}: shape {list(entry.shape)}, expected {[len(ids), model.embed_dim]}"
        for entry in deltas.values()
        if entry.shape != (len(ids), model.embed_dim)
    ]


def _whole(names: Sequence[str], found: Mapping[tuple[str, str], TensorEntry]) -> dict[str, TensorEntry]:
    stored = {name: [found[name, leaf] for leaf in WHOLE if (name, leaf) in found] for name in names}
    return {name: entries[0] for name, entries in stored.items() if entries}


def _whole_problems(whole: Mapping[str, TensorEntry], model: ModelConfig) -> list[str]:
    problems = [
        f"{entry.name}: shape {list(entry.shape)}, expected [{model.vocab_size} or more, {model.embed_dim}]"
        for entry in whole.values()
        if len(entry.shape) != 2 or entry.shape[0] < model.vocab_size or entry.shape[1] != model.embed_dim
    ]
    if not problems and len({entry.shape for entry in whole.values()}) > 1:
        problems.append("embedding and head have different lengths")
    grown = any(entry.shape[0] > model.vocab_size for entry in whole.values())
    if not model.tie_embeddings and grown and len(whole) < 2:
        problems.append("one of embedding and head is longer than the base's, and the other is missing")
    if model.tie_embeddings and not problems and "lm_head" in whole:
        embedding = whole.get("model.embed_tokens")
        if embedding is None or not np.array_equal(embedding.read(), whole["lm_head"].read()):
            problems.append(
                "the head of this model is tied to its embedding, but the adapter's two tables differ: PEFT trained "
                "them separately (modules_to_save), which is not supported. Merge with peft "
                "(merge_and_unload), and untie them"
            )
    if model.head_bias and "lm_head" in whole:
        problems.append("a whole head with a bias is not supported. Merge with peft (merge_and_unload)")
    return problems
