"""grouped_matmul against a loop over experts in float64, and against lax.ragged_dot with its autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows, grouped_matmul, weights_of_slots
from tests.marks import EXHAUSTIVE, some_in_ci
from tests.pallas_kernels.grouped_matmul.experts import choices, dense, mixture, quantized, random_rows
from tests.pallas_kernels.nf4_matmul.tolerances import relative_error, tolerance

SHAPE, EXPERTS, LAYERS = (64, 128), 4, 2


@pytest.fixture(scope="module")
def stack():
    return quantized(LAYERS, EXPERTS, SHAPE, layout="row_planar")


def mixed(x_MK, weights, experts_Mk, weights_Mk, layer, tile=None):
    """Computes the mixture by the op: [M, K] -> [M, N]."""
    groups = group_rows(jnp.asarray(experts_Mk), jax.tree.leaves(weights)[0].shape[1], tile)
    y_PN = grouped_matmul(gather_rows(x_MK, groups), weights, groups, layer)
    weighed_PN = y_PN.astype(jnp.float32) * weights_of_slots(weights_Mk, groups)[:, None]
    return combine_rows(weighed_PN.astype(y_PN.dtype), groups)


def check(weights, tokens, k, pattern="random", tile=None, dtype=jnp.float32, roundings=2):
    """Asserts values and both gradients, for a traced layer in a compiled program."""
    w_ENK = dense(weights)[1]
    experts_Mk = choices(tokens, k, len(w_ENK), pattern)
    x, of_choice = random_rows(tokens, w_ENK.shape[2], dtype=dtype), jnp.abs(random_rows(tokens, k, seed=4))
    dy = random_rows(tokens, w_ENK.shape[1], dtype=dtype, seed=5)

    @jax.jit
    def ours(x, of_choice, layer, dy):
        y, vjp = jax.vjp(lambda *moved: mixed(moved[0], weights, experts_Mk, moved[1], layer, tile), x, of_choice)
        return y, *vjp(dy)

    y, dx, dof_choice = ours(x, of_choice, jnp.int32(1), dy)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    wanted = mixture(x, w_ENK, experts_Mk, of_choice)
    wanted_dx = mixture(dy, np.swapaxes(w_ENK, 1, 2), experts_Mk, of_choice)
    each = np.einsum("mn,mknd,md->mk", *(np.asarray(a, np.float64) for a in (dy, np.asarray(w_ENK)[experts_Mk], x)))
    for found, expected in ((y, wanted), (dx, wanted_dx), (dof_choice, each)):
        allowed = tolerance(dtype, sum(w_ENK.shape[1:]), found.size, roundings)
        assert relative_error(found, expected) <= allowed


CASES = [
    (1, 2, "random", None),
    pytest.param(33, 2, "empty experts", 16, marks=pytest.mark.slow),
    pytest.param(24, 2, "all to one", 16, marks=pytest.mark.slow),
    pytest.param(20, 1, "random", 4, marks=pytest.mark.slow),
    pytest.param(1, 1, "random", 64, marks=EXHAUSTIVE),
]


@pytest.mark.parametrize(("tokens", "k", "pattern", "tile"), CASES)
def test_equals_a_loop_over_experts(stack, tokens, k, pattern, tile):
    check(stack, tokens, k, pattern, tile)


@pytest.mark.parametrize(
    ("tokens", "k", "pattern", "tile"),
    some_in_ci([(17, 2, "random", 16), (5, 2, "random", 1)], lambda index: index == 0),
)
def test_in_16_bit_each_rounding_is_counted(stack, tokens, k, pattern, tile):
    """The weight, the product, and the sum over choices are rounded, and in the gradient the weighted dy."""
    check(stack, tokens, k, pattern, tile, dtype=jnp.bfloat16, roundings=4)


@pytest.mark.parametrize(
    ("layout", "double_quant"),
    some_in_ci([("bnb", True), ("flat", False), ("split_k", True)], lambda index: index == 0),
)
def test_every_layout(layout, double_quant):
    check(quantized(LAYERS, EXPERTS, SHAPE, layout=layout, double_quant=double_quant), 33, 2, tile=16)


@pytest.mark.parametrize(("tokens", "tile"), some_in_ci([(33, 16), (1, 1)], lambda index: False))
def test_dense_stacks(tokens, tile):
    check(random_rows(LAYERS, EXPERTS, *SHAPE, seed=6), tokens, 2, tile=tile)


@pytest.mark.parametrize(("tokens", "tile"), some_in_ci([(33, 16), (1, 1)], lambda index: index == 1))
def test_blocks_of_ggml(tokens, tile):
    codes = np.random.default_rng(0).integers(0, 256, (LAYERS, EXPERTS, SHAPE[0], SHAPE[1] // 32 * 17), np.uint8)
    codes[..., ::17] = 120 + codes[..., ::17] % 8  # exponents of the scales
    weights = GgmlTensor(codes=jnp.asarray(codes), ggml_type="MXFP4", shape=SHAPE, dtype="float32")
    check(weights, tokens, 2, tile=tile)


@pytest.mark.parametrize("tokens", some_in_ci([(24,), (1,)], lambda index: index == 0))
def test_many_experts_with_few_rows(tokens):
    check(random_rows(LAYERS, 128, 32, 64, seed=6), tokens, 8)


@pytest.mark.parametrize("batch", some_in_ci([(2,)], lambda index: False))
def test_mapped_mixtures_are_those_of_each(stack, batch):
    experts_BMk = jnp.asarray(np.stack([choices(9 + seed, 2, EXPERTS)[:9] for seed in range(batch)]))
    x_BMK, weights_BMk = random_rows(batch, 9, SHAPE[1]), random_rows(batch, 9, 2, seed=4)

    def one(x, experts, of_choice):
        return mixed(x, stack, experts, of_choice, 1, 4)

    each = [one(*given) for given in zip(x_BMK, experts_BMk, weights_BMk, strict=True)]
    np.testing.assert_allclose(jax.vmap(one)(x_BMK, experts_BMk, weights_BMk), each, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_equals_ragged_dot_and_its_gradient(stack):
    tokens, k = 30, 2
    experts_Mk, x = jnp.asarray(choices(tokens, k, EXPERTS)), random_rows(tokens, SHAPE[1])
    w_EKN = jnp.swapaxes(jnp.asarray(dense(stack)[1]), 1, 2)
    order = jnp.argsort(experts_Mk.reshape(-1), stable=True)
    sizes = jnp.bincount(experts_Mk.reshape(-1), length=EXPERTS)
    groups = group_rows(experts_Mk, EXPERTS, 8)
    in_order = jnp.asarray(np.asarray(groups.slot_of_pair_Mk).reshape(-1)[order])

    def ours(x):
        return grouped_matmul(gather_rows(x, groups), stack, groups, 1)[in_order]

    def theirs(x):
        return jax.lax.ragged_dot(x[order // k], w_EKN, sizes.astype(jnp.int32))

    @jax.jit
    def both(x):
        (y, vjp), (expected, expected_vjp) = (jax.vjp(product, x) for product in (ours, theirs))
        return (y, *vjp(expected)), (expected, *expected_vjp(expected))

    for found, expected in zip(*both(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_problem_is_in_the_message(stack):
    groups = group_rows(jnp.zeros((4, 2), jnp.int32), EXPERTS, 4)
    with pytest.raises(ValueError) as raised:
        grouped_matmul(jnp.zeros((3, 8), jnp.float8_e5m2), stack, groups, 2, implementation="fastest")
    for part in (
        "the groups have 20 slots",
        "dtype float8_e5m2",
        "K=8",
        "layer=2 is out of range",
        "'fastest' is unknown",
    ):
        assert re.search(re.escape(part), str(raised.value)), (part, str(raised.value))
    with pytest.raises(ValueError, match=r"leading axes \[4\]"):
        grouped_matmul(jnp.zeros((20, 128)), jax.tree.map(lambda leaf: leaf[0], stack), groups, 0)
