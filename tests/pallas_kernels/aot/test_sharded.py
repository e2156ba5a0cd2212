"""A step on eight absent cards: it uses the fused kernels, and the cards exchange no weights."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.formats.shards import specs
from pallas_kernels.nf4_matmul.sharded import column_parallel, row_parallel
from tests.pallas_kernels.aot.test_mosaic_step import BF16, LAYERS, Abstract, stacked, whole_weights
from tests.pallas_kernels.nf4_matmul.collectives import largest_moved, moved

CARDS = 8
MESH = AbstractMesh((CARDS,), ("model",), (AxisType.Auto,))
WIDTH, INNER, ROWS = 1024, 4096, 384  # no array of rows has the shape of a card's part of a weight
SHAPES = [(INNER, WIDTH), (WIDTH, INNER)]
PARTS = [(INNER // CARDS, WIDTH), (WIDTH, INNER // CARDS)]


def laid(shape, cut):
    weights = stacked(shape)
    return jax.tree.map(
        lambda leaf, spec: Abstract(leaf.shape, leaf.dtype, sharding=NamedSharding(MESH, spec)),
        weights,
        specs(weights, cut, MESH, "model"),
    )


def step(products, rows):
    first, second = products

    def gradient(x, up, down):
        def layer(x, index):
            inner = jnp.tanh(first(x, up, index, MESH, "model", rows))
            return x + second(inner, down, index, MESH, "model", rows), None

        def loss(x):
            y, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(LAYERS))
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(loss)(x)

    return gradient


@pytest.mark.parametrize(
    ("card", "rows", "expected"),
    [
        pytest.param("h100", P(), {("all-reduce", "f32")}, marks=pytest.mark.slow),
        pytest.param("a100", P("model"), {("all-gather", "bf16"), ("reduce-scatter", "f32")}, marks=pytest.mark.slow),
    ],
)
def test_kernels_multiply_each_cards_part_and_no_weight_is_made(compile_for, card, rows, expected):
    x = Abstract((ROWS, WIDTH), BF16, sharding=NamedSharding(MESH, rows))
    weights = laid(SHAPES[0], "N"), laid(SHAPES[1], "K")
    compiled = compile_for(card, step((column_parallel, row_parallel), rows), x, *weights)
    assert len([kernel for kernel in compiled.kernels if "mosaic" in kernel.name]) >= 4 and not compiled.spilled
    assert moved(compiled.text) == expected
    assert largest_moved(compiled.text) <= ROWS * WIDTH  # rows of the residual stream
    assert not whole_weights(compiled.text, SHAPES) and not whole_weights(compiled.text, PARTS)
    codes = sum(LAYERS * n * k // 2 for n, k in SHAPES)
    assert codes / CARDS <= compiled.memory.device.arguments <= 1.1 * codes / CARDS + ROWS * WIDTH * 2


def test_arguments_on_several_meshes_are_refused(compile_for):
    other = AbstractMesh((2,), ("model",), (AxisType.Auto,))
    arrays = [Abstract((8, 8), BF16, sharding=NamedSharding(mesh, P())) for mesh in (MESH, other)]
    with pytest.raises(ValueError, match="several meshes"):
        compile_for("h100", lambda x, y: x + y, *arrays)
