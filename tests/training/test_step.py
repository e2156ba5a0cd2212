"""The training step on eight virtual devices against the step on one."""

import functools

import jax
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
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


@pytest.mark.parametrize(("sizes", "tied"), [((1, 8), False), ((2, 4), True)])
def test_tables_that_are_cut_change_losses_by_rounding_alone(sizes, tied):
    config = mesh_config(CUT_VOCABULARY, tie_word_embeddings=tied)
    parts, batch, mesh = mesh_parts(config), mesh_batch(config, SHAPE), make_mesh(*sizes)
    expected_grads, expected = gradients(parts, batch, None, remat="names")
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    grads, loss = gradients(place_parts(parts, mesh), batch, None, remat="names", mesh=mesh)
    np.testing.assert_allclose(loss.row_nll_AB, expected.row_nll_AB, rtol=1.4e-7)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < 1e-6


def test_dropout_does_not_depend_on_micro_batches_or_the_mesh():
    """1 x 16 and 4 x 4 rows on one device, and 1 x 16 on eight; other masks would change each row by more than 1e-5."""
    config = mesh_config(WHOLE_VOCABULARY)
    parts, key = mesh_parts(config, lora=LoraArgs(rank=16, dropout=0.3)), jax.random.key(3)
    one = mesh_batch(config, (1, 16, 32))
    four = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[2:]), one)
    expected_grads, expected = gradients(parts, one, key, remat="names")
    _, other = gradients(parts, one, jax.random.key(4), remat="names")
    assert np.min(np.abs(other.row_nll_AB / expected.row_nll_AB - 1)) > 1e-5
    mesh = make_mesh(2, 4)
    spread = jax.device_put(one, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    split = gradients(parts, four, key, remat="names")
    meshed = gradients(place_parts(parts, mesh), spread, key, remat="names", mesh=mesh)
    for grads, loss in (split, meshed):
        np.testing.assert_allclose(loss.row_nll_AB.ravel(), expected.row_nll_AB.ravel(), rtol=1e-6)
        assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < 2e-6
