"""Register fragments against their equations, on arrays over 128 threads.

Here, a register of 16-bit pairs is an array [128, 2], and one of packed bytes is [128, 2] or [128, 4]. Positions follow
from Mosaic's TiledLayout by the rule in its documentation.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.nf4_matmul.mosaic import fragments, inline_ptx
from tests.pallas_kernels.mosaic.registers import threads
from tests.pallas_kernels.nf4_matmul import ptx

LANES = 32
WORDS = np.arange(65536, dtype=np.uint32)


def test_the_reading_of_layouts_is_that_of_the_manual():
    """PTX manual: thread (g, t) holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) of operand one [16, 16]."""
    array = np.arange(256).reshape(16, 16)
    registers = threads(array, fragments.of_rows(jnp.bfloat16).to_mgpu()).reshape(2, 2)
    g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
    for h, r in np.ndindex(2, 2):  # halves of the contraction, halves of the rows
        expected = array[g + 8 * r, 2 * t + 8 * h]
        found = [registers[at][:LANES, 0].tolist() for at in ((h, r), (r, h))]
        assert expected.tolist() in found


TABLE = np.arange(16) * 3 - 20


def look_up(packed):
    return TABLE[packed & 15], TABLE[packed >> 4]


def look_up_across(first, second):
    pairs = [np.stack([first[:, i], second[:, i]], axis=1) for i in range(2)]
    return [value for pair in pairs for value in look_up(pair)]


ALU = fragments.Alu(
    look_up=look_up,
    look_up_across=look_up_across,
    both=lambda register, i: register[:, [i, i]],
    multiply=lambda a, b: a * b,
)


def tile_columns():
    """Maps the second operand's columns to the tile's, by the equation in the module's docstring."""
    c, i, w, g = np.meshgrid(range(2), range(2), range(4), range(8), indexing="ij")
    return (64 * c + 16 * w + 2 * g + i).reshape(-1)


def assert_registers(found, expected_array, layout):
    expected = threads(expected_array, layout)
    for mine, theirs in zip(found.reshape(-1), expected.reshape(-1), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(params=[1, 2, 4], ids=lambda groups: f"{groups} groups")
def packed_and_scales(request):
    """Returns packed bytes of two chunks of rows, and scales of the groups of low, then of high nibbles."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 64, 64)), rng.integers(1, 99, (2 * request.param, 128))


def arranged(direction, packed, scales):
    chunks = [threads(chunk, fragments.PACKED[direction]).reshape(4, 2, 2) for chunk in packed]
    of_nibbles, by_chunk = np.split(scales, 2), (slice(0, 64), slice(64, 128))
    if direction == "forward":
        factors = [
            [[threads(row[rows], fragments.SCALES_FORWARD).item() for row in groups] for rows in by_chunk]
            for groups in of_nibbles
        ]
        return fragments.operands_forward(chunks, factors, ALU)
    factors = [[of_rows(groups[:, rows]) for rows in by_chunk] for groups in of_nibbles]
    return fragments.operands_backward(chunks, factors, ALU)


def of_rows(scales):
    """Returns the registers of scales [groups, 64 rows] backward."""
    one = len(scales) == 1
    layout = fragments.SCALES_BACKWARD if one else fragments.scales_backward(len(scales))
    return threads(scales[0] if one else scales, layout).reshape(4, 2)


def equation(direction, packed, scales):
    """Computes operands [64, 128] of both parts, columns in the tile's order."""
    values = np.stack(look_up(packed))  # nibble, chunk, row, byte
    groups = len(scales) // 2
    factors = scales.reshape(2, groups, 2, 64).transpose(0, 2, 3, 1)  # nibble, chunk, row, group
    scaled = values * np.repeat(factors, 64 // groups, axis=3)
    if direction == "forward":  # for each nibble, bytes by rows of both chunks
        return [scaled[nibble].reshape(128, 64).T for nibble in range(2)]
    return [np.concatenate([scaled[0, chunk], scaled[1, chunk]], axis=1) for chunk in range(2)]


@pytest.mark.parametrize("direction", fragments.PACKED)
def test_operands_are_where_the_product_wants_them(direction, packed_and_scales):
    layout = fragments.of_weights(jnp.bfloat16).to_mgpu()
    found = arranged(direction, *packed_and_scales)
    for mine, expected in zip(found, equation(direction, *packed_and_scales), strict=True):
        assert_registers(mine, expected[:, tile_columns()], layout)


@pytest.mark.parametrize("direction", fragments.PACKED)
def test_the_scales_of_another_group_are_caught(direction, packed_and_scales):
    packed, scales = packed_and_scales
    layout = fragments.of_weights(jnp.bfloat16).to_mgpu()
    wrong = arranged(direction, packed, np.roll(scales, 1, axis=0))
    with pytest.raises(AssertionError):
        for mine, expected in zip(wrong, equation(direction, packed, scales), strict=True):
            assert_registers(mine, expected[:, tile_columns()], layout)


def look_up_wrongly(*packed):
    return look_up(*packed)[::-1]


def look_up_across_wrongly(first, second):
    low, high, low_of_next, high_of_next = look_up_across(first, second)
    return high, low, high_of_next, low_of_next


@pytest.mark.parametrize("direction", fragments.PACKED)
def test_a_wrong_nibble_is_caught(direction, packed_and_scales, monkeypatch):
    wrong = ALU._replace(look_up=look_up_wrongly, look_up_across=look_up_across_wrongly)
    monkeypatch.setitem(globals(), "ALU", wrong)
    with pytest.raises(AssertionError):
        test_operands_are_where_the_product_wants_them(direction, packed_and_scales)


@pytest.mark.parametrize("rows", [64, 128])
def test_results_are_in_the_tiles_order(rows):
    result = np.arange(rows * 128).reshape(rows, 128)
    sums = threads(result[:, tile_columns()], fragments.of_sums(jnp.bfloat16).to_mgpu()).reshape(rows // 16, 4, 2)

    def join(*values):
        return np.stack(values, axis=1)

    chunks = fragments.results(sums, lambda register, e: register[:, e], join)
    for c, chunk in enumerate(chunks):
        assert_registers(chunk, result[:, 64 * c : 64 * c + 64], fragments.RESULT)


# The assembly


def constants(quant_type, dtype):
    words = inline_ptx.constant_words(CODE_TABLES[quant_type], dtype)
    return [np.full_like(WORDS, word[0].view(np.uint32)) for word in words]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_the_assembly_is_the_table_for_every_input(quant_type, dtype):
    table, values = CODE_TABLES[quant_type], ptx.table_bits(quant_type, dtype)
    low, high = ptx.run(inline_ptx.look_up_ptx(table, dtype), [WORDS, *constants(quant_type, dtype)], 2)
    np.testing.assert_array_equal(low, ptx.two_values(WORDS, 0, 2, values))
    np.testing.assert_array_equal(high, ptx.two_values(WORDS, 1, 3, values))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quant_type", CODE_TABLES)
def test_the_assembly_across_rows_is_the_table_for_every_pair(quant_type, dtype):
    """Tests every pair of first bytes with some second ones, and every pair of second bytes with some first ones."""
    table, values = CODE_TABLES[quant_type], ptx.table_bits(quant_type, dtype)
    other = np.random.default_rng(0).permutation(65536).astype(np.uint32)
    first, second = WORDS & 255 | (other & 255) << 8, WORDS >> 8 | other & 0xFF00
    for a, b in ((first, second), (first >> 8 | (first & 255) << 8, second >> 8 | (second & 255) << 8)):
        found = ptx.run(inline_ptx.look_up_across_ptx(table, dtype), [a, b, *constants(quant_type, dtype)], 4)
        pairs = [a & 255 | (b & 255) << 8, a >> 8 | b & 0xFF00]
        expected = [ptx.two_values(pair, nibble, nibble + 2, values) for pair in pairs for nibble in range(2)]
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_broken_assembly_is_caught():
    right = inline_ptx.look_up_ptx(CODE_TABLES["nf4"], "bfloat16")
    inputs = [WORDS, *constants("nf4", "bfloat16")]
    for change in (("0x77777777", "0xffffffff"), ("0x32103210", "0x32103201"), ("0x6240", "0x7351"), ("p, q", "q, p")):
        wrong = right.replace(*change)
        assert wrong != right
        pairs = zip(ptx.run(wrong, inputs, 2), ptx.run(right, inputs, 2), strict=True)
        assert any((mine != theirs).any() for mine, theirs in pairs)
