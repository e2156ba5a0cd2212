"""Shards of a weight dequantize bit for bit to the weight's parts; impossible cuts raise an error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.shards import shard, specs
from tests.pallas_kernels.nf4_matmul.contract import weight

MESH = AbstractMesh((8,), ("model",))


def parts(qt, cut):
    """Cuts NumPy leaves into eight shards by the specs, as shard_map does."""
    laid = specs(qt, cut, MESH, "model")

    def local(index):
        def one(leaf, spec):
            pieces = [np.split(leaf, 8, at)[index] for at, name in enumerate(spec) if name == "model"]
            return pieces[0] if pieces else leaf

        return shard(jax.tree.map(one, qt, laid), laid, cut, 8, jnp.int32(index))

    return [jax.tree.map(np.asarray, local(index)) for index in range(8)]


CUTS = [
    ("bnb", "N", (64, 192)),
    ("bnb", "N", (512, 256)),  # 256 blocks per shard: nested constants are cut too
    ("bnb", "K", (24, 1536)),
    ("bnb", "K", (64, 512)),  # one block of each row per shard
    ("row_planar", "K", (64, 1024)),
    ("split_k", "N", (512, 192)),  # a tail
    ("split_k", "N", (512, 256)),
    ("split_k", "K", (64, 1024)),
    ("split_k", "K", (128, 3072)),
    ("flat", "N", (64, 40)),  # 8 rows are 5 blocks
]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("layout", "cut", "shape"), CUTS)
def test_shards_are_parts_of_the_weight_to_the_bit(layout, cut, shape, double_quant):
    layers = [weight(shape, layout=layout, double_quant=double_quant, seed=seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    for qt in (jax.tree.map(np.asarray, layers[0]), stack):
        own = [dequantize_numpy(one, np.float32) for one in parts(qt, cut)]
        whole = np.concatenate(own, axis=-2 if cut == "N" else -1)
        np.testing.assert_array_equal(whole, dequantize_numpy(qt, np.float32))


def test_nested_constants_are_cut_where_shards_are_whole_nested_blocks():
    aligned = parts(jax.tree.map(np.asarray, weight((4096, 128))), "N")
    assert {one.nested_absmax.shape for one in aligned} == {(4,)} and aligned[0].nested_block_size == 256
    finer = parts(jax.tree.map(np.asarray, weight((64, 192))), "N")  # 24 blocks per shard
    assert {one.nested_absmax.shape for one in finer} == {(3,)} and finer[0].nested_block_size == 8


def test_what_can_not_be_cut_says_why():
    def refused(qt, cut, axis="model"):
        with pytest.raises(ValueError) as error:
            specs(qt, cut, MESH, axis)
        return str(error.value)

    assert "'row_planar' cannot be cut along N: a byte holds rows i and i + N/2" in refused(
        weight((64, 128), layout="row_planar"), "N"
    )
    assert "'flat' cannot be cut along K" in refused(weight((64, 128), layout="flat"), "K")
    assert "N=60 over 8 devices is 7.5 each" in refused(weight((60, 128)), "N")
    assert "K=576 over 8 devices is 72 each: layout 'bnb' with blocks of 64 requires multiples of 64" in refused(
        weight((64, 576)), "K"
    )
    assert "requires multiples of 128" in refused(weight((64, 512), layout="split_k"), "K")
    assert "N=256 over 8 devices is 32 each" in refused(weight((256, 128), layout="split_k"), "N")
    both = refused(weight((64, 128), layout="row_planar"), "N", axis="rows")
    assert "the mesh has axes 'model', not 'rows'" in both and "row_planar" in both


def test_specs_of_shapes_alone_are_those_of_arrays():
    qt = weight((512, 256), layout="split_k")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), qt)
    assert dataclasses.astuple(specs(abstract, "N", MESH, "model")) == dataclasses.astuple(
        specs(qt, "N", MESH, "model")
    )
