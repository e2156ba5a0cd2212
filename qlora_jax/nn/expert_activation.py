"""The activation of experts, weighted by the router; it saves one row per pair of a token and an expert, no padding.

Dimension key: M tokens, k choices per token, Q = M k pairs, P slots (rows grouped by expert), B rows of a block,
F inner width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.devices import target_device
from pallas_kernels.grouped_matmul import Groups, rows_of_pairs
from qlora_jax.nn.mlp import GateActivation, gated_gradients, gated_value

# Rows whose gradients are computed together on CPUs, where XLA writes several f32 intermediates: they stay in cache. On
# GPUs it fuses all rows in one kernel.
BLOCK = 128
Gradients = tuple[Float[Array, "B F"], Float[Array, "B F"], Float[Array, " B"]]  # with respect to gate, up and weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_activation(
    gate_PF: Float[Array, "P F"],
    up_PF: Float[Array, "P F"],
    weight_P: Float[Array, " P"],
    groups: Groups,
    activation: GateActivation,
) -> Float[Array, "P F"]:
    """Returns weight * act(gate) * up in gate's dtype, computed in f32; zeros in padding.

    Rows are weighted before their last product, so that the gradient of the weights reads no result of experts. The
    residuals are gate and up of the pairs.

    Args:
      weight_P: f32, from `weights_of_slots`.
    """
    return _weighted(gate_PF, up_PF, weight_P, activation)


def _weighted(gate_PF, up_PF, weight_P, activation: GateActivation) -> Float[Array, "P F"]:
    return (gated_value(gate_PF, up_PF, activation) * weight_P[:, None]).astype(gate_PF.dtype)


def _forward(gate_PF, up_PF, weight_P, groups, activation):
    gate_QF = checkpoint_name(rows_of_pairs(gate_PF, groups), "mlp_gate")
    up_QF = checkpoint_name(rows_of_pairs(up_PF, groups), "mlp_up")
    y_PF = _weighted(_in_slots(gate_QF, groups), _in_slots(up_QF, groups), weight_P, activation)
    return y_PF, (gate_QF, up_QF, weight_P, groups)


def _in_slots(x_QF: Float[Array, "Q F"], groups: Groups) -> Float[Array, "P F"]:
    """Returns the row of each slot's pair, and any row in padding, whose weight is 0."""
    return x_QF.at[groups.pair_of_slot_P].get(mode="clip")


def _backward(activation, residuals, dy_PF):
    gate_QF, up_QF, weight_P, groups = residuals
    gate_PF, up_PF = _in_slots(gate_QF, groups), _in_slots(up_QF, groups)
    gradients = _by_block if target_device().platform == "cpu" else _gradients
    return *gradients(gate_PF, up_PF, weight_P, dy_PF, activation), None


def _gradients(gate_BF, up_BF, weight_B, dy_BF, activation: GateActivation) -> Gradients:
    dy32_BF = dy_BF.astype(jnp.float32)
    d_weight_B = jnp.sum(dy32_BF * gated_value(gate_BF, up_BF, activation), axis=1)
    d_gate_BF, d_up_BF = gated_gradients(gate_BF, up_BF, dy32_BF * weight_B[:, None], activation)
    return d_gate_BF.astype(dy_BF.dtype), d_up_BF.astype(dy_BF.dtype), d_weight_B


def _by_block(gate_PF, up_PF, weight_P, dy_PF, activation: GateActivation) -> Gradients:
    """Returns `_gradients`, which replace gate, up and weights block by block in the same buffers."""

    def replace(start: jax.Array | int, rows: int, state: Gradients) -> Gradients:
        # Without the barrier XLA computes each gradient where it is stored, and copies what the next one still reads.
        gate_BF, up_BF, weight_B, dy_BF = jax.lax.optimization_barrier(
            [jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (*state, dy_PF)]
        )
        of_gate, of_up, of_weight = (
            jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=0)
            for x, new in zip(state, _gradients(gate_BF, up_BF, weight_B, dy_BF, activation), strict=True)
        )
        return of_gate, of_up, of_weight

    (blocks, rest), state = divmod(len(dy_PF), BLOCK), (gate_PF, up_PF, weight_P)
    if blocks:
        state = jax.lax.fori_loop(0, blocks, lambda at, state: replace(at * BLOCK, BLOCK, state), state)
    return replace(blocks * BLOCK, rest, state) if rest else state


weighted_activation.defvjp(_forward, _backward)
