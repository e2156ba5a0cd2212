"""The machine code of every real shape for every card, through the op's dispatch, in both directions."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import DIRECTIONS
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.kernel_report import abstract_weight, device_of_card
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.mosaic import ampere
from pallas_kernels.nf4_matmul.mosaic.ampere_instructions import TmaMachine
from pallas_kernels.nf4_matmul.shapes import SHAPES
from tests.marks import some_in_ci
from tests.pallas_kernels.aot import test_mosaic_ampere, test_mosaic_hopper, test_mosaic_skinny

Abstract = jax.ShapeDtypeStruct
BF16 = jnp.bfloat16
REAL = sorted({shape.nk for shape in SHAPES.values()})
# An L40S runs what an RTX 4090 does, and so do cards of sm_120 and sm_121, see below.
CARDS_OF_ARCHITECTURES = ("h100", "a100", "a6000", "rtx4090", "rtx5090", "b200")
ROWS, FEW = (2048, 300), 16
# Instructions per round in excess of those for whole tiles: the position of the last run of 64, and its mask.
RAGGED = {ampere.SMALL: 20, ampere.LARGE: 32, "hopper": 15, "skinny": 20}


def products(x, dy, few, weight):
    """Computes y and dx of many rows, and y of few."""
    y, vjp = jax.vjp(lambda x: nf4_matmul(x, weight), x)
    return y, *vjp(dy), nf4_matmul(few, weight)


def compile_products(compile_for, card, shape, rows):
    """Returns {name: kernel}, three kernels."""
    n, k = shape
    x, dy, few = (Abstract(sizes, BF16) for sizes in ((rows, k), (rows, n), (FEW, k)))
    compiled = compile_for(card, products, x, dy, few, abstract_weight(shape, "split_k"))
    assert not compiled.spilled and not compiled.exceeding_shared_memory
    kernels = [kernel for kernel in compiled.kernels if kernel.tensor_core_instructions]
    return {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in kernels}


def most_instructions(card, shape, rows):
    """Returns {kernel: instructions of its loop}."""
    if card == "h100":
        most = {f"hopper_{way}": most + RAGGED["hopper"] for way, most in test_mosaic_hopper.MOST_IN_A_LOOP.items()}
    else:
        device = device_of_card(card)[0]
        tiles = {way: ampere.tile_for(device, rows, n) for way, n in zip(DIRECTIONS, shape, strict=True)}
        has_tma = ampere.machine_for(device) is TmaMachine
        whole = test_mosaic_ampere.MOST_WITH_TMA if has_tma else test_mosaic_ampere.MOST_IN_A_LOOP
        most = {f"ampere_{way}": whole[way, tile] + RAGGED[tile] for way, tile in tiles.items()}
    return most | {"skinny": 4 * test_mosaic_skinny.WEIGHTS_OF_A_THREAD + RAGGED["skinny"]}


FEWER = {("b200", 2048): 256, ("b200", 300): 200}  # on a B200 the kernel is used up to 256 rows
EVERYWHERE = [
    (card, shape, FEWER.get((card, rows), rows))
    for shape, rows in zip(REAL, itertools.cycle(ROWS), strict=False)
    for card in CARDS_OF_ARCHITECTURES
]


# The card that compiles a shape in CI: every second shape on one card, each card with both numbers of rows.
TURNS = {0: 0, 3: 1, 4: 2, 7: 3, 9: 0, 10: 1, 13: 2, 14: 3, 16: 4, 19: 4, 20: 5, 23: 5, 26: 4, 29: 0}


def in_turn(index: int) -> bool:
    """Selects the cases of TURNS."""
    shape, card = divmod(index, len(CARDS_OF_ARCHITECTURES))
    return TURNS.get(shape) == card


@pytest.mark.parametrize(("card", "shape", "rows"), some_in_ci(EVERYWHERE, in_turn))
def test_real_shapes_are_lean_machine_code(compile_for, card, shape, rows):
    kernels = compile_products(compile_for, card, shape, rows)
    most = most_instructions(card, shape, rows)
    assert sorted(kernels) == sorted(most)
    for name, kernel in kernels.items():
        assert kernel.shared_bytes <= CARDS[card].shared_memory_per_block, name
        assert all(loop.instructions <= most[name] for loop in kernel.loops), name  # one round has no loop


def without_architecture(kernels):
    """Returns the kernels as for one architecture."""
    return {name: kernel._replace(architecture="") for name, kernel in kernels.items()}


@pytest.mark.parametrize(
    ("card", "other"),
    some_in_ci([("rtx4090", "l40s"), ("rtx5090", "gb10"), ("rtx5090", "rtxpro6000")], lambda i: i < 1),
)
def test_cards_with_the_same_instructions_run_the_same_code(compile_for, card, other):
    one, two = (
        without_architecture(compile_products(compile_for, name, (4096, 14336), 2048)) for name in (card, other)
    )
    assert one == two


def test_one_real_shape_of_each_kind_of_card(compile_for):
    """Tests SmolLM2's shapes, with a tail, on cards whose kernels differ: the part of these tests that is not slow."""
    for card in ("h100", "a100"):
        test_real_shapes_are_lean_machine_code(compile_for, card, (576, 1536), 300)
