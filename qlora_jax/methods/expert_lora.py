"""LoRA on routed experts: a pair of matrices per expert, or one pair that all experts share.

Dimension key: E experts, or 1 if they share; P slots, I tiles, T tiles of a chunk, C rows per tile, K in,
N out, R rank, S sparse layers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from pallas_kernels.grouped_matmul.groups import Groups
from qlora_jax.config import LoraArgs
from qlora_jax.methods.targets import Layers, parameter_ranks_and_scalings, target_parameters
from qlora_jax.models.config import ROUTER, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.mlp import MixtureMLP
from qlora_jax.nn.lora import LoRA, initial_factors
from qlora_jax.nn.random_keys import named_key
from qlora_jax.nn.variables import TrainedLeaf
from qlora_jax.sharding import init_sharded


class ExpertLoRA(nnx.Module):
    """LoRA on one parameter of the experts: W_e + scaling (A_e B_e)^T. Inputs have no dropout, as in PEFT.

    Args:
      lora_a: [S, E, K, R], or [S, 1, K, R] if all experts share it; inside the scan over layers [E, K, R].
      lora_b: [S, E, R, N] or [S, 1, R, N].
      layers: the numbers of the S layers in the model, ascending; None: all.
    """

    LEAVES = (TrainedLeaf("lora_a"), TrainedLeaf("lora_b"))
    SAVED = ("lora_xa",)

    def __init__(
        self,
        lora_a: Float[Array, "*S E K R"],
        lora_b: Float[Array, "*S E R N"],
        scaling: float,
        layers: tuple[int, ...] | None = None,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.adapted_layers = layers

    def __call__(self, x_PK: Float[Array, "P K"], groups: Groups) -> Float[Array, "P N"]:
        """Returns scaling * x A_e B_e for the expert e of each slot, in x's dtype."""
        with jax.named_scope("lora"):
            tiles_I = groups.expert_of_tile_I
            if self.lora_a[...].shape[0] == 1:  # one tile of all slots
                tiles_I = jnp.zeros(1, jnp.int32)
            return expert_deltas(x_PK, self.lora_a[...], self.lora_b[...], tiles_I, self.scaling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def expert_deltas(
    x_PK: Float[Array, "P K"],
    lora_a_EKR: Float[Array, "E K R"],
    lora_b_ERN: Float[Array, "E R N"],
    expert_of_tile_I: Int[Array, " I"],
    scaling: float,
) -> Float[Array, "P N"]:
    """Returns scaling * x A_e B_e in x's dtype, for tiles of P / I rows that share an expert e.

    A and B are cast to x's dtype, and sums are in f32. As many tiles as there are experts are computed together, so the
    copies of their matrices and their gradients take the bytes of all experts' at most.
    """
    return _forward(x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, scaling)[0]


class _Chunk(NamedTuple):
    """Neighbouring tiles whose products are computed together.

    Fields:
      first: the first of the tiles, in the order of the slots.
      experts_T: the expert of each tile.
      is_new_T: False for a tile that the chunk before it has, too.
    """

    first: Int[Array, ""]
    experts_T: Int[Array, " T"]
    is_new_T: Bool[Array, " T"]

    def tiles(self, rows_ICK: jax.Array) -> jax.Array:
        """Returns the rows of the chunk, [T, C, K]."""
        return jax.lax.dynamic_slice_in_dim(rows_ICK, self.first, len(self.experts_T))

    def put(self, rows_ICK: jax.Array, rows_TCK: jax.Array) -> jax.Array:
        """Returns all rows with those of the chunk replaced."""
        return jax.lax.dynamic_update_slice_in_dim(rows_ICK, rows_TCK, self.first, axis=0)

    def add(self, d_EKN: jax.Array, d_TKN: jax.Array) -> jax.Array:
        """Returns gradients by expert, to which those of the chunk's new tiles are added."""
        return d_EKN.at[self.experts_T].add(jnp.where(self.is_new_T[:, None, None], d_TKN, 0))


def _each_chunk[S](expert_of_tile_I: jax.Array, experts: int, one: Callable[[_Chunk, S], S], state: S) -> S:
    """Returns the state after all chunks, of as many tiles as there are experts; the last one ends at the last tile."""
    tiles = len(expert_of_tile_I)
    size = min(tiles, experts)

    def at(number: jax.Array, state: S) -> S:
        first = jnp.minimum(number * size, tiles - size)
        chosen = jax.lax.dynamic_slice_in_dim(expert_of_tile_I, first, size)
        return one(_Chunk(first, chosen, first + jnp.arange(size) >= number * size), state)

    return jax.lax.fori_loop(0, -(-tiles // size), at, state)


def _in_tiles(rows_PK: jax.Array, expert_of_tile_I: jax.Array) -> jax.Array:
    return rows_PK.reshape(len(expert_of_tile_I), -1, rows_PK.shape[1])


def _scaled(product_ICR: jax.Array, scaling: float, dtype: jnp.dtype) -> jax.Array:
    return (product_ICR * scaling).astype(dtype)


def _forward(x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, scaling):
    dtype, x_ICK = x_PK.dtype, _in_tiles(x_PK, expert_of_tile_I)

    def one(chunk: _Chunk, state):
        xa_ICR, y_ICN = state
        a_TKR, b_TRN = (leaf[chunk.experts_T].astype(dtype) for leaf in (lora_a_EKR, lora_b_ERN))
        xa_TCR = _scaled(dot_nn(chunk.tiles(x_ICK), a_TKR), scaling, dtype)
        return chunk.put(xa_ICR, xa_TCR), chunk.put(y_ICN, dot_nn(xa_TCR, b_TRN, dtype))

    wide = [jnp.zeros((*x_ICK.shape[:2], leaf.shape[2]), dtype) for leaf in (lora_a_EKR, lora_b_ERN)]
    xa_ICR, y_ICN = _each_chunk(expert_of_tile_I, len(lora_a_EKR), one, tuple(wide))
    residuals = x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, checkpoint_name(xa_ICR, "lora_xa")
    return y_ICN.reshape(len(x_PK), -1), residuals


def _backward(scaling, residuals, dy_PN):
    x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, xa_ICR = residuals
    dtype = x_PK.dtype
    x_ICK, dy_ICN = (_in_tiles(rows, expert_of_tile_I) for rows in (x_PK, dy_PN))

    def one(chunk: _Chunk, state):
        dx_ICK, d_a_EKR, d_b_ERN = state
        a_TKR, b_TRN = (leaf[chunk.experts_T].astype(dtype) for leaf in (lora_a_EKR, lora_b_ERN))
        x_TCK, dy_TCN, xa_TCR = map(chunk.tiles, (x_ICK, dy_ICN, xa_ICR))
        d_xa_TCR = _scaled(dot_nt(dy_TCN, b_TRN), scaling, dtype)
        dx_ICK = chunk.put(dx_ICK, dot_nt(d_xa_TCR, a_TKR, dtype))
        return dx_ICK, chunk.add(d_a_EKR, dot_tn(x_TCK, d_xa_TCR)), chunk.add(d_b_ERN, dot_tn(xa_TCR, dy_TCN))

    zeros = jnp.zeros_like(x_ICK), *(jnp.zeros(leaf.shape, jnp.float32) for leaf in (lora_a_EKR, lora_b_ERN))
    dx_ICK, d_a_EKR, d_b_ERN = _each_chunk(expert_of_tile_I, len(lora_a_EKR), one, zeros)
    return dx_ICK.reshape(x_PK.shape), d_a_EKR.astype(lora_a_EKR.dtype), d_b_ERN.astype(lora_b_ERN.dtype), None


expert_deltas.defvjp(_forward, _backward)


def add_expert_adapters(model: CausalLM, spec: LoraArgs, key: jax.Array, mesh: Mesh | None = None) -> None:
    """Adds an adapter to each targeted parameter, in place; it changes nothing until trained.

    Raises:
      ValueError: a name that matches nothing, or a rank below 1.
    """
    config = model.config
    layers_of = target_parameters(config, spec)
    if not layers_of:
        return
    mlp = model.model.layers.mlp
    assert isinstance(mlp, MixtureMLP)
    shapes = parameter_shapes(config)
    for name, (rank, scaling) in parameter_ranks_and_scalings(config, spec).items():
        inner, shape = shapes[name]
        draw = functools.partial(
            initial_parameter_factors, config=config, spec=spec, inner=inner, shape=shape, rank=rank, dtype=spec.dtype
        )
        a, b = init_sharded(functools.partial(draw, layers=layers_of[name]), named_key(key, name), mesh)
        if inner == ROUTER:
            mlp.gate.adapter = LoRA(a, b, scaling, 0.0, layers_of[name])
        else:
            getattr(mlp.experts, inner.rpartition(".")[2]).adapter = ExpertLoRA(a, b, scaling, layers_of[name])


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Returns {Hugging Face name: (name within a layer, (N out, K in))} of what target_parameters can name."""
    if config.experts is None:
        return {}
    shapes = config.expert_targets() | {ROUTER: (config.experts.count, config.embed_dim)}
    return {config.hugging_face_name(f"model.layers.{name}"): (name, shape) for name, shape in shapes.items()}


def initial_parameter_factors(
    key: jax.Array,
    *,
    config: ModelConfig,
    spec: LoraArgs,
    inner: str,
    shape: tuple[int, int],
    rank: int,
    dtype: DTypeLike,
    layers: Layers,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns A [S, E, K, R] and B [S, E, R, N], or [S, K, R] and [S, R, N] for a router, as `initial_factors`.

    Each layer gets the A that it gets among all sparse layers. E is 1 if experts share an adapter.
    """
    assert config.experts is not None
    sparse = config.experts.layers
    rows = tuple(sparse.index(layer) for layer in layers)
    if inner == ROUTER:
        return initial_factors(key, len(sparse), shape, rank, dtype, rows)
    experts = 1 if spec.share_experts else config.experts.count
    rows_of_experts = tuple(row * experts + expert for row in rows for expert in range(experts))
    a, b = initial_factors(key, len(sparse) * experts, shape, rank, dtype, rows_of_experts)
    return a.reshape(len(rows), experts, *a.shape[1:]), b.reshape(len(rows), experts, *b.shape[1:])
