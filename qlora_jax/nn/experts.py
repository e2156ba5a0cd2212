"""Routed experts: gated MLPs, a few of which each token uses, with frozen stacked weights and optional adapters.

Dimension key: M tokens, k choices per token, S sparse layers, E experts, P slots (rows grouped by expert), I tiles, D
embed, N out, K in, Q = M k pairs, B rows of a block, F inner width.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import target_device
from pallas_kernels.grouped_matmul.groups import (
    Groups,
    combine_rows,
    gather_rows,
    group_rows,
    rows_of_pairs,
    weights_of_slots,
)
from qlora_jax.nn.activations import GateActivation, gated_gradients, gated_value
from qlora_jax.nn.frozen_weight import Weight, frozen_grouped
from qlora_jax.nn.variables import Frozen, select_layer

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


class ExpertDelta(Protocol):
    """Adapter next to one parameter of the experts."""

    def __call__(self, x_PK: Float[Array, "P K"], groups: Groups) -> Float[Array, "P N"]:
        """Returns what it adds to the result of each slot."""
        ...


class ExpertAdapter(nnx.Module):
    """The place of an adapter on gate and up together, which are two weights."""

    def __init__(self):
        self.adapter: ExpertDelta | None = nnx.data(None)  # data: an adapter may be set later


class ExpertLinear(ExpertAdapter):
    """A projection of all experts: y = x W_e^T + b_e for rows grouped by expert, with W and b frozen.

    Args:
      weight: stacks over layers and experts.
      bias: [S, E, N], or None.
    """

    def __init__(self, weight: Weight, bias: Float[Array, "S E N"] | None):
        super().__init__()
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)

    def __call__(
        self,
        x_PK: Float[Array, "P K"],
        layer: jax.Array,
        groups: Groups,
        weight_P: Float[Array, " P"] | None = None,
    ) -> Float[Array, "P N"]:
        """Returns the result for the expert of each slot, with the adapter if one is set.

        Args:
          weight_P: factors of the bias, by which x is already multiplied; None: no factors.
        """
        with jax.named_scope("experts"):
            y_PN = frozen_grouped(x_PK, self.weight.get_value(), groups, layer)
        if self.bias is not None:
            bias_IN = select_layer(self.bias[...], layer)[groups.expert_of_tile_I]
            bias_PN = jnp.repeat(bias_IN.astype(jnp.float32), groups.tile, axis=0)
            y_PN = y_PN + (bias_PN if weight_P is None else bias_PN * weight_P[:, None]).astype(y_PN.dtype)
        return y_PN if self.adapter is None else y_PN + self.adapter(x_PK, groups)


class Experts(nnx.Module):
    """The experts of all sparse layers: down(act(gate(x)) * up(x)) of each chosen expert, weighted and summed.

    Args:
      activation: of gate and up.
      count: E.
    """

    def __init__(
        self,
        gate_proj: ExpertLinear,
        up_proj: ExpertLinear,
        down_proj: ExpertLinear,
        *,
        activation: GateActivation,
        count: int,
    ):
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.gate_up_proj = ExpertAdapter()
        self.activation, self.count = activation, count
        self.by_row = False  # decoding sets it

    def __call__(
        self,
        x_MD: Float[Array, "M D"],
        experts_Mk: Int[Array, "M k"],
        weights_Mk: Float[Array, "M k"],
        layer: jax.Array,
    ) -> Float[Array, "M D"]:
        """Returns each token's sum of weight * expert(x). No token is dropped, however many choose one expert."""
        groups = group_rows(experts_Mk, self.count, by_row=self.by_row)
        x_PD = gather_rows(x_MD, groups)
        gate_PF, up_PF = self._gate_and_up(x_PD, layer, groups)
        weight_P = weights_of_slots(weights_Mk, groups)
        with jax.named_scope("swiglu"):
            inner_PF = weighted_activation(gate_PF, up_PF, weight_P, groups, self.activation)
        return combine_rows(self.down_proj(inner_PF, layer, groups, weight_P), groups)

    def _gate_and_up(self, x_PD: jax.Array, layer: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
        gate_PF, up_PF = self.gate_proj(x_PD, layer, groups), self.up_proj(x_PD, layer, groups)
        adapter = self.gate_up_proj.adapter
        if adapter is None:
            return gate_PF, up_PF
        d_gate_PF, d_up_PF = jnp.split(adapter(x_PD, groups), 2, axis=1)
        return gate_PF + d_gate_PF, up_PF + d_up_PF
