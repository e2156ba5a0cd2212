"""A model as three parts: its structure, the LoRA parameters that train, and the frozen base."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from qlora_jax.models.decoder import CausalLM

Lora = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A model taken apart, as a pytree that jitted functions take as one argument.

    Leaves may be arrays, tracers or ShapeDtypeStructs, so their types are not checked here.

    Fields:
      graphdef: the structure; static under jit.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}, which gradients, optax and
        checkpoints see.
      base: an `nnx.State` of everything frozen, which none of them sees.
    """

    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    lora: dict[str, dict[str, Any]]
    base: nnx.State

    def with_lora(self, lora: Lora) -> "ModelParts":
        """Returns the same model with other LoRA parameters."""
        return dataclasses.replace(self, lora=lora)


def is_table(name: str) -> bool:
    """Returns True if a trained module is the embedding or the head, not a projection or a norm."""
    return name in ("model.embed_tokens", "lm_head")


def partition(model: nnx.Module) -> ModelParts:
    """Returns the parts of a model; `combine` is the inverse."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    return ModelParts(graphdef, _to_dict(lora), base)


def combine(parts: ModelParts) -> CausalLM:
    """Returns the model again; inside jit too."""
    flat = [
        ((*name.split("."), "adapter", leaf), nnx.LoRAParam(value))
        for name, leaves in parts.lora.items()
        for leaf, value in leaves.items()
    ]
    return nnx.merge(parts.graphdef, nnx.from_flat_state(flat), parts.base)


def _to_dict(state: nnx.State) -> Lora:
    lora: Lora = {}
    for path, variable in nnx.to_flat_state(state):
        *name, adapter, leaf = map(str, path)
        assert adapter == "adapter", path
        lora.setdefault(".".join(name), {})[leaf] = variable.get_value()
    return lora
