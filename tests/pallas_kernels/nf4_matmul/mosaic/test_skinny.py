"""The kernel for few rows: its registers as arrays over 128 threads, its interpreted twin, broken copies of both."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.nf4_matmul.mosaic import inline_ptx, skinny, skinny_instructions
from pallas_kernels.nf4_matmul.mosaic.skinny import product
from pallas_kernels.nf4_matmul.mosaic.skinny_instructions import Interpreted
from pallas_kernels.nf4_matmul.shapes import SHAPES
from tests.pallas_kernels.mosaic.registers import threads
from tests.pallas_kernels.nf4_matmul import ptx, twins
from tests.pallas_kernels.nf4_matmul.twins import DETECTING, stack

BF16, F16 = jnp.bfloat16, jnp.float16


def twin_of(dtype, quant_type="nf4", twin=Interpreted):
    """(x, operands) -> product, interpreted."""
    instructions = twin(dtype, CODE_TABLES[quant_type], DETECTING)
    return lambda x, weight: product(instructions, x, weight)


def check(rows, shape, dtype, weights=None, layer=1):
    weights = stack(shape) if weights is None else weights
    twins.check(twin_of(dtype, weights.quant_type), "forward", rows, weights, dtype, layer)


# One row, two that share a load, a full tile, two tiles; one step, several, a last one that overlaps, K below a step.
CASES = [
    (1, (64, 512), BF16),
    (2, (64, 576), F16),
    (7, (64, 1024), BF16),
    (16, (64, 1344), F16),
    (1, (64, 192), BF16),
]


@pytest.mark.parametrize(("rows", "shape", "dtype"), CASES)
def test_the_twin_computes_the_product_without_a_race(rows, shape, dtype):
    check(rows, shape, dtype)


# A step is 512 columns, so reduced shapes keep K modulo 512 after a whole step; 64 rows of N are two blocks.
STEP = 2 * skinny.STEP_BYTES
REDUCED = sorted({(64, STEP + shape.k % STEP) for shape in SHAPES.values()})


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rows", "dtype"), twins.covering(REDUCED, (1, 2, 7, 16), (BF16, F16)))
def test_the_twin_on_every_reduced_shape(shape, rows, dtype):
    check(rows, shape, dtype)


@pytest.mark.parametrize("quant_type", twins.OTHER_TABLES)
def test_other_tables_ride_along(quant_type):
    check(2, (64, 512), BF16, stack((64, 512), quant_type, double_quant=False))


def test_the_first_layer_of_a_stack_is_read():
    check(2, (64, 576), BF16, layer=0)


# Broken copies


def caught(twin=Interpreted):
    return twins.caught(twin_of(BF16, twin=twin), "forward", 2, stack((64, 1344)), BF16)


def test_the_unbroken_kernel_is_not_caught():
    assert not caught()


def test_a_wrong_nibble_is_caught(monkeypatch):
    right = skinny_instructions.select_pair
    monkeypatch.setattr(skinny_instructions, "select_pair", lambda *args: right(*args)[::-1])
    assert caught()


@pytest.mark.parametrize("moved", [dict(step=1), dict(column=32)])
def test_a_wrong_index_is_caught(monkeypatch, moved):
    right = skinny._Task.load

    def wrong(self, x_g, codes_g, scales_g, column, step):
        step = jnp.maximum(step - moved.get("step", 0), 0)
        return right(self, x_g, codes_g, scales_g, (column + moved.get("column", 0)) % 64, step)

    monkeypatch.setattr(skinny._Task, "load", wrong)
    assert caught()


def test_what_the_last_step_repeats_must_not_count():
    class Repeats(Interpreted):
        def groups(self, count):
            return super().groups(count) + 8

    assert caught(Repeats)


# Registers: `dots` on arrays over 128 threads, with mma.sync as the manual defines it


def multiply(weights, values, sums):
    """mma.sync.m16n8k16 of four warps; registers [128, 2], sums four of [128]."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    result = [np.zeros(128, np.int64) for _ in range(4)] if sums[0] is None else [one.copy() for one in sums]
    for warp in range(4):
        lanes = slice(32 * warp, 32 * warp + 32)
        a, b = np.zeros((16, 16), np.int64), np.zeros((16, 8), np.int64)
        for e in range(2):
            for register, (row, column) in zip(weights, [(0, 0), (8, 0), (0, 8), (8, 8)], strict=True):
                a[g + row, 2 * t + column + e] = register[lanes, e]
            for register, row in zip(values, (0, 8), strict=True):
                b[2 * t + row + e, g] = register[lanes, e]
        for at in range(4):
            result[at][lanes] += (a @ b)[g + 8 * (at // 2), 2 * t + at % 2]
    return result


TABLE = np.arange(16) * 3 - 20


def look_up(packed, s):
    four = packed[:, 4 * s : 4 * s + 4]
    low, high = TABLE[four & 15], TABLE[four >> 4]
    return low[:, :2], high[:, :2], low[:, 2:], high[:, 2:]


ALU = skinny_instructions.Alu(
    look_up=look_up,
    values=lambda register, s: (register[:, 4 * s : 4 * s + 2], register[:, 4 * s + 2 : 4 * s + 4]),
    multiply=multiply,
    add=lambda sums, scales, q, found: sums + scales[:, q, None] * np.stack(list(found), axis=1),
    scale=lambda values, scales, q: values * scales[:, q, None],
    split=lambda sums: [sums[:, v] for v in range(2)],
    join=lambda sums: np.stack(list(sums), axis=1),
)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tile_rows", [2, 8])
@pytest.mark.parametrize("alu", [ALU, ALU._replace(look_up=lambda *args: look_up(*args)[::-1])], ids=["right", "wrong"])
def test_threads_multiply_what_the_equation_says(groups, tile_rows, alu):
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (32, 256)), rng.integers(1, 9, (8 * groups, 32))
    x, sums = rng.integers(-9, 9, (2, tile_rows, 512)), rng.integers(-9, 9, (2, 128, 8))
    layout = skinny_instructions.ROWS if tile_rows == 8 else skinny_instructions.TWO_ROWS
    dots = skinny_instructions.dots if groups == 1 else skinny_instructions.dots_of_groups
    found = dots(
        [threads(one, skinny_instructions.SUMS).reshape(4) for one in sums],
        [threads(one, layout).reshape(2) for one in x],
        threads(codes, skinny_instructions.CODES).reshape(4),
        threads(scales, skinny_instructions._of_scales(8 * groups)).reshape(2),
        alu,
    )
    weights = np.stack([TABLE[codes & 15], TABLE[codes >> 4]]).reshape(2, 32, 4, 64)  # run, row, warp, byte
    x_all = np.tile(x, (1, 8 // tile_rows, 1)).reshape(2, 8, 4, 2, 64)
    factors = np.repeat(scales.reshape(4, 2, groups, 32), 64 // groups, axis=2)  # warp, run, byte, row
    runs = np.einsum("rnwc,wrcn,pmwrc->pwrnm", weights, factors, x_all)
    expected = sums + runs.sum(axis=2).reshape(2, 128, 8)
    same = [
        np.array_equal(mine, theirs)
        for one, other in zip(found, expected, strict=True)
        for mine, theirs in zip(one, threads(other, skinny_instructions.SUMS).reshape(4), strict=True)
    ]
    assert all(same) == (alu is ALU)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_the_assembly_is_the_table_for_every_pair_of_bytes(quant_type, dtype):
    table, values = CODE_TABLES[quant_type], ptx.table_bits(quant_type, dtype)
    halves = np.arange(65536, dtype=np.uint32)
    words = np.concatenate([halves | halves[::-1] << 16, halves << 16 | 0xA5C3])
    constants = [np.full_like(words, word[0].view(np.uint32)) for word in inline_ptx.constant_words(table, dtype)]
    found = ptx.run(inline_ptx.look_up_word_ptx(table, dtype), [words, *constants], 4)
    pairs = [(half, nibble) for half in (words & 0xFFFF, words >> 16) for nibble in range(2)]
    for mine, (half, nibble) in zip(found, pairs, strict=True):
        np.testing.assert_array_equal(mine, ptx.two_values(half, nibble, nibble + 2, values))


def test_blocks_of_128_columns():
    narrow = stack((64, 512), double_quant=False)
    check(2, (64, 512), BF16, dataclasses.replace(narrow, block_size=128, absmax=narrow.absmax[:, ::2]))
