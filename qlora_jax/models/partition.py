"""A model as three parts: its structure, what trains, and what is frozen.

What trains is a plain dict {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}, which is what
gradients, optax and checkpoints see; the rest never reaches them.
"""

from typing import Any

import jax
from flax import nnx

Lora = dict[str, dict[str, jax.Array]]


def is_table(name: str) -> bool:
    """Whether a module of what trains is embedding or head, and no projection or norm."""
    return name in ("model.embed_tokens", "lm_head")


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, Lora, nnx.State]:
    """(structure, LoRA parameters, base); `combine` is the inverse."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, _to_dict(lora), base


def combine(graphdef: nnx.GraphDef, lora: Lora, base: nnx.State) -> Any:
    """The model again; inside jit too."""
    flat = [
        ((*name.split("."), "adapter", leaf), nnx.LoRAParam(value))
        for name, leaves in lora.items()
        for leaf, value in leaves.items()
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat), base)


def _to_dict(state: nnx.State) -> Lora:
    lora: Lora = {}
    for path, variable in nnx.to_flat_state(state):
        *name, adapter, leaf = map(str, path)
        assert adapter == "adapter", path
        lora.setdefault(".".join(name), {})[leaf] = variable.get_value()
    return lora
