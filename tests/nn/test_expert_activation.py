"""The weighted activation of grouped rows against autodiff of its equation, with its residuals and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot.memory import read_memory
from pallas_kernels.grouped_matmul import group_rows, weights_of_slots
from qlora_jax.nn import experts
from qlora_jax.nn.activations import ACTIVATIONS, ClampedSwiglu
from qlora_jax.nn.experts import BLOCK, weighted_activation
from qlora_jax.training.cost.step_shape import F32
from tests.nn.gradients import check_vjp, random_array
from tests.pallas_kernels.grouped_matmul.experts import choices
from tests.training.compiled_text import TO_READ

EXPERTS, INNER = 4, 16
CLAMPED = ClampedSwiglu(alpha=1.3, limit=1.5)
SIZES = {"a rest": (9, 4), "blocks": (94, 64), "blocks and a rest": (67, 4)}  # tokens, rows per tile


def case(tokens, tile):
    """Returns groups, of which some experts have no rows, gate and up of the slots, and the weights of the choices."""
    groups = group_rows(jnp.asarray(choices(tokens, 2, EXPERTS, "empty experts")), EXPERTS, tile)
    slots = len(groups.pair_of_slot_P)
    return groups, 2 * random_array(slots, INNER), 2 * random_array(slots, INNER, seed=1), random_array(tokens, 2)


def activated(groups, activation="silu"):
    def ours(gate_PF, up_PF, weights_Mk):
        return weighted_activation(gate_PF, up_PF, weights_of_slots(weights_Mk, groups), groups, activation)

    return ours


def plain(groups, activation):
    def equation(gate_PF, up_PF, weights_Mk):
        weight_P1 = jnp.zeros((len(gate_PF), 1)).at[groups.slot_of_pair_Mk, 0].set(weights_Mk)
        if isinstance(activation, ClampedSwiglu):
            return weight_P1 * activation.value(gate_PF, up_PF)
        return weight_P1 * ACTIVATIONS[activation].value(gate_PF) * up_PF

    return equation


@pytest.mark.parametrize(
    ("size", "activation"),
    [("blocks and a rest", "silu"), ("a rest", "gelu_tanh"), pytest.param("blocks", CLAMPED, marks=pytest.mark.slow)],
)
def test_values_and_gradients_equal_autodiff_of_the_equation(size, activation):
    groups, *given = case(*SIZES[size])
    blocks, rest = divmod(len(given[0]), BLOCK)
    assert (bool(blocks), bool(rest)) == ("blocks" in size, "rest" in size)
    ours, equation = jax.jit(activated(groups, activation)), jax.jit(plain(groups, activation))
    check_vjp(ours, equation, *given)
    np.testing.assert_allclose(ours(*given), equation(*given), rtol=1e-5, atol=1e-5)  # in evaluation


def test_padding_is_not_saved():
    groups, *given = case(*SIZES["blocks and a rest"])
    traced = jax.make_jaxpr(lambda *given: jax.vjp(activated(groups), *given))(*given).jaxpr
    saved = [str(variable.aval) for variable in traced.outvars[1:] if str(variable.aval).endswith(f",{INNER}]")]
    assert saved == 2 * [f"float32[{groups.slot_of_pair_Mk.size},{INNER}]"]


def test_gradients_take_the_memory_of_a_block(monkeypatch):
    groups, gate_PF, up_PF, weights_Mk = case(BLOCK * 8, 128)
    gate_PF, up_PF = gate_PF.astype(jnp.bfloat16), up_PF.astype(jnp.bfloat16)

    def temporaries():
        _, vjp = jax.vjp(activated(groups), gate_PF, up_PF, weights_Mk)
        return read_memory(jax.jit(vjp).lower(gate_PF).compile(TO_READ).memory_analysis()).device.temporaries

    assert temporaries() < 4 * BLOCK * INNER * F32
    monkeypatch.setattr(experts, "_by_block", experts._gradients)
    assert temporaries() > gate_PF.size * F32
