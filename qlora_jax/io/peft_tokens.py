"""Rows of new tokens as PEFT has them: `trainable_token_indices`, and a tensor of rows for each table.

Dimension key: N rows, D embed.
"""

from typing import Any

import numpy as np

from qlora_jax.io.checkpoint import Run
from qlora_jax.io.peft import PREFIX, Lora
from qlora_jax.models.config import ModelConfig

DELTA = "token_adapter.trainable_tokens_delta"  # PEFT's name for what are the rows themselves
# Modules that transformers calls otherwise than their checkpoints do.
MODULES = {"embed_out": "lm_head"}


def split(lora: Lora) -> tuple[Lora, Lora]:
    """(adapters of projections, rows of tables)."""
    tables = {name: leaves for name, leaves in lora.items() if "rows" in leaves}
    return {name: leaves for name, leaves in lora.items() if name not in tables}, tables


def module_of(name: str, model: ModelConfig) -> str:
    """A table as transformers calls it: "model.embed_tokens", "lm_head"."""
    named = model.hugging_face_name(name)
    return MODULES.get(named, named)


def token_tensors(tables: Lora, model: ModelConfig) -> dict[str, np.ndarray]:
    """[N, D] of embedding and head."""
    return {
        f"{PREFIX}{module_of(name, model)}.{DELTA}": np.ascontiguousarray(np.asarray(leaves["rows"]))
        for name, leaves in tables.items()
    }


def token_config(tables: Lora, ids: tuple[int, ...], model: ModelConfig) -> dict[str, Any]:
    """What adapter_config.json says of them: by the last part of a table's name, which tokens' rows train."""
    if not tables:
        return {}
    names = [module_of(name, model).rpartition(".")[2] for name in tables]
    return {"trainable_token_indices": {name: list(ids) for name in names}}


def check_exportable(run: Run, tables: Lora, model: ModelConfig) -> None:
    """Passes what PEFT computes as it was trained.

    Raises:
      ValueError: whole tables, as of an adapter that was made elsewhere; rows of tokens beside (IA)^3, to which PEFT
        adds none, or of a head with a bias, which it leaves out then.
    """
    if run.tables:
        raise ValueError(
            f"--format peft: {run.path} is an adapter already, with whole tables: use that, or --format hf"
        )
    problems = {
        "PEFT trains no rows of tokens beside (IA)^3": run.lora_args.method == "ia3",
        "the head of this model adds a bias, which PEFT leaves out where rows of a head train "
        "(trainable_token_indices), so logits would be others": model.head_bias,
    }
    if tables and (found := [problem for problem, holds in problems.items() if holds]):
        raise ValueError(f"--format peft: {'; '.join(found)}. Export one model instead: --format hf")
