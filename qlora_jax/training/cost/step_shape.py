"""The settings that determine what a training step computes and holds, and the shapes of the arrays it holds.

Dimension key: that of qlora_jax.training.cost.flops; S slots of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul.groups import choose_tile, most_tiles
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.config.schema import OptimizerName
from qlora_jax.data.batching.packing import PRESENT, slot_count
from qlora_jax.methods.adapter_cost import AdapterShape
from qlora_jax.methods.attach import abstract_parts
from qlora_jax.methods.merge_into import merged_shape
from qlora_jax.methods.method import method_of
from qlora_jax.models.config import NORM_PLACEMENTS, ROUTER, ExpertsConfig, ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts, is_table, lora_specs, module_of, parts_specs
from qlora_jax.models.trainable_embeddings import trainable_table_names
from qlora_jax.nn.frozen_weight import OPS
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.objectives.head_objective import head_spec
from qlora_jax.objectives.objective import Objective, token_values
from qlora_jax.objectives.router_losses import FILLED, Routed
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import state_specs
from qlora_jax.sharding import FSDP, AnyMesh, axis_size, cut_axis, table_spec

# The arrays of a model and of its optimizer's state by shape, and how a mesh cuts them.
#
# They are those of the model itself, built without weights. Each is stacked along its first axis, usually by layer.

IN_LAYERS = "model.layers."
SHARED_GATE = "mlp.shared_expert_gate"
CODES, CONSTANTS, TABLES, ROUTERS, ADAPTERS, VECTORS = KINDS = (
    *("codes", "constants", "tables", "routers"),
    *("adapters", "vectors"),
)
CONSTANT_FIELDS = frozenset[str]().union(*(ops.constants for ops in OPS.values()))
# Models whose trees are remembered.
MOST_KEPT = 64
# The schedule's length has no part in the state.
STEPS = 1


class Leaf(NamedTuple):
    """An array: its module's name (within a layer, if it is in one), whole shape, bytes of an element, and parts."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    parts: int

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @property
    def is_cut(self) -> bool:
        """True if each device of the mesh has a part of the array."""
        return self.parts > 1

    @property
    def part_bytes(self) -> int:
        """The bytes of one device's part."""
        return self.nbytes // self.parts


class ModelTrees(NamedTuple):
    """The parts of a model with adapters, and its optimizer's state, as ShapeDtypeStructs."""

    model: ModelConfig
    parts: ModelParts
    optimizer: optax.GradientTransformation
    state: optax.OptState

    def frozen(self, mesh: AnyMesh | None) -> list[tuple[str, Leaf]]:
        """Returns (kind out of KINDS, array) of the base."""
        specs = None if mesh is None else parts_specs(self.parts, mesh).base
        projections = self.model.linear_shapes().keys() | self.model.expert_shapes().keys()
        return [(_kind(path, projections), leaf) for path, leaf in _leaves(self.parts.base, specs, mesh)]

    def adapters(self, mesh: AnyMesh | None, *, fixed: bool = True) -> list[Leaf]:
        """Returns the trained arrays.

        Args:
          fixed: True to include those that checkpoints have, but that have neither a gradient nor optimizer state.
        """
        tree = self.parts.lora if fixed else self.parts.trained
        specs = None if mesh is None else lora_specs(tree, mesh)
        return [leaf for _, leaf in _leaves(tree, specs, mesh)]

    def state_bytes(self, mesh: AnyMesh | None) -> int:
        """Returns the bytes of one device's part of the optimizer's state."""
        trained = self.parts.trained
        specs = None if mesh is None else state_specs(self.optimizer, trained, lora_specs(trained, mesh))
        return sum(leaf.part_bytes for _, leaf in _leaves(self.state, specs, mesh))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelSettings:
    """The settings that determine the trees; equal if their texts are, because those with lists have no hash."""

    model: ModelConfig
    weights: WeightFormat
    lora: LoraArgs
    optimizer: OptimizerName
    new_tokens: int
    head: HeadSpec | None

    def __hash__(self) -> int:
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


@functools.lru_cache(MOST_KEPT)
def model_trees(of: ModelSettings) -> ModelTrees:
    """Returns the trees of a model; those of the latest models are remembered.

    Raises:
      ValueError: the settings of the adapter do not fit the model.
    """
    ids = tuple(range(of.model.vocab_size, of.model.vocab_size + of.new_tokens))  # any ids: only their number matters
    parts = abstract_parts(of.model, of.weights, of.lora, ids, of.head)
    optimizer = make_optimizer(OptimArgs(name=of.optimizer), STEPS)
    return ModelTrees(of.model, parts, optimizer, jax.eval_shape(optimizer.init, parts.trained))


def _leaves(tree: PyTree, specs: PyTree | None, mesh: AnyMesh | None) -> Iterator[tuple[jax.tree_util.KeyPath, Leaf]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    cuts: Sequence[P] = [P()] * len(found)
    if specs is not None:
        cuts = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    for (path, leaf), spec in zip(found, cuts, strict=True):
        parts = 1 if cut_axis(spec) is None else axis_size(mesh, FSDP)
        name = module_of(path).removeprefix(IN_LAYERS)
        yield path, Leaf(name, leaf.shape, leaf.dtype.itemsize, parts)


def _kind(path: jax.tree_util.KeyPath, projections: Collection[str]) -> str:
    """Returns the kind of an array of the base, from its place in the model."""
    module = module_of(path)
    inner, is_weight = module.removeprefix(IN_LAYERS), jax.tree_util.DictKey("weight") in path
    if inner.endswith(".adapter"):
        return ADAPTERS
    if inner in (ROUTER, SHARED_GATE):
        return ROUTERS
    if is_table(module) and is_weight:
        return TABLES
    if inner not in projections or not is_weight:
        return VECTORS
    return CONSTANTS if getattr(path[-1], "name", "") in CONSTANT_FIELDS else CODES


DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"  # the last products of the MLP and of attention
ROUTED = "mlp.experts."
ROUTED_DOWN, SHARED_DOWN = "mlp.experts.down_proj", "mlp.shared_experts.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
F32 = 4


def is_routed(name: str) -> bool:
    """Returns True for a projection of routed experts, by its name within a layer."""
    return name.startswith(ROUTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The settings that determine the operations and bytes of a step; on a mesh, of one device's part of it.

    Attributes:
      lora: the adapters' settings.
      batch: (A, B, T), with the rows of one device.
      remat: a key of REMAT_POLICIES.
      supervised: supervised tokens per micro-batch, which the head computes in whole chunks; None: all tokens.
      optimizer: a value of `optim.name`.
      new_tokens: number of new tokens, whose rows of embedding and head train.
      packed: True if each row of a batch packs several data rows.
      branching: True if data rows have branches.
      objective: the loss, which determines further arrays of a batch.
      mesh: the devices that the model is cut over; None: one device.
      tile: rows per tile of experts; None: as chosen for the batch.
    """

    model: ModelConfig
    weights: WeightFormat
    lora: LoraArgs
    batch: tuple[int, int, int]
    remat: str
    supervised: int | None = None
    optimizer: OptimizerName = "adamw_32bit"
    new_tokens: int = 0
    packed: bool = False
    branching: bool = False
    objective: Objective = SUPERVISED
    mesh: AnyMesh | None = None
    tile: int | None = None

    @property
    def rows(self) -> int:
        """M, the tokens per micro-batch."""
        return self.batch[1] * self.batch[2]

    @property
    def itemsize(self) -> int:
        """Bytes per activation."""
        return 2 if self.weights.dtype in ("bfloat16", "float16") else F32

    @property
    def table_parts(self) -> int:
        """The number of devices that embedding and head are cut over; 1 if rows of them train."""
        if self.mesh is None or self.new_tokens or self.trained_tables:
            return 1
        shape = (self.model.vocab_size, self.model.embed_dim)
        return 1 if cut_axis(table_spec(shape, self.mesh)) is None else axis_size(self.mesh, FSDP)

    @functools.cached_property
    def trees(self) -> ModelTrees:
        """The arrays of the model and of the optimizer's state."""
        settings = ModelSettings(
            model=self.model,
            weights=self.weights,
            lora=self.lora,
            optimizer=self.optimizer,
            new_tokens=self.new_tokens,
            head=self.head,
        )
        return model_trees(settings)

    @functools.cached_property
    def adapter(self) -> AdapterShape:
        """The facts about the adapters."""
        if self.lora.merge_into is not None:
            return merged_shape(self.model, self.lora)
        return method_of(self.lora.method).shape(self.model, self.lora)

    @property
    def first_backward(self) -> int:
        """The first layer that the backward pass visits: the first with an adapter, unless earlier parts train."""
        adapted = [layers[0] for layers in self.adapter.layers.values()]
        if self.new_tokens or EMBEDDING in self.trained_tables or not adapted:
            return 0
        return min(adapted)

    @property
    def backward_layers(self) -> int:
        """The number of layers that the backward pass visits."""
        return self.model.num_layers - self.first_backward

    @property
    def not_recomputed(self) -> tuple[str, ...]:
        """The projections whose results the backward pass does not need.

        They are those whose result is only added to the residual stream after all that reads it: no norm, trained
        vector or adapter behind the module.
        """
        layout, wraps = NORM_PLACEMENTS[self.model.layout], self.adapter.wraps
        unread = {OUT: layout.parallel and "self_attn" not in wraps}
        unread[DOWN] = layout.after_mlp is None and "mlp" not in wraps
        unread[ROUTED_DOWN] = unread[DOWN]
        unread[SHARED_DOWN] = unread[DOWN] and not (self.experts is not None and self.experts.shared_gate)
        return tuple(name for name, last in unread.items() if last and name not in self.adapter.scaled)

    @functools.cached_property
    def trained_tables(self) -> list[str]:
        """The names of embedding and head that train fully."""
        return [name for name in trainable_table_names(self.model, self.lora) if name in self.tables]

    @property
    def head(self) -> HeadSpec | None:
        """The sequence head, if the objective trains one in place of the language-model head."""
        return head_spec(self.objective)

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the model's tables: the embedding, and the language-model head if it is a separate one."""
        return (EMBEDDING,) if self.model.tie_embeddings or self.head is not None else (EMBEDDING, HEAD)

    def shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields (name, (out, in)) of each projection that is a plain matrix."""
        for name, (shape, _) in self.model.linear_shapes().items():
            yield name, shape

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields (name, (out, in)) of each projection, those of one routed expert included."""
        yield from self.shapes()
        yield from self.model.expert_shapes().items()

    def stack(self, name: str) -> tuple[int, ...]:
        """Returns the leading axes of a projection's weights: its layers; of routed experts, layers and experts."""
        layers = (len(self.model.layers_with(name)),)
        return layers if self.experts is None or not is_routed(name) else (*layers, self.experts.count)

    def layers(self, name: str, first: int = 0) -> int:
        """Returns the number of layers from `first` on that have a module, by its name within a layer."""
        return sum(layer >= first for layer in self.model.layers_with(name))

    @property
    def pairs(self) -> int:
        """M k, the pairs of a token and one of its experts; 0 without experts."""
        return 0 if self.experts is None else self.rows * self.experts.per_token

    @property
    def slots(self) -> int:
        """P, the rows of the experts' grouped arrays: M k in whole tiles, with room for each expert's padding."""
        tiles, rows = self.tiles
        return tiles * rows

    @property
    def tiles(self) -> tuple[int, int]:
        """(I, C): the tiles of the experts' grouped arrays, and their rows."""
        if self.experts is None:
            return 0, 0
        device = Device(platform=self.weights.platform, kind=self.weights.platform)
        tile = self.tile or choose_tile(device, self.pairs, self.experts.count)
        return most_tiles(self.pairs, self.experts.count, tile), tile

    @property
    def tiles_together(self) -> int:
        """The number of tiles whose adapter products on experts are computed together; 0 without experts."""
        return 0 if self.experts is None else min(self.tiles[0], self.experts.count)

    @property
    def experts(self) -> ExpertsConfig | None:
        """The features of the model's experts."""
        return self.model.experts


Shape = tuple[int, ...]
Dtype = Literal["int32", "float32"]


def batch_shapes(
    batch: tuple[int, int, int], objective: Objective, *, packed: bool, branching: bool
) -> dict[str, tuple[Shape, Dtype]]:
    """Returns the shape and dtype of each array; all elements have 4 bytes.

    Args:
      batch: (A, B, T).
      packed: True if each row of a batch packs several data rows.
      branching: True if data rows have branches.
    """
    found: dict[str, tuple[Shape, Dtype]] = {name: (batch, "int32") for name in ("inputs", "targets")}
    found["weights"] = batch, "float32"
    if isinstance(objective, Routed):
        found[FILLED] = (*batch[:2], 1), "int32"
    found |= {name: ((*batch, *each.inner), each.dtype) for name, each in token_values(objective).items()}
    found |= {name: (batch, "int32") for name in _structure(objective, packed=packed, branching=branching)}
    if not objective.sequences_per_row:
        return found
    slots = slot_count(batch[2], packed=packed, sequences=objective.sequences_per_row)
    for name, inner in {PRESENT: (), **objective.values}.items():
        found[name] = (*batch[:2], slots, *inner), "float32"
    return found


def _structure(objective: Objective, *, packed: bool, branching: bool) -> list[str]:
    """Returns the names of the arrays that divide rows into segments and sequences."""
    names = ["segments"] if packed or branching else []
    names += ["parents", "depths"] if branching else []
    return [*names, "sequences"] if objective.sequences_per_row else names
