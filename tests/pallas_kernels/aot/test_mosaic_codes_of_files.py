"""The kernels with codes of files, compiled for absent cards: registers, instructions, and a scanned step."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.ggml_tensor import held_bytes
from pallas_kernels.ggml_matmul import ggml_matmul
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.kernel_report import abstract_blocks, device_of_card
from pallas_kernels.nf4_matmul.mosaic import ampere, hopper, skinny
from pallas_kernels.nf4_matmul.mosaic.operands import Operands
from tests.marks import EXHAUSTIVE, SLOW
from tests.pallas_kernels.aot.test_mosaic_ampere import MOST_IN_A_LOOP, MOST_WITH_TMA
from tests.pallas_kernels.aot.test_mosaic_skinny import WEIGHTS_OF_A_THREAD
from tests.pallas_kernels.aot.test_mosaic_step import LAYERS, whole_weights

Abstract = jax.ShapeDtypeStruct
BF16 = jnp.bfloat16
LARGE, SMALL = ampere.LARGE, ampere.SMALL
SHAPE = 4096, 4096
# More instructions per round than NF4: forward, each group loads its scales; with TMA, up to 22 are NOPs.
MORE, MORE_WITH_TMA = 12, 22
MOST_ON_HOPPER = {"NVFP4_256": 350, "Q4_0": 380, "MXFP4": 350}


@functools.cache
def compile_product(compile_for, card, direction, tile, ggml_type, dtype=BF16):
    """Compiles a product and returns its kernel."""
    (n, k), block = SHAPE, BLOCK_FORMATS[ggml_type]

    def run(x, codes, layer, scales):
        weight = Operands(codes, layer, scales, block.code.table, SHAPE, block.code.group)
        if card == "h100":
            return getattr(hopper, f"{direction}_product")(x, weight, tile)
        return ampere.product(
            ampere.machine_for(device_of_card(card)[0])(direction, dtype, weight.table), x, weight, tile
        )

    codes = Abstract((LAYERS, n, held_bytes("split_k", ggml_type, k)), jnp.uint8)
    scales = Abstract((k // block.code.group, n), dtype)
    compiled = compile_for(card, run, Abstract((2048, 4096), dtype), codes, Abstract((1,), jnp.int32), scales)
    assert not compiled.spilled and not compiled.exceeding_shared_memory
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    assert kernel.registers <= 255 and kernel.shared_bytes <= CARDS[card].shared_memory_per_block
    return kernel


IN_CI = {"a100": tuple(MOST_IN_A_LOOP), "rtx5090": (("forward", SMALL), ("backward", LARGE))}
CASES = [
    pytest.param(card, *case, ggml_type, marks=SLOW if is_first and case in IN_CI.get(card, ()) else EXHAUSTIVE)
    for card in ("a100", "a6000", "rtx4090", "rtx5090", "gb10", "b200")
    for case in MOST_IN_A_LOOP
    for ggml_type, is_first in (("NVFP4_256", True), ("Q4_0", False), ("MXFP4", False))
]


@pytest.mark.parametrize(("card", "direction", "tile", "ggml_type"), CASES)
def test_every_tile_is_lean_machine_code(compile_for, card, direction, tile, ggml_type):
    kernel = compile_product(compile_for, card, direction, tile, ggml_type)
    with_tma = CARDS[card].compute_capability >= (9, 0)
    most, more = (MOST_WITH_TMA, MORE_WITH_TMA) if with_tma else (MOST_IN_A_LOOP, MORE)
    (loop,) = kernel.loops
    assert loop.instructions <= most[direction, tile] + more
    assert loop.opcodes["HMMA"] == tile.rows * 128 * 128 // (16 * 8 * 16) // 4
    assert loop.opcodes["LDL"] + loop.opcodes["STL"] == 0 and loop.opcodes["BAR"] == 1
    assert loop.opcodes["UTMALDG" if with_tma else "LDGSTS"] > 0


def test_a_tile_of_the_smallest_groups_compiles(compile_for):
    """Scales of 16 columns each are copied by 16 bytes per thread, and two blocks still fit an SM of an A100."""
    kernel = compile_product(compile_for, "a100", "forward", SMALL, "NVFP4_256")
    assert kernel.loops[0].opcodes["BAR"] == kernel.loops[0].opcodes["DEPBAR"] == 1
    assert 2 * (kernel.shared_bytes + 1024) <= CARDS["a100"].shared_memory_per_sm


HOPPER_TILES = [(way, tile) for way, tiles in hopper.TILES.items() for tile in tiles]


@pytest.mark.parametrize(
    ("direction", "tile", "ggml_type"),
    [
        pytest.param(*case, ggml_type, marks=SLOW if ggml_type == "NVFP4_256" and case[1].rows > 64 else EXHAUSTIVE)
        for case in HOPPER_TILES
        for ggml_type in MOST_ON_HOPPER
    ],
)
def test_every_tile_of_hopper_is_lean_machine_code(compile_for, direction, tile, ggml_type):
    kernel = compile_product(compile_for, "h100", direction, tile, ggml_type)
    assert kernel.registers <= 168 and kernel.loops[0].instructions <= MOST_ON_HOPPER[ggml_type]


@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", ["NVFP4_256", pytest.param("Q4_0", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("card", "rows", "most"), [("h100", 1, 3.7), ("a100", 16, 4.0), pytest.param("rtx5090", 1, 3.7, marks=EXHAUSTIVE)]
)
def test_few_rows_take_few_instructions_per_weight(compile_for, card, rows, most, ggml_type):
    (n, k), code = (4096, 14336), BLOCK_FORMATS[ggml_type].code

    def run(x, codes, layer, scales):
        return skinny.product(
            skinny.Machine(BF16, code.table), x, Operands(codes, layer, scales, code.table, (n, k), code.group)
        )

    codes = Abstract((LAYERS, n, held_bytes("split_k", ggml_type, k)), jnp.uint8)
    layer, scales = Abstract((1,), jnp.int32), Abstract((k // code.group, n), BF16)
    compiled = compile_for(card, run, Abstract((rows, k), BF16), codes, layer, scales)
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    (loop,) = kernel.loops
    assert not compiled.spilled and loop.instructions / WEIGHTS_OF_A_THREAD <= most
    assert loop.opcodes["HMMA"] == 16 * (2 if rows > 8 else 1)


def step_gradient(x, up, down):
    def layer(x, index):
        return x + ggml_matmul(jnp.tanh(ggml_matmul(x, up, index)), down, index), None

    def loss(x):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(LAYERS))
        return jnp.sum(y.astype(jnp.float32))

    return jax.grad(loss)(x)


def stacked(shape, ggml_type, platform):
    one = abstract_blocks(ggml_type, shape, platform)
    return jax.tree.map(lambda leaf: Abstract((LAYERS, *leaf.shape), leaf.dtype), one)


@pytest.mark.parametrize(
    ("card", "ggml_type"),
    [
        ("a100", "MXFP4"),
        *(pytest.param(card, "NVFP4_256", marks=SLOW) for card in ("h100", "rtx5090")),
        *(pytest.param("h100", ggml_type, marks=EXHAUSTIVE) for ggml_type in ("MXFP4", "Q4_0", "NVFP4_256_INV")),
    ],
)
def test_a_scanned_step_copies_no_codes_and_makes_no_weight(compile_for, card, ggml_type):
    width, inner, rows = 1024, 2816, 512
    shapes = [(inner, width), (width, inner)]
    weights = [stacked(shape, ggml_type, "gpu") for shape in shapes]
    compiled = compile_for(card, step_gradient, Abstract((rows, width), BF16), *weights)
    kernels = [kernel for kernel in compiled.kernels if "mosaic" in kernel.name]
    assert len(kernels) >= 4 and not compiled.spilled  # two products, forward and backward
    assert not whole_weights(compiled.text, shapes)


@pytest.mark.slow
def test_the_check_of_a_step_can_fail(compile_for):
    """Blocks in the order of the file are dequantized."""
    shapes = [(2816, 1024), (1024, 2816)]
    weights = [stacked(shape, "Q4_0", "cpu") for shape in shapes]
    assert whole_weights(compile_for("a100", step_gradient, Abstract((512, 1024), BF16), *weights).text, shapes)
