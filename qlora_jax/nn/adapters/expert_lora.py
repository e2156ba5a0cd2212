"""LoRA on routed experts: a pair of matrices per expert, or one pair that all experts share.

Dimension key: E experts, or 1 if they share; P slots, I tiles, C rows per tile, K in, N out, R rank, S sparse layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import Groups
from qlora_jax.nn.matmul import dot_nn, dot_nt, dot_tn


class ExpertLoRA(nnx.Module):
    """LoRA on one parameter of the experts: W_e + scaling (A_e B_e)^T. Inputs have no dropout, as in PEFT.

    Args:
      lora_a: [S, E, K, R], or [S, 1, K, R] if all experts share it; inside the scan over layers [E, K, R].
      lora_b: [S, E, R, N] or [S, 1, R, N].
      layers: the numbers of the S layers in the model, ascending; None: all.
    """

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

    A and B are cast to x's dtype, and sums are in f32. The backward pass selects the matrices of each tile again, so
    that none of these copies is kept.
    """
    return _forward(x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, scaling)[0]


def _in_tiles(rows_PK: jax.Array, expert_of_tile_I: jax.Array) -> jax.Array:
    return rows_PK.reshape(len(expert_of_tile_I), -1, rows_PK.shape[1])


def _scaled(product_ICR: jax.Array, scaling: float, dtype: jnp.dtype) -> jax.Array:
    return (product_ICR * scaling).astype(dtype)


def _forward(x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, scaling):
    dtype = x_PK.dtype
    x_ICK = _in_tiles(x_PK, expert_of_tile_I)
    xa_ICR = _scaled(dot_nn(x_ICK, lora_a_EKR.astype(dtype)[expert_of_tile_I]), scaling, dtype)
    y_ICN = dot_nn(xa_ICR, lora_b_ERN.astype(dtype)[expert_of_tile_I], dtype)
    residuals = x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, checkpoint_name(xa_ICR, "lora_xa")
    return y_ICN.reshape(len(x_PK), -1), residuals


def _backward(scaling, residuals, dy_PN):
    x_PK, lora_a_EKR, lora_b_ERN, expert_of_tile_I, xa_ICR = residuals
    dtype = x_PK.dtype
    x_ICK, dy_ICN = (_in_tiles(rows, expert_of_tile_I) for rows in (x_PK, dy_PN))
    d_xa_ICR = _scaled(dot_nt(dy_ICN, lora_b_ERN.astype(dtype)[expert_of_tile_I]), scaling, dtype)
    dx_ICK = dot_nt(d_xa_ICR, lora_a_EKR.astype(dtype)[expert_of_tile_I], dtype)

    def by_expert(d_tile: jax.Array, like: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(d_tile, expert_of_tile_I, num_segments=len(like)).astype(like.dtype)

    d_a_EKR = by_expert(dot_tn(x_ICK, d_xa_ICR), lora_a_EKR)
    d_b_ERN = by_expert(dot_tn(xa_ICR, dy_ICN), lora_b_ERN)
    return dx_ICK.reshape(x_PK.shape), d_a_EKR, d_b_ERN, None


expert_deltas.defvjp(_forward, _backward)
