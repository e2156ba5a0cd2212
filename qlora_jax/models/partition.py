"""A model as three parts: its structure, the LoRA parameters that train, and the frozen base."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.models.config import ROUTER
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.variables import TrainedLeaf
from qlora_jax.sharding import mesh_of

Lora = dict[str, dict[str, jax.Array]]
AdapterArrays = Mapping[str, Mapping[str, jax.Array | np.ndarray]]  # the same, also in host memory


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
      untrained: names of leaves of `lora` that checkpoints see, but gradients and optax do not.
    """

    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    lora: dict[str, dict[str, Any]]
    base: nnx.State
    untrained: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def with_lora(self, lora: Lora) -> "ModelParts":
        """Returns the same model with other LoRA parameters."""
        return dataclasses.replace(self, lora=lora)

    @property
    def trained(self) -> dict[str, dict[str, Any]]:
        """The leaves of `lora` that train."""
        return split_leaves(self.lora, self.untrained)[0]


def is_table(name: str) -> bool:
    """Returns True if a trained module is the embedding or the head, not a projection or a norm."""
    return name in ("model.embed_tokens", "lm_head")


def partition(model: nnx.Module) -> ModelParts:
    """Returns the parts of a model; `combine` is the inverse."""
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    untrained = sorted({leaf.name for leaf in trained_leaves(model) if not leaf.trained})
    return ModelParts(graphdef, _to_dict(lora), base, tuple(untrained))


def trained_leaves(model: nnx.Module) -> set[TrainedLeaf]:
    """Returns what the modules of a model declare of their trained arrays."""
    return {leaf for _, node in nnx.iter_graph(model) for leaf in getattr(node, "LEAVES", ())}


def split_leaves[Leaf](
    tree: dict[str, dict[str, Leaf]], names: Collection[str]
) -> tuple[dict[str, dict[str, Leaf]], dict[str, dict[str, Leaf]]]:
    """Splits LoRA parameters, or their specs, into (leaves of other names, leaves of these names)."""

    def leaves(is_named: bool) -> dict[str, dict[str, Leaf]]:
        found = {module: {n: v for n, v in named.items() if (n in names) == is_named} for module, named in tree.items()}
        return {module: named for module, named in found.items() if named}

    return leaves(False), leaves(True)


def join_leaves[Leaf](
    some: dict[str, dict[str, Leaf]], others: dict[str, dict[str, Leaf]]
) -> dict[str, dict[str, Leaf]]:
    """Inverts `split_leaves`."""
    return {module: some.get(module, {}) | others.get(module, {}) for module in sorted(some.keys() | others.keys())}


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


def prepare_for_decoding(parts: ModelParts) -> ModelParts:
    """Returns the model for many calls of few tokens, with the shared parts computed once.

    These are what adapters compute from weights alone, and the cast of matrices to the compute dtype. Those of routers,
    which compute in f32, are not cast.
    """
    model, mesh = combine(parts), mesh_of(parts)
    for linear in [node for _, node in nnx.iter_graph(model) if isinstance(node, QLinear)]:
        if linear.adapter is not None:
            linear.adapter = linear.adapter.for_decoding(linear.weight.get_value(), mesh)
    dtype = model.model.embed_tokens.weight[...].dtype
    settled, vectors = partition(model), {leaf.name for leaf in trained_leaves(model) if leaf.vector}
    cast = {
        name: {leaf: values if leaf in vectors else values.astype(dtype) for leaf, values in leaves.items()}
        for name, leaves in settled.lora.items()
        if not name.endswith(ROUTER)
    }
    return settled.with_lora({**settled.lora, **cast})
