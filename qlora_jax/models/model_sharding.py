"""The cut of a model's parts over a mesh: 4-bit weights, LoRA parameters, embedding and head.

All else is whole on every device: norms, biases, layers that are not quantized, vectors of adapters, arrays that
adapters share, arrays that do not divide evenly, and tables with trained rows.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.models.partition import ModelParts, is_table
from qlora_jax.nn.linear import weight_specs
from qlora_jax.nn.mixed_stack import MixedStack
from qlora_jax.sharding import AnyMesh, Leaf, lora_spec, place, table_spec


def parts_specs(parts: ModelParts, mesh: AnyMesh) -> ModelParts:
    """Returns the PartitionSpec of every leaf, in the structure of `parts`, whose leaves need only a shape."""
    tables_train = any(is_table(name) for name in parts.lora)

    def base_spec(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        if isinstance(leaf, QTensor | MixedStack):
            return weight_specs(leaf, mesh)
        if is_table(module_of(path)) and not tables_train:
            return table_spec(leaf.shape, mesh)
        return P()

    base = jax.tree_util.tree_map_with_path(
        base_spec, parts.base, is_leaf=lambda leaf: isinstance(leaf, QTensor | MixedStack)
    )
    return dataclasses.replace(parts, lora=lora_specs(parts.lora, mesh), base=base)


def lora_specs(lora: Mapping[str, Mapping[str, Leaf]], mesh: AnyMesh) -> dict[str, dict[str, P]]:
    """Returns the PartitionSpec of every LoRA parameter; gradients and moments are cut alike.

    Args:
      lora: arrays, tracers or ShapeDtypeStructs.
    """

    def spec(name: str, leaf: Leaf) -> P:
        return P() if is_table(name) else lora_spec(leaf.shape, mesh)

    return {name: {leaf: spec(name, value) for leaf, value in leaves.items()} for name, leaves in lora.items()}


def place_parts(parts: ModelParts, mesh: Mesh) -> ModelParts:
    """Places a model on a mesh."""
    return place(parts, parts_specs(parts, mesh), mesh)


def module_of(path: jax.tree_util.KeyPath) -> str:
    """Returns the dotted name of the module that holds a leaf of the base."""
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return ".".join(names[:-1])
