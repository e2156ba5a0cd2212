"""The fused kernels with an expert per tile: their twins, interpreted with the race detector, and broken copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has the race detector's result

from pallas_kernels.grouped_matmul import gather_rows, group_rows, mosaic
from pallas_kernels.nf4_matmul.mosaic import ampere, ampere_instructions, hopper, skinny, skinny_instructions
from tests.ggml_codes import in_split_k, random_ggml
from tests.marks import some_in_ci
from tests.pallas_kernels.grouped_matmul.experts import choices, dense, quantized, random_rows
from tests.pallas_kernels.nf4_matmul.tolerances import relative_error, tolerance
from tests.pallas_kernels.nf4_matmul.twins import DETECTING

BF16 = jnp.bfloat16
EXPERTS, LAYER = 4, 1


def hopper_twin(direction, rows, weight):
    product = {"forward": hopper.forward_product, "backward": hopper.backward_product}[direction]
    return product(rows, weight, hopper.Tile(64, 2), DETECTING)


def ampere_twin(direction, rows, weight):
    machine = ampere_instructions.Interpreted(direction, BF16, weight.table, DETECTING)
    return ampere.product(machine, rows, weight, ampere.SMALL)


def skinny_twin(direction, rows, weight):
    return skinny.expert_product(skinny_instructions.Interpreted(BF16, weight.table, DETECTING), rows, weight)


# twin -> (rows per tile, tokens, (N, K), directions)
TWINS = {
    hopper_twin: (64, 40, (128, 192), ("forward", "backward")),
    ampere_twin: (64, 40, (128, 192), ("forward", "backward")),
    skinny_twin: (8, 6, (64, 512), ("forward",)),
}
CASES = [(twin, direction) for twin, (*_, directions) in TWINS.items() for direction in directions]
IN_CI = {(hopper_twin, "backward")}


@functools.cache
def stack(shape, ggml_type=None):
    """Makes a stack of experts in NF4, or in blocks of a file."""
    if ggml_type is None:
        return quantized(2, EXPERTS, shape, layout="split_k")
    return in_split_k(random_ggml(ggml_type, (2, EXPERTS), shape))


def interpreted(twin, direction, operands=mosaic.tile_operands, ggml_type=None):
    """Returns (relative error, allowed error, races, the rows of unused tiles) with NaN in the rows of unused tiles."""
    tile, tokens, shape, _ = TWINS[twin]
    groups = group_rows(jnp.asarray(choices(tokens, 2, EXPERTS, "empty experts")), EXPERTS, tile)
    weights = stack(shape, ggml_type)
    w_ENK = dense(weights)[LAYER]
    w_EAB = np.swapaxes(w_ENK, 1, 2) if direction == "forward" else w_ENK
    rows = gather_rows(random_rows(tokens, w_EAB.shape[1], dtype=BF16), groups)
    used = int(groups.tiles) * tile
    assert 0 < used < len(rows)
    given = rows.at[used:].set(jnp.nan)
    expert_of_slot = np.repeat(np.asarray(groups.expert_of_tile_I), tile)
    wanted = np.einsum("pa,pab->pb", np.asarray(rows, np.float64), w_EAB[expert_of_slot])[:used]
    try:
        run = jax.jit(lambda rows, weights, i: twin(direction, rows, operands(weights, groups, i, BF16, tile)))
        y = run(given, weights, jnp.int32(LAYER))
        races = interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert y.shape == (len(rows), w_EAB.shape[2]) and y.dtype == BF16
    return relative_error(y[:used], wanted), tolerance(BF16, w_EAB.shape[1], wanted.size), races, y[used:]


@pytest.mark.parametrize(("twin", "direction"), some_in_ci(CASES, lambda index: CASES[index] in IN_CI))
def test_each_tile_is_multiplied_by_its_expert_and_the_rest_is_zeros(twin, direction):
    error, allowed, races, unused = interpreted(twin, direction)
    assert error <= allowed and not races
    assert not np.asarray(unused, np.float32).any()


@pytest.mark.parametrize(("twin", "direction"), some_in_ci(CASES, lambda index: CASES[index][0] is ampere_twin))
def test_experts_in_blocks_of_a_file(twin, direction):
    """Experts of gpt-oss are in MXFP4."""
    error, allowed, races, unused = interpreted(twin, direction, ggml_type="MXFP4")
    assert error <= allowed and not races
    assert not np.asarray(unused, np.float32).any()


@pytest.mark.parametrize(("twin", "direction"), some_in_ci(CASES[::2], lambda index: False))
@pytest.mark.parametrize("broken", [0, 1], ids=["codes", "scales"])
def test_another_experts_codes_or_scales_are_caught(twin, direction, broken):
    def wrong(*args):
        weight = mosaic.tile_operands(*args)
        other = jnp.roll(weight.layer[broken], 1)
        return weight._replace(layer=weight.layer.at[broken].set(jnp.where(weight.layer[1] < 0, -1, other)))

    error, allowed, *_ = interpreted(twin, direction, wrong)
    assert not error <= 2 * allowed
