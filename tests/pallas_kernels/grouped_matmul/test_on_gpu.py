"""Tests on an NVIDIA GPU: every implementation of the grouped product that the card supports, with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows, grouped_matmul
from pallas_kernels.grouped_matmul.api import choose_implementation
from tests.pallas_kernels.grouped_matmul.experts import choices, dense, mixture, quantized, random_rows
from tests.pallas_kernels.nf4_matmul.tolerances import FUSED, relative_error, tolerance

EXPERTS, SHAPE, LAYER = 8, (192, 576), 1
# Tokens, choices per token, rows per tile: decoding, tiles of both sizes, experts without rows.
CASES = [(1, 2, 8, "random"), (5, 2, 8, "empty experts"), (300, 2, 64, "random"), (400, 2, 128, "all to one")]


@pytest.fixture(scope="module")
def stack():
    return quantized(2, EXPERTS, SHAPE, layout="split_k")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("tokens", "k", "tile", "pattern"), CASES)
def test_equals_a_loop_over_experts_in_float64(stack, tokens, k, tile, pattern, dtype):
    fused = {"hopper", "ampere", "skinny"}
    assert choose_implementation(target_device(), "forward", dtype, stack, tile).name in fused
    experts_Mk = choices(tokens, k, EXPERTS, pattern)
    x, dy = (random_rows(tokens, width, dtype=dtype, seed=width) for width in SHAPE[::-1])

    @jax.jit
    def run(x, dy, weights, layer):
        groups = group_rows(jnp.asarray(experts_Mk), EXPERTS, tile)

        def mixed(x):
            return combine_rows(grouped_matmul(gather_rows(x, groups), weights, groups, layer), groups)

        y, vjp = jax.vjp(mixed, x)
        return y, *vjp(dy)

    y, dx = run(x, dy, stack, jnp.int32(LAYER))
    w_ENK = dense(stack)[LAYER]
    roundings = FUSED + 1  # the sum over choices is rounded once more
    for found, rows, w_EBA in ((y, x, w_ENK), (dx, dy, np.swapaxes(w_ENK, 1, 2))):
        expected = mixture(rows, w_EBA, experts_Mk, jnp.ones((tokens, k)))
        assert relative_error(found, expected) <= tolerance(dtype, w_EBA.shape[2], expected.size, roundings)
