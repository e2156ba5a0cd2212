"""Rows of new tokens as PEFT has them: `trainable_token_indices`, and a tensor of rows for each table.

Dimension key: N rows, D embed.
"""

from typing import Any

import numpy as np

from qlora_jax.io.checkpoint import Run
from qlora_jax.io.peft import PREFIX, Lora
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
