"""The arrays of a model and of its optimizer's state by shape, and how a mesh cuts them.

They are those of the model itself, built without weights. Each is stacked along its first axis, usually by layer.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.config.schema import OptimizerName
from qlora_jax.methods.attach import abstract_parts
from qlora_jax.models.config import ROUTER, ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts, is_table, lora_specs, module_of, parts_specs
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import state_specs
from qlora_jax.sharding import FSDP, AnyMesh, axis_size, cut_axis

IN_LAYERS = "model.layers."
SHARED_GATE = "mlp.shared_expert_gate"
CODES, CONSTANTS, TABLES, ROUTERS, ADAPTERS, VECTORS = KINDS = (
    *("codes", "constants", "tables", "routers"),
    *("adapters", "vectors"),
)
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
    # The leaves of a QTensor are constants but for its codes.
    field = getattr(path[-1], "name", "")
    return CONSTANTS if field.startswith(("absmax", "nested")) else CODES
