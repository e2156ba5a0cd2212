"""The machine code of the Hopper kernels: registers, spills, shared memory and loops."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.kernel_report import abstract_weight
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.mosaic import hopper
from pallas_kernels.nf4_matmul.mosaic.operands import Operands

Abstract = jax.ShapeDtypeStruct
BF16, F16 = jnp.bfloat16, jnp.float16
LAYERS = 4
PRODUCTS = {"forward": hopper.forward_product, "backward": hopper.backward_product}
EVERY_TILE = [(direction, tile) for direction, tiles in hopper.TILES.items() for tile in tiles]

# Instructions that a warp issues for 64 x 128 weights, decoded and multiplied: those of a step of the pipeline.
MOST_IN_A_LOOP = {"forward": 357, "backward": 369}
MORE_WITH_TWO_STAGES = 5  # the loop of the 256-row tile computes its stage differently; it does twice the work
REGISTERS = 65536 // (3 * 128) // 8 * 8  # the most with which three warpgroups can be launched


@functools.cache
def compile_product(compile_for, direction, tile, rows, shape, dtype, layers=LAYERS):
    """Compiles a product for an H100 and returns its only kernel."""
    (n, k), width = shape, shape[direction == "forward"]
    groups = -(-k // 128)
    table = CODE_TABLES["nf4"]

    def run(x, codes, layer, scales):
        return PRODUCTS[direction](x, Operands(codes, layer, scales, table, shape), tile)

    codes, layer = Abstract((layers, n, 64 * groups), jnp.uint8), Abstract((1,), jnp.int32)
    compiled = compile_for("h100", run, Abstract((rows, width), dtype), codes, layer, Abstract((2 * groups, n), dtype))
    assert not compiled.spilled and not compiled.exceeding_shared_memory
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    return kernel


@pytest.mark.parametrize(("direction", "tile"), EVERY_TILE)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)])
def test_every_tile_is_lean_machine_code(compile_for, direction, tile, dtype):
    kernel = compile_product(compile_for, direction, tile, 2048, (8192, 8192), dtype)
    assert kernel.registers <= REGISTERS and kernel.stack_bytes == 0
    assert kernel.shared_bytes <= CARDS["h100"].shared_memory_per_block
    (loop,) = kernel.loops
    assert loop.instructions <= MOST_IN_A_LOOP[direction] + (MORE_WITH_TWO_STAGES if tile.rows == 256 else 0)
    # 64 x 128 weights against the tile's rows: 8 products of 64 x 16 by all rows, nothing between them and one wait.
    assert loop.opcodes["HGMMA"] == 8 and loop.opcodes["LDL"] + loop.opcodes["STL"] == 0


@pytest.mark.parametrize(("direction", "tile"), EVERY_TILE)
def test_integer_units_are_busy_for_less_time_than_tensor_cores(compile_for, direction, tile):
    """Limits per cycle: half a warp of integers, 4096 FLOP of tensor cores per SM. Two warpgroups, four schedulers."""
    (loop,) = compile_product(compile_for, direction, tile, 2048, (8192, 8192), BF16).loops
    integer = sum(loop.opcodes[name] for name in ("PRMT", "LOP3", "SHF", "SEL", "LEA", "ISETP", "VIADD", "IADD3"))
    tensor_cycles = 2 * (2 * 64 * 128 * tile.rows) / 4096
    if tile.rows >= 128:
        assert 2 * 2 * integer <= tensor_cycles and 2 * loop.instructions <= tensor_cycles


@pytest.mark.slow
@pytest.mark.parametrize("direction", PRODUCTS)
def test_a_stack_of_more_than_four_gib_of_codes(compile_for, direction):
    """LLaMA-65B's largest stack: positions in it are TMA coordinates, not 32-bit offsets."""
    kernel = compile_product(compile_for, direction, hopper.TILES[direction][1], 512, (22016, 8192), BF16, layers=80)
    assert kernel.loops[0].instructions <= MOST_IN_A_LOOP[direction]


def test_a_mapped_product_is_one_kernel(compile_for):
    def mapped(x, weight):
        return jax.vmap(lambda x: nf4_matmul(x, weight))(x)

    compiled = compile_for("h100", mapped, Abstract((4, 128, 1024), BF16), abstract_weight((512, 1024), "split_k"))
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    assert kernel.opcodes["HGMMA"] > 0
    assert "while(" not in compiled.text
