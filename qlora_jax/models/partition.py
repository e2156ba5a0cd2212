"""A model as three parts: its structure, the LoRA parameters that train, and the frozen base; and where they lie."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Concatenate

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.devices import target_device
from qlora_jax.models.config import DENSE, ROUTER, ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.prefetched_layers import COPIES_AT_ONCE
from qlora_jax.nn.experts import Experts
from qlora_jax.nn.frozen_weight import is_packed, weight_specs
from qlora_jax.nn.linear import QLinear, in_host_memory
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.variables import StatePath, TrainedLeaf
from qlora_jax.sharding import AnyMesh, Leaf, lora_spec, mesh_of, place, table_spec

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
    """Returns the model for many calls of few tokens, with shared parts computed once, and norms and experts by row.

    Shared parts are what adapters compute from weights alone, and the cast of matrices to the compute dtype. Those of
    routers, which compute in f32, are not cast.
    """
    model, mesh = combine(parts), mesh_of(parts)
    for linear in [node for _, node in nnx.iter_graph(model) if isinstance(node, QLinear)]:
        if linear.merging:
            linear.replace_by_codes()
        elif linear.adapter is not None:
            linear.adapter = linear.adapter.for_decoding(linear.weight.get_value(), mesh)
    for node in [node for _, node in nnx.iter_graph(model) if isinstance(node, RMSNorm | LayerNorm | Experts)]:
        node.by_row = True
    dtype = model.model.embed_tokens.weight[...].dtype
    settled, vectors = partition(model), {leaf.name for leaf in trained_leaves(model) if leaf.vector}
    cast = {
        name: {leaf: values if leaf in vectors else values.astype(dtype) for leaf, values in leaves.items()}
        for name, leaves in settled.lora.items()
        if not name.endswith(ROUTER)
    }
    return settled.with_lora({**settled.lora, **cast})


# The cut of a model's parts over a mesh: 4-bit weights, LoRA parameters, embedding and head.
#
# All else is whole on every device: norms, biases, layers that are not quantized, vectors of adapters, arrays that
# adapters share, arrays that do not divide evenly, and tables with trained rows.


def parts_specs(parts: ModelParts, mesh: AnyMesh) -> ModelParts:
    """Returns the PartitionSpec of every leaf, in the structure of `parts`, whose leaves need only a shape."""
    tables_train = any(is_table(name) for name in parts.lora)

    def base_spec(path: jax.tree_util.KeyPath, leaf: PyTree) -> PyTree:
        if is_packed(leaf):
            return weight_specs(leaf, mesh)
        if is_table(module_of(path)) and not tables_train:
            return table_spec(leaf.shape, mesh)
        return P()

    base = jax.tree_util.tree_map_with_path(base_spec, parts.base, is_leaf=is_packed)
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


# Routed experts in host memory: their leaves, the memory that holds them, and their shapes for compiling.
#
# Such a leaf is a whole stack in pinned host memory. The decoder's scan fetches the next layer of it while one runs
# (models.prefetched_layers), so the device holds the weights of two layers.

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


type Models = ModelParts | tuple[ModelParts, ...]


class ModelFunction[**Inputs, Result]:
    """A function that is jitted twice, because JAX compiles one jitted function with the same options for all inputs.

    Attributes:
      plain: for models on the device.
      prefetching: for models with experts in host memory, on a GPU.
    """

    def __init__(self, function: Callable[Concatenate[Any, Inputs], Result], **settings: Any):
        """Jits a function whose first argument is a model, or a tuple of models.

        Args:
          settings: further arguments of `jax.jit`.
        """
        functools.update_wrapper(self, function)
        self.plain = jax.jit(function, **settings)
        self.prefetching = jax.jit(function, compiler_options=COPIES_AT_ONCE, **settings)

    def __call__(self, model: Models, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        """Calls the function."""
        return self.jitted(model)(model, *args, **kwargs)

    def trace(self, model: Models, *args: object, **kwargs: object) -> jax.stages.Traced:
        """Traces the function, as a jitted function does."""
        return self.jitted(model).trace(model, *args, **kwargs)

    def lower(self, model: Models, *args: object, **kwargs: object) -> jax.stages.Lowered:
        """Lowers the function, as a jitted function does."""
        return self.jitted(model).lower(model, *args, **kwargs)

    def jitted(self, model: Models) -> jax.stages.Wrapped:
        """Returns the jitted function for a model. A loop that calls it for each token asks once."""
        models = model if isinstance(model, tuple) else (model,)
        prefetches = target_device().platform == "gpu" and any(map(has_experts_on_host, models))
        return self.prefetching if prefetches else self.plain
