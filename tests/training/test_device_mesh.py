"""Batches on a mesh: each device has its own rows, all of them together the batch."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, MeshSize, ModelArgs, TrainArgs
from qlora_jax.objectives.router_losses import FILLED
from qlora_jax.training.device_mesh import (
    local_devices,
    mesh_size,
    place_batch,
    replicate,
    rows_of_batch,
    rows_that_divide,
    run_mesh,
)


@pytest.mark.parametrize("size", [MeshSize(1, 8), MeshSize(2, 4), MeshSize(8, 1), MeshSize(1, 2)])
def test_each_device_has_its_own_rows_in_the_order_of_the_batch(size):
    mesh, batch = run_mesh(size), {"inputs": np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3)}
    placed = place_batch(batch, mesh)["inputs"]
    np.testing.assert_array_equal(placed, batch["inputs"])
    rows = 8 // size.devices
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.index[1].start or 0)
    assert [shard.device for shard in shards] == list(mesh.devices.flat) == local_devices(mesh)
    for number, shard in enumerate(shards):
        np.testing.assert_array_equal(shard.data, batch["inputs"][:, number * rows : (number + 1) * rows])
    one = place_batch({"weights": np.ones((8, 3), np.float32)}, mesh)["weights"]
    assert {shard.data.shape for shard in one.addressable_shards} == {(rows, 3)}
    filled = np.arange(16, dtype=np.int32).reshape(2, 8, 1)
    both = place_batch(batch | {FILLED: filled}, mesh)
    np.testing.assert_array_equal(both[FILLED], filled)
    assert {shard.data.shape for shard in both[FILLED].addressable_shards} == {(2, rows, 1)}
    assert both["inputs"].sharding == place_batch(batch, mesh)["inputs"].sharding


def test_one_device_has_no_mesh_and_arrays_stay_as_they_are():
    batch = {"inputs": np.zeros((1, 1, 4), np.int32)}
    key = jax.random.key(0)
    assert run_mesh(MeshSize(1, 1)) is None and local_devices(None) == jax.local_devices()[:1]
    assert place_batch(batch, None)["inputs"] is batch["inputs"] and replicate(key, None) is key
    assert mesh_size(None) == (1, 1) and mesh_size(run_mesh(MeshSize(2, 4))) == (2, 4)


def test_a_key_is_whole_on_all_devices_and_folds_to_the_same():
    key, mesh = jax.random.key(3), run_mesh(MeshSize(2, 4))
    folded = jax.random.fold_in(replicate(key, mesh), 5)
    assert folded.sharding.is_fully_replicated and folded.sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_array_equal(jax.random.key_data(folded), jax.random.key_data(jax.random.fold_in(key, 5)))


@pytest.mark.parametrize(("size", "rows"), [((1, 1), 8), ((2, 4), 8), ((1, 3), 9), ((2, 3), 12)])
def test_rows_of_an_evaluation_divide_over_the_devices(size, rows):
    assert rows_that_divide(8, run_mesh(MeshSize(*size))) == rows


def test_a_pass_has_no_more_rows_than_a_micro_batch_but_a_row_per_device():
    def rows(size, mesh):
        config = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o")
        return rows_of_batch(dataclasses.replace(config, train=TrainArgs(micro_batch_size=size)), mesh)

    assert [rows(size, None) for size in (1, 3, 8, 64)] == [1, 3, 8, 8]
    assert [rows(size, run_mesh(MeshSize(1, 2))) for size in (1, 3, 64)] == [2, 4, 8]
