"""Embedding and head in a PEFT adapter: rows of tokens that were trained, and whole tables.

PEFT saves whole tables under `modules_to_save`, and by itself where a vocabulary has become larger.

Dimension key: N rows that train, W rows of a table, D embed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.io.checkpoint import Run
from qlora_jax.io.model_source import TensorEntry
from qlora_jax.io.peft.writer import PREFIX, Lora
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import is_table

DELTA = "token_adapter.trainable_tokens_delta"  # PEFT's name for what are the rows themselves
PEFT_NAMES = {"rows": DELTA, "weight": "weight"}
# Modules that transformers calls otherwise than their checkpoints do.
MODULES = {"embed_out": "lm_head"}


def split(lora: Lora) -> tuple[Lora, Lora]:
    """(adapters of projections, what trains of embedding and head)."""
    tables = {name: leaves for name, leaves in lora.items() if is_table(name)}
    return {name: leaves for name, leaves in lora.items() if name not in tables}, tables


def module_of(name: str, model: ModelConfig) -> str:
    """A table as transformers calls it: "model.embed_tokens", "lm_head"."""
    named = model.hugging_face_name(name)
    return MODULES.get(named, named)


def token_tensors(tables: Lora, model: ModelConfig) -> dict[str, np.ndarray]:
    """Rows [N, D] of embedding and head, or the whole tables; PEFT reads a whole one twice where it is both."""
    tensors = {
        f"{PREFIX}{module_of(name, model)}.{PEFT_NAMES[leaf]}": np.ascontiguousarray(np.asarray(values))
        for name, leaves in tables.items()
        for leaf, values in leaves.items()
    }
    whole = tables.get("model.embed_tokens", {}).get("weight")
    if model.tie_embeddings and whole is not None:
        tensors[f"{PREFIX}{module_of('lm_head', model)}.weight"] = np.array(whole)
    return tensors


def token_config(tables: Lora, ids: tuple[int, ...], model: ModelConfig) -> dict[str, Any]:
    """What adapter_config.json says of them: by the last part of a table's name, whether it trains whole, or its rows.

    Where the head is the embedding, PEFT has to be told that it stays so.
    """
    last = {name: module_of(name, model).rpartition(".")[2] for name in tables}
    whole = [last[name] for name, leaves in tables.items() if "weight" in leaves]
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    if whole and model.tie_embeddings:
        config["ensure_weight_tying"] = True
    if rows := {last[name]: list(ids) for name, leaves in tables.items() if "rows" in leaves}:
        config["trainable_token_indices"] = rows
    return config


def check_exportable(run: Run, tables: Lora, model: ModelConfig) -> None:
    """Passes what PEFT computes as it was trained.

    Raises:
      ValueError: a model that trained whole; whole tables, as of an adapter that was made elsewhere; rows of tokens, or
        a head that is the embedding, beside (IA)^3; rows of a head with a bias, which PEFT leaves out then.
    """
    if run.tables:
        raise ValueError(
            f"--format peft: {run.path} is an adapter already, with whole tables: use that, or --format hf"
        )
    leaves, ia3 = {leaf for table in tables.values() for leaf in table}, run.lora_args.method == "ia3"
    problems = {
        "all of the model was trained (lora.method=full), and PEFT holds adapters": run.lora_args.method == "full",
        "PEFT trains no rows of tokens beside (IA)^3": "rows" in leaves and ia3,
        "PEFT does not keep a head the embedding that it is beside (IA)^3": "weight" in leaves
        and ia3
        and model.tie_embeddings,
        "the head of this model adds a bias, which PEFT leaves out where rows of a head train "
        "(trainable_token_indices), so logits would be others": "rows" in leaves and model.head_bias,
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise ValueError(f"--format peft: {'; '.join(found)}. Export one model instead: --format hf")


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
