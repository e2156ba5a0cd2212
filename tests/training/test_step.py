"""The training step on eight virtual devices against the step on one."""

import functools

import jax
import numpy as np
import pytest

from qlora_jax.models.partition import ModelParts
from qlora_jax.models.sharded_parts import place_parts
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.step import evaluation_loss, gradients
from tests.training.mesh_models import CUT_VOCABULARY, WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts

SHAPE = (2, 8, 64)
MESHES = [(1, 8), (2, 4), (8, 1)]
CASES = [
    (dtype, remat, mesh)
    for dtype in ("float32", "bfloat16")
    for remat in ("names", "full", "none")
    for mesh in MESHES
    if remat != "none" or mesh == (8, 1)  # `none` would keep every gathered layer, and is refused with fsdp
]


@functools.cache
def parts_of(vocabulary: int, dtype: str) -> ModelParts:
    return mesh_parts(mesh_config(vocabulary), dtype=dtype)


@functools.cache
def on_one_device(vocabulary: int, dtype: str, remat: str):
    return gradients(parts_of(vocabulary, dtype), mesh_batch(mesh_config(vocabulary), SHAPE), None, remat=remat)


def on_mesh(vocabulary: int, dtype: str, remat: str, sizes: tuple[int, int]):
    mesh = make_mesh(*sizes)
    batch = jax.device_put(
        mesh_batch(mesh_config(vocabulary), SHAPE), named(mesh, jax.sharding.PartitionSpec(None, ROWS))
    )
    return gradients(place_parts(parts_of(vocabulary, dtype), mesh), batch, None, remat=remat, mesh=mesh)


def relative(found: jax.Array, expected: jax.Array) -> float:
    found_, expected_ = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found_ - expected_) / np.linalg.norm(expected_))


@pytest.mark.parametrize(("dtype", "remat", "sizes"), CASES)
def test_losses_equal_one_device_to_the_bit(dtype, remat, sizes):
    expected_grads, expected = on_one_device(WHOLE_VOCABULARY, dtype, remat)
    grads, loss = on_mesh(WHOLE_VOCABULARY, dtype, remat, sizes)
    np.testing.assert_array_equal(loss.row_nll_AB, expected.row_nll_AB)
    assert loss.nll == expected.nll and loss.tokens == expected.tokens
    off = jax.tree.map(relative, grads, expected_grads)
    assert max(jax.tree.leaves(off)) < (1e-6 if dtype == "float32" else 2e-2), off


def test_the_loss_of_an_evaluation_equals_one_device_to_the_bit():
    parts, mesh = parts_of(WHOLE_VOCABULARY, "float32"), make_mesh(2, 4)
    batch = jax.tree.map(lambda leaf: leaf[0], mesh_batch(mesh_config(WHOLE_VOCABULARY), SHAPE))
    expected = evaluation_loss(parts, batch)
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(ROWS)))
    np.testing.assert_array_equal(evaluation_loss(place_parts(parts, mesh), batch, mesh=mesh), expected)


def test_each_device_has_its_share():
    parts, mesh = parts_of(CUT_VOCABULARY, "float32"), make_mesh(1, 8)
    placed = place_parts(parts, mesh)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    uncut = [leaf.nbytes for leaf in jax.tree.leaves(placed) if leaf.is_fully_replicated]
    assert on_first == (whole - sum(uncut)) // 8 + sum(uncut)
    assert sum(uncut) < 0.02 * whole
