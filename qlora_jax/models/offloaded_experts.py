"""Routed experts in host memory: their leaves, the memory that holds them, and their shapes for compiling.

Such a leaf is a whole stack in pinned host memory. The decoder's scan fetches the next layer of it while one runs
(models.prefetched_layers), so the device holds the weights of two layers.
"""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.models.config import DENSE, ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts
from qlora_jax.nn.linear import in_host_memory
from qlora_jax.nn.variables import StatePath

HOST = "pinned_host"
EXPERTS = ("model", "layers", "mlp", "experts")


def is_on_host(path: StatePath, weights: WeightFormat) -> bool:
    """Returns True if the leaf at a path of the model's state is in host memory: the weights, but not the biases."""
    return weights.experts_on_host and path[: len(EXPERTS)] == EXPERTS and path[-1] == "weight"


def host_sharding() -> NamedSharding:
    """Returns the host memory of the default device, for arrays and for shapes.

    It names a mesh of that one device, because JAX ignores the memory of a ShapeDtypeStruct's other shardings.

    Raises:
      ValueError: the device has none.
    """
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f"model.experts: offload needs memory of kind {HOST} on {device} (found {', '.join(kinds)}). Set "
            "model.experts=device"
        )
    return NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec(), memory_kind=HOST)


def check_fetchable(weights: WeightFormat, config: ModelConfig) -> None:
    """Raises ValueError if experts that go to host memory are partly in 16 bits, one line for all projections."""
    if weights.experts_on_host and (partly := partly_dense(weights, config)):
        raise ValueError(
            "model.experts: offload needs codes in all layers of a projection, or in none (found "
            f"{'; '.join(partly)}). Set model.experts=device, or another model.quant_type"
        )


def partly_dense(weights: WeightFormat, config: ModelConfig) -> list[str]:
    """Returns (name: formats) of each projection of experts with some layers in 16 bits, as text.

    Each fetch would copy as much as such a layer has. Types of blocks may differ between layers.
    """
    found = {name: list(weights.parts(name, len(config.layers_with(name)))) for name in config.expert_shapes()}
    return [f"{name}: {', '.join(formats)}" for name, formats in found.items() if len(formats) > 1 and DENSE in formats]


def with_experts_on_host(parts: ModelParts, weights: WeightFormat) -> ModelParts:
    """Returns the ShapeDtypeStructs of a model's parts, with those of offloaded experts in host memory."""
    return _with_host_leaves(parts, {path for path, _ in nnx.to_flat_state(parts.base) if is_on_host(path, weights)})


def with_memory_of(shapes: ModelParts, parts: ModelParts) -> ModelParts:
    """Returns ShapeDtypeStructs with those leaves of the base in host memory that `parts` has there."""
    return _with_host_leaves(shapes, set(host_paths(parts)))


def has_experts_on_host(parts: ModelParts) -> bool:
    """Returns True if the experts of a model, arrays or ShapeDtypeStructs, are in host memory."""
    found = parts.base
    for key in EXPERTS:
        found = found.get(key, {})
    return in_host_memory(found)


def host_paths(parts: ModelParts) -> list[StatePath]:
    """Returns the paths of a base's leaves in host memory, whether they are arrays or ShapeDtypeStructs."""
    return [path for path, variable in nnx.to_flat_state(parts.base) if in_host_memory(variable)]


def _with_host_leaves(shapes: ModelParts, paths: Collection[StatePath]) -> ModelParts:
    if not paths:
        return shapes
    sharding = host_sharding()

    def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    base = [
        (path, jax.tree.map(on_host, variable) if path in paths else variable)
        for path, variable in nnx.to_flat_state(shapes.base)
    ]
    return dataclasses.replace(shapes, base=nnx.from_flat_state(base))
