"""The kernels with codes of files, whose groups of 16 or 32 columns share a scale: interpreted twins, broken copies."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.nf4_matmul.mosaic import ampere, code_lookup, hopper, skinny, skinny_instructions
from pallas_kernels.nf4_matmul.mosaic.ampere_instructions import Interpreted
from tests.marks import EXHAUSTIVE, SLOW
from tests.pallas_kernels.nf4_matmul import twins
from tests.pallas_kernels.nf4_matmul.twins import DETECTING, stack_of_file

BF16, F16 = jnp.bfloat16, jnp.float16
DIRECTIONS = ("forward", "backward")
HOPPER = {"forward": hopper.forward_product, "backward": hopper.backward_product}


def ampere_twin(direction, dtype, ggml_type, twin=Interpreted, tile=ampere.SMALL):
    instructions = twin(direction, dtype, BLOCK_FORMATS[ggml_type].code.table, DETECTING)
    return lambda x, weight: ampere.product(instructions, x, weight, tile)


def hopper_twin(direction, dtype, ggml_type):
    return functools.partial(_hopper_product, direction)


def _hopper_product(direction, x, weight):
    return HOPPER[direction](x, weight, hopper.Tile(64, 2), DETECTING)


def skinny_twin(direction, dtype, ggml_type, twin=skinny_instructions.Interpreted):
    assert direction == "forward"
    return functools.partial(skinny.product, twin(dtype, BLOCK_FORMATS[ggml_type].code.table, DETECTING))


TWINS = {"ampere": ampere_twin, "hopper": hopper_twin}


def check(kernel, direction, rows, shape, ggml_type, dtype, layer=1):
    twin = TWINS[kernel](direction, dtype, ggml_type)
    twins.check(twin, direction, rows, stack_of_file(shape, ggml_type), dtype, layer)


# Groups of 16 and of 32; rows and sizes that are not multiples of a tile.
CASES = [
    ("ampere", "forward", 7, (192, 192), "NVFP4_64_INV", BF16),
    ("hopper", "backward", 7, (64, 192), "NVFP4_64_INV", BF16),
    *(
        pytest.param(kernel, direction, rows, (192, 320), ggml_type, BF16, marks=SLOW)
        for kernel in TWINS
        for direction, rows, ggml_type in (
            ("forward", 65, "Q4_0"),
            ("backward", 65, "NVFP4_64"),
            ("backward", 7, "Q4_0"),
        )
    ),
]


@pytest.mark.parametrize(("kernel", "direction", "rows", "shape", "ggml_type", "dtype"), CASES)
def test_the_twin_computes_the_product_without_a_race(kernel, direction, rows, shape, ggml_type, dtype):
    check(kernel, direction, rows, shape, ggml_type, dtype)


# One row, several tiles of rows; K of several steps, of a last one that overlaps, and of less than one.
@pytest.mark.parametrize(
    ("rows", "shape", "ggml_type", "dtype"),
    [
        (2, (64, 1344), "NVFP4_64", BF16),
        pytest.param(1, (64, 192), "Q4_0", BF16, marks=SLOW),
        pytest.param(16, (64, 1344), "MXFP4", F16, marks=SLOW),
        *(pytest.param(7, (64, 1024), each, BF16, marks=EXHAUSTIVE) for each in ("IQ4_NL", "NVFP4_256_INV")),
    ],
)
def test_few_rows_of_the_twin(rows, shape, ggml_type, dtype):
    twins.check(skinny_twin("forward", dtype, ggml_type), "forward", rows, stack_of_file(shape, ggml_type), dtype)


EVERY_CODE = [
    pytest.param(kernel, direction, ggml_type, marks=SLOW if ggml_type in ("MXFP4", "NVFP4_256") else EXHAUSTIVE)
    for kernel in TWINS
    for direction in DIRECTIONS
    for ggml_type, block in BLOCK_FORMATS.items()
    if block.code is not None
]


@pytest.mark.parametrize(("kernel", "direction", "ggml_type"), EVERY_CODE)
def test_every_code_is_a_parameter(kernel, direction, ggml_type):
    check(kernel, direction, 128, (128, 512), ggml_type, F16, layer=2)


# Broken copies


def caught(kernel, direction, ggml_type, **changes):
    twin = TWINS[kernel](direction, BF16, ggml_type, **changes)
    return twins.caught(twin, direction, 64, stack_of_file((128, 256), ggml_type), BF16)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", TWINS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_unbroken_kernel_is_not_caught(kernel, direction):
    assert not caught(kernel, direction, "MXFP4")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{}, {"groups": 1}, {"scales": 1}], ids=["right", "repeated", "other group"])
def test_wrong_groups_of_few_rows_are_caught(wrong):
    class Wrong(skinny_instructions.Interpreted):
        def groups(self, count):
            return super().groups(count) + wrong.get("groups", 0) * count

        def dot(self, sums, x, codes, scales, words):
            return super().dot(sums, x, codes, jnp.roll(scales, wrong.get("scales", 0), axis=0), words)

    twin = skinny_twin("forward", BF16, "NVFP4_64", Wrong)
    assert twins.caught(twin, "forward", 2, stack_of_file((64, 1344), "NVFP4_64"), BF16) == bool(wrong)


class NextGroup(Interpreted):
    def _factors(self, scales_s, nibble, part):
        return jnp.roll(super()._factors(scales_s, nibble, part), 16, axis=1)


class OtherNibble(Interpreted):
    def _factors(self, scales_s, nibble, part):
        return super()._factors(scales_s, 1 - nibble, part)


class WithoutWait(Interpreted):
    def wait(self, arrived, slot, younger):
        ampere.plgpu.commit_smem()


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("twin", [NextGroup, OtherNibble, WithoutWait])
def test_a_wrong_group_and_a_missing_wait_are_caught(direction, twin):
    assert caught("ampere", direction, "NVFP4_64", twin=twin)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_group_is_caught_on_hopper(monkeypatch, direction):
    right = code_lookup.repeated_factors
    monkeypatch.setattr(code_lookup, "repeated_factors", lambda scales, layout: right(scales[::-1], layout))
    assert caught("hopper", direction, "NVFP4_64")
