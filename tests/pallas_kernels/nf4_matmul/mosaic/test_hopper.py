"""The Hopper kernels' twins, interpreted with the race detector; broken copies must be detected."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.nf4_matmul.mosaic import code_lookup, hopper
from pallas_kernels.nf4_matmul.mosaic.hopper import Tile
from pallas_kernels.nf4_matmul.mosaic.operands import operands
from pallas_kernels.nf4_matmul.shapes import REDUCED
from tests.marks import some_in_ci
from tests.pallas_kernels.nf4_matmul import twins
from tests.pallas_kernels.nf4_matmul.jaxprs import equations, loops, names
from tests.pallas_kernels.nf4_matmul.twins import DETECTING, LAYERS, stack

BF16, F16 = jnp.bfloat16, jnp.float16
PRODUCTS = {"forward": hopper.forward_product, "backward": hopper.backward_product}


def twin_of(direction, tile):
    """(x, operands) -> product, interpreted."""
    return lambda x, weight: PRODUCTS[direction](x, weight, tile, DETECTING)


def check(direction, rows, shape, tile, dtype, weights=None, layer=1):
    weights = stack(shape) if weights is None else weights
    twins.check(twin_of(direction, tile), direction, rows, weights, dtype, layer)


# Rows equal and close to a tile's, one step and many, half a block of N, a tail of K, both dtypes.
CASES = [
    (1, (64, 64), Tile(64, 4), BF16),
    (7, (128, 192), Tile(64, 4), F16),
    (16, (192, 320), Tile(64, 2), BF16),
    (65, (128, 128), Tile(128, 4), F16),
    (128, (320, 256), Tile(128, 4), BF16),
    (300, (192, 192), Tile(128, 3), BF16),
]


@pytest.mark.parametrize("direction", PRODUCTS)
@pytest.mark.parametrize(("rows", "shape", "tile", "dtype"), CASES)
def test_the_twins_compute_the_product_without_a_race(direction, rows, shape, tile, dtype):
    check(direction, rows, shape, tile, dtype)


EVERY_SHAPE = [
    (direction, *case)
    for direction, tiles in hopper.TILES.items()
    for case in twins.covering(REDUCED, twins.ROWS, list(itertools.product(tiles, (BF16, F16))))
]


@pytest.mark.parametrize(
    ("direction", "shape", "rows", "variant"), some_in_ci(EVERY_SHAPE, lambda i: i % twins.IN_CI == 0)
)
def test_the_twins_on_every_reduced_shape(direction, shape, rows, variant):
    check(direction, rows, shape, *variant)


@pytest.mark.parametrize("direction", PRODUCTS)
@pytest.mark.parametrize("quant_type", twins.OTHER_TABLES)
def test_other_tables_ride_along(direction, quant_type):
    check(direction, 16, (64, 192), Tile(64, 4), BF16, stack((64, 192), quant_type, double_quant=False))


@pytest.mark.parametrize("direction", PRODUCTS)
def test_each_layer_of_a_stack_is_read(direction):
    for layer in (0, LAYERS - 1):  # all other tests read the layer between
        check(direction, 16, (64, 128), Tile(64, 4), BF16, layer=layer)


def test_blocks_of_128_columns():
    narrow = stack((64, 256), double_quant=False)
    wide = dataclasses.replace(narrow, block_size=128, absmax=narrow.absmax[:, ::2])
    check("forward", 16, (64, 256), Tile(64, 4), BF16, wide)


def test_tiles_grow_with_the_work_and_not_beyond_a_wave():
    assert hopper.best_tile("forward", 1, 4096).rows == 64
    assert hopper.best_tile("forward", 128, 4096).rows == 64  # 64 blocks and not 32
    assert hopper.best_tile("forward", 128, 11008).rows == 128  # 86 blocks in one wave and not 172 in two
    assert hopper.best_tile("forward", 2048, 1024).rows == 128  # 128 blocks in one wave; of 256 rows, half a wave
    assert hopper.best_tile("forward", 4096, 4096).rows == 256
    assert hopper.best_tile("backward", 4096, 11008).rows == 128


# Broken copies: each change is one line of the kernel


def caught(direction):
    return twins.caught(twin_of(direction, Tile(64, 2)), direction, 128, stack((128, 512)), BF16)


def without(monkeypatch, name):
    monkeypatch.setattr(hopper.plgpu, name, lambda *args, **kwargs: None)


@pytest.mark.parametrize("direction", PRODUCTS)
def test_the_unbroken_kernel_is_not_caught(direction):
    assert not caught(direction)


@pytest.mark.parametrize("direction", PRODUCTS)
@pytest.mark.parametrize("missing", ["commit_smem", "wait_smem_to_gmem"])
def test_a_missing_fence_or_wait_is_caught(monkeypatch, direction, missing):
    without(monkeypatch, missing)
    assert caught(direction)


@pytest.mark.parametrize("direction", PRODUCTS)
@pytest.mark.parametrize("broken", [0, 1, 2], ids=["rows", "codes", "scales"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_a_wrong_index_map_is_caught(monkeypatch, direction, broken, axis):
    name = f"_{direction}_blocks"
    right = getattr(hopper, name)

    def wrong(*args):
        blocks = right(*args)
        index_map = blocks[broken].index_map

        def moved(step):
            at = list(index_map(step))
            at[axis] = 1 - at[axis]
            return tuple(at)

        blocks[broken] = dataclasses.replace(blocks[broken], index_map=moved)
        return blocks

    monkeypatch.setattr(hopper, name, wrong)
    assert caught(direction)


@pytest.mark.parametrize("direction", PRODUCTS)
def test_a_wrong_layer_is_caught(monkeypatch, direction):
    product = PRODUCTS[direction]

    def of_the_first(x, weight, tile, interpret):
        return product(x, weight._replace(layer=0 * weight.layer), tile, interpret)

    monkeypatch.setitem(PRODUCTS, direction, of_the_first)
    assert caught(direction)


@pytest.mark.parametrize("direction", PRODUCTS)
def test_a_wrong_nibble_is_caught(monkeypatch, direction):
    right = code_lookup.select_pair
    monkeypatch.setattr(code_lookup, "select_pair", lambda *args, **kwargs: right(*args, **kwargs)[::-1])
    assert caught(direction)


# Not visible to the interpreter: wgmma runs until a wait


def traced(direction, interpret=None):
    """Returns the primitives of one pipeline step of a kernel, in order, nested ones included."""
    weights = stack((128, 512))
    x = jnp.zeros((128, 512 if direction == "forward" else 128), BF16)
    product = PRODUCTS[direction]
    jaxpr = jax.make_jaxpr(lambda x: product(x, operands(weights, 1, BF16), Tile(64, 2), interpret))(x)
    steps = [list(equations(body)) for body in loops(jaxpr.jaxpr) if "wgmma_ref" in map(str, names(body))]
    return steps[-1]  # the innermost


def hazards(step, late):
    """Returns the hazards of consecutive steps: shared memory released or overwritten while wgmma reads it."""
    running: set[int] = set()  # steps whose products may be running
    for number in range(4):
        for equation in step:
            name = equation.primitive.name
            if name == "wgmma_ref":
                running.add(number)
            elif name == "wgmma_wait":
                running.clear()
            elif name == "swap" and running:
                yield f"step {number} writes an operand while the products of {running} run"
            elif name == "barrier_arrive" and running & set(range(number - late + 1)):
                yield f"step {number} gives away what the products of {running} read"


@pytest.mark.parametrize("twin", [None, DETECTING], ids=["kernel", "twin"])
@pytest.mark.parametrize(("direction", "late"), [("forward", 0), ("backward", 1)])
def test_no_memory_is_reused_before_its_product_was_waited_for(monkeypatch, direction, late, twin):
    step = traced(direction, twin)
    issued = [equation.primitive.name for equation in step].count("wgmma_ref")
    assert issued == {"forward": 2, "backward": 1}[direction]
    assert not list(hazards(step, late))
    without(monkeypatch, "wgmma_wait")
    assert list(hazards(traced(direction, twin), late))


def test_nothing_stands_between_issue_and_wait_of_products_from_registers():
    order = [equation.primitive.name for equation in traced("forward")]
    issued = [at for at, name in enumerate(order) if name == "wgmma_ref"]
    between = set(order[issued[0] : order.index("wgmma_wait")])
    assert between <= {"wgmma_ref", "transpose_ref", "broadcast_in_dim", "mul", "add"}, between
