"""The twin of the mma.sync kernels, interpreted with the race detector; broken copies must be detected."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.nf4_matmul.mosaic import ampere
from pallas_kernels.nf4_matmul.mosaic.ampere import LARGE, SMALL, Tile, product
from pallas_kernels.nf4_matmul.mosaic.ampere_instructions import COPIES, Interpreted, Machine, TmaMachine
from pallas_kernels.nf4_matmul.mosaic.operands import operands
from pallas_kernels.nf4_matmul.shapes import REDUCED
from tests.marks import some_in_ci
from tests.pallas_kernels.nf4_matmul import twins
from tests.pallas_kernels.nf4_matmul.jaxprs import equations, loops
from tests.pallas_kernels.nf4_matmul.twins import DETECTING, LAYERS, stack

BF16, F16 = jnp.bfloat16, jnp.float16
DIRECTIONS = ("forward", "backward")


def twin_of(direction, dtype, tile, quant_type="nf4", twin=Interpreted):
    """(x, operands) -> product, interpreted."""
    instructions = twin(direction, dtype, CODE_TABLES[quant_type], DETECTING)
    return lambda x, weight: product(instructions, x, weight, tile)


def check(direction, rows, shape, tile, dtype, weights=None, layer=1):
    weights = stack(shape) if weights is None else weights
    twins.check(twin_of(direction, dtype, tile, weights.quant_type), direction, rows, weights, dtype, layer)


# Rows equal and close to a tile's, one round and many, halves of tiles and rounds, both dtypes.
CASES = [
    (1, (64, 64), SMALL, BF16),
    (7, (128, 192), SMALL, F16),
    (65, (192, 320), SMALL, BF16),
    (128, (128, 512), LARGE, F16),
    (300, (192, 192), LARGE, BF16),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "shape", "tile", "dtype"), CASES)
def test_the_twin_computes_the_product_without_a_race(direction, rows, shape, tile, dtype):
    check(direction, rows, shape, tile, dtype)


VARIANTS = list(itertools.product((SMALL, LARGE), (BF16, F16)))
EVERY_SHAPE = [(direction, *case) for direction in DIRECTIONS for case in twins.covering(REDUCED, twins.ROWS, VARIANTS)]


@pytest.mark.parametrize(
    ("direction", "shape", "rows", "variant"), some_in_ci(EVERY_SHAPE, lambda i: i % twins.IN_CI == 0)
)
def test_the_twin_on_every_reduced_shape(direction, shape, rows, variant):
    check(direction, rows, shape, *variant)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("quant_type", twins.OTHER_TABLES)
def test_other_tables_ride_along(direction, quant_type):
    check(direction, 16, (64, 192), SMALL, BF16, stack((64, 192), quant_type, double_quant=False))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_layer_of_a_stack_is_read(direction):
    for layer in (0, LAYERS - 1):  # all other tests read the layer between
        check(direction, 16, (64, 128), SMALL, BF16, layer=layer)


def test_the_larger_tile_where_it_costs_no_block_and_fills_the_card():
    def device(capability):
        return Device(platform="gpu", kind="", compute_capability=capability)

    assert ampere.tile_for(device((8, 0)), 4096, 14336) == SMALL
    assert ampere.tile_for(device((8, 6)), 512, 1024) == SMALL  # 32 blocks of 84
    assert ampere.tile_for(device((8, 6)), 512, 4096) == LARGE
    assert ampere.tile_for(device((8, 9)), 512, 4096) == SMALL
    assert ampere.tile_for(device((8, 9)), 1024, 4096) == LARGE
    assert ampere.tile_for(device((12, 0)), 512, 5888) == SMALL  # 184 blocks of 188
    assert ampere.tile_for(device((12, 0)), 512, 6144) == LARGE
    assert ampere.tile_for(device((12, 1)), 512, 1536) == ampere.tile_for(device((10, 0)), 256, 9472) == LARGE
    assert ampere.tile_for(device((12, 1)), 512, 1408) == ampere.tile_for(device((10, 0)), 256, 9344) == SMALL


# Broken copies: each changes one line of the kernel or of its twin


def caught(direction, twin=Interpreted):
    product = twin_of(direction, BF16, Tile(64, 2), twin=twin)
    return twins.caught(product, direction, 64, stack((384, 384)), BF16)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_unbroken_kernel_is_not_caught(direction):
    assert not caught(direction)


class WithoutWait(Interpreted):
    def wait(self, arrived, slot, younger):
        plgpu.commit_smem()


class WithoutFence(Interpreted):
    def wait(self, arrived, slot, younger):
        plgpu.barrier_wait(arrived[0].at[slot])


class OtherNibble(Interpreted):
    def weights(self, codes_s, scales_s, words):
        return super().weights(codes_s, scales_s, words)[::-1]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("twin", [WithoutWait, WithoutFence, OtherNibble])
def test_a_missing_wait_and_a_wrong_nibble_are_caught(direction, twin):
    assert caught(direction, twin)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("change", ["round", "run", "tile"])
def test_a_wrong_index_is_caught(monkeypatch, direction, change):
    right = ampere._Task.fetch

    def wrong(self, sources, targets, arrived, row, column_tile, k, slot):
        k = {"round": jnp.maximum(k - 1, 0)}.get(change, k)
        column_tile = {"tile": (column_tile + 1) % 3}.get(change, column_tile)
        task = self._replace(contracted=self.contracted - 64) if change == "run" else self
        return right(task, sources, targets, arrived, row, column_tile, k, slot)

    monkeypatch.setattr(ampere._Task, "fetch", wrong)
    assert caught(direction)


# Not visible to the interpreter: waits for cp.async count groups


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tile", [SMALL, LARGE])
def test_a_wait_leaves_in_flight_what_was_started_for_later_rounds(direction, tile):
    weights = stack((192, 320))
    x = jnp.zeros((128, 320 if direction == "forward" else 192), BF16)
    machine = Machine(direction, BF16, CODE_TABLES["nf4"])
    traced = jax.make_jaxpr(lambda x: product(machine, x, operands(weights, 1, BF16), tile))(x)
    (one_round,) = (body for body in loops(traced.jaxpr) if "wait_gmem_to_smem" in map(str, equations_by_name(body)))
    in_round = equations_by_name(one_round)
    assert len(in_round["copy_gmem_to_smem"]) == COPIES  # each a group; the scales are in the first
    (wait,) = in_round["wait_gmem_to_smem"]
    assert wait.params["n"] == (tile.steps - 2) * COPIES
    # Before the loop: the rounds that the first wait leaves in flight, and the one that it waits for.
    everywhere = equations_by_name(traced.jaxpr)
    assert len(everywhere["copy_gmem_to_smem"]) == tile.steps * COPIES


def order_of_a_round(direction, tile, instructions):
    """Returns the names of the equations of one round that copy, wait or read shared memory, in order."""
    weights = stack((192, 320))
    x = jnp.zeros((128, 320 if direction == "forward" else 192), BF16)
    traced = jax.make_jaxpr(lambda x: product(instructions, x, operands(weights, 1, BF16), tile))(x)
    ordered = {"barrier_wait", "commit_smem", "copy_gmem_to_smem", "wait_gmem_to_smem"}
    rounds = [
        [str(e.primitive) for e in equations(body) if str(e.primitive) in ordered] for body in loops(traced.jaxpr)
    ]
    (one_round,) = filter(None, rounds)
    return one_round


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tile", [SMALL, LARGE])
def test_with_tma_a_card_copies_and_waits_as_the_twin_does(direction, tile):
    """The race detector checks the twin, so its order must be the card's: wait, fence and barrier, then the copies."""
    table = CODE_TABLES["nf4"]
    found = [
        order_of_a_round(direction, tile, instructions)
        for instructions in (TmaMachine(direction, BF16, table), Interpreted(direction, BF16, table, DETECTING))
    ]
    assert found[0] == found[1] == ["barrier_wait", "commit_smem", *["copy_gmem_to_smem"] * (COPIES + 1)]
    (barriers,) = TmaMachine(direction, BF16, table).barriers(tile.steps)
    assert (barriers.num_arrivals, math.prod(barriers.num_barriers)) == (COPIES + 1, tile.steps)


def test_copies_are_by_tma_where_a_card_has_it():
    capabilities = {(8, 0): Machine, (8, 6): Machine, (8, 9): Machine}
    capabilities |= {(10, 0): TmaMachine, (12, 0): TmaMachine, (12, 1): TmaMachine}
    for capability, machine in capabilities.items():
        assert ampere.machine_for(Device(platform="gpu", kind="", compute_capability=capability)) is machine


def equations_by_name(jaxpr):
    found = collections.defaultdict(list)
    for equation in equations(jaxpr):
        found[equation.primitive.name].append(equation)
    return found
