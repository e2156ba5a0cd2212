"""Groups: every pair has one slot in a tile of its expert, and rows move there, back, and in the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul import combine_rows, gather_rows, group_rows, weights_of_slots
from pallas_kernels.grouped_matmul.groups import choose_tile, most_tiles
from tests.marks import some_in_ci
from tests.pallas_kernels.grouped_matmul.experts import choices, random_rows

CASES = [
    (1, 1, 1, 1, "random"),
    (1, 2, 8, 1, "random"),
    (33, 2, 4, 8, "all to one"),
    *some_in_ci(
        [
            (40, 8, 128, 4, "random"),
            (64, 2, 8, 16, "empty experts"),
            (7, 1, 3, 128, "random"),
            (5, 2, 8, 4, "random"),
        ],
        lambda index: index < 3,
    ),
]


@pytest.mark.parametrize(("tokens", "k", "experts", "tile", "pattern"), CASES)
def test_every_pair_has_a_slot_of_its_expert_and_the_rest_is_padding(tokens, k, experts, tile, pattern):
    experts_Mk = choices(tokens, k, experts, pattern)
    groups = group_rows(jnp.asarray(experts_Mk), experts, tile)
    slots, pairs = np.asarray(groups.slot_of_pair_Mk).reshape(-1), tokens * k
    expert_of_tile = np.asarray(groups.expert_of_tile_I)
    np.testing.assert_array_equal(expert_of_tile[slots // tile], experts_Mk.reshape(-1))
    of_slot = np.full(len(groups.pair_of_slot_P), pairs)
    of_slot[slots] = np.arange(pairs)
    np.testing.assert_array_equal(groups.pair_of_slot_P, of_slot)
    order = of_slot[of_slot < pairs]  # stable: pairs of one expert stay in order
    np.testing.assert_array_equal(order, np.argsort(experts_Mk.reshape(-1), kind="stable"))
    rows_of_expert = np.bincount(experts_Mk.reshape(-1), minlength=experts)
    assert int(groups.tiles) == sum(-(-rows_of_expert // tile)) <= len(expert_of_tile)
    assert (np.diff(expert_of_tile) >= 0).all()


@pytest.mark.parametrize(("pairs", "experts", "tile"), [(1, 8, 1), (16, 128, 4), (129, 4, 64), (96, 8, 16), (8, 1, 3)])
def test_the_number_of_tiles_is_that_of_the_worst_choice_and_within_the_bound(pairs, experts, tile):
    """The worst choice gives each expert in use one row more than whole tiles."""
    in_use = min(experts, pairs)
    worst = np.arange(in_use)  # a row for each, then whole tiles for the first
    worst = np.concatenate([worst, np.zeros(pairs - in_use, np.int64)])
    needed = sum(-(-np.bincount(worst) // tile))
    assert needed == most_tiles(pairs, experts, tile) <= -(-pairs // tile) + in_use


@pytest.mark.parametrize("dtype", some_in_ci([(jnp.float32,), (jnp.bfloat16,)], lambda index: index == 0))
def test_rows_and_gradients_move_as_autodiff_of_plain_indexing_moves_them(dtype):
    tokens, k, experts = 21, 3, 6
    experts_Mk = jnp.asarray(choices(tokens, k, experts))
    groups = group_rows(experts_Mk, experts, 4)
    x, weights = random_rows(tokens, 8, dtype=dtype), random_rows(tokens, k, seed=4)
    scale_P = random_rows(len(groups.pair_of_slot_P), 1, seed=5).astype(dtype)

    def moved(x, weights):
        weight_P = weights_of_slots(weights, groups)
        scaled_PK = (gather_rows(x, groups) * scale_P).astype(jnp.float32)
        return combine_rows((scaled_PK * weight_P[:, None]).astype(dtype), groups)

    def plain(x, weights):
        y = x[:, None] * scale_P[groups.slot_of_pair_Mk]
        return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1).astype(dtype)

    @jax.jit
    def both(x, weights):
        (y, vjp), (expected, expected_vjp) = (jax.vjp(way, x, weights) for way in (moved, plain))
        return (y, *vjp(expected)), (expected, *expected_vjp(expected))

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for ours, theirs in zip(*both(x, weights), strict=True):
        assert ours.dtype == theirs.dtype
        found, wanted = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    padding = np.asarray(groups.pair_of_slot_P) == tokens * k
    assert padding.any() and not np.asarray(gather_rows(x, groups), np.float32)[padding].any()


def test_the_tile_follows_the_mean_number_of_rows_per_expert():
    cpu, gpu = Device(platform="cpu", kind="cpu"), Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
    assert [choose_tile(cpu, rows * 8, 8) for rows in (0, 1, 100, 512, 9999)] == [1, 1, 16, 128, 128]
    assert [choose_tile(gpu, rows * 128, 128) for rows in (1, 8, 9, 255, 256)] == [8, 8, 64, 64, 128]
    assert group_rows(jnp.asarray(choices(64, 2, 8)), 8).tile == choose_tile(cpu, 128, 8) == 4


def test_empty_groups_are_refused():
    with pytest.raises(ValueError, match=r"not positive \(found experts \[0, 2\]"):
        group_rows(jnp.zeros((0, 2), jnp.int32), 4)
    with pytest.raises(ValueError, match="tile=0"):
        group_rows(jnp.zeros((2, 2), jnp.int32), 4, 0)
