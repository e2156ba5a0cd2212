"""The fused kernels with an expert per tile, compiled for absent cards: no spill, and no array of all experts."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.grouped_matmul import Groups, grouped_matmul
from pallas_kernels.kernel_report import abstract_blocks, abstract_weight
from tests.marks import some_in_ci

Abstract = jax.ShapeDtypeStruct
LAYERS, EXPERTS, SHAPE = 4, 64, (768, 2048)
CASES = {
    "h100": ("hopper_forward", "hopper_backward"),
    "a100": ("ampere_forward", "ampere_backward"),
    "a6000": ("ampere_forward", "ampere_backward"),
    "rtx4090": ("ampere_forward", "ampere_backward"),
    "rtx5090": ("ampere_forward", "ampere_backward"),
    "gb10": ("ampere_forward", "ampere_backward"),
    "b200": ("ampere_forward", "ampere_backward"),
}


def abstract_groups(tiles, tile):
    def ints(*shape):
        return Abstract(shape, jnp.int32)

    pairs = tiles * tile // 2
    return Groups(
        expert_of_tile_I=ints(tiles),
        tiles=ints(),
        pair_of_slot_P=ints(tiles * tile),
        slot_of_pair_Mk=ints(pairs, 1),
        tile=tile,
    )


def step(x_PK, weights, groups, layer):
    """Computes one product and its rows' gradient."""
    y, vjp = jax.vjp(lambda x_PK: grouped_matmul(x_PK, weights, groups, layer), x_PK)
    return vjp(y)


def compiled_for(compile_for, card, function, tiles, tile, ggml_type=None):
    one = abstract_weight(SHAPE, "split_k") if ggml_type is None else abstract_blocks(ggml_type, SHAPE, "gpu")
    stack = jax.tree.map(lambda leaf: Abstract((LAYERS, EXPERTS, *leaf.shape), leaf.dtype), one)
    x, groups = Abstract((tiles * tile, SHAPE[1]), jnp.bfloat16), abstract_groups(tiles, tile)
    compiled = compile_for(card, function, x, stack, groups, Abstract((), jnp.int32))
    assert not compiled.spilled and not compiled.exceeding_shared_memory
    return compiled


def largest_array_made(text, rows):
    """Returns the bytes of the largest array that an instruction makes and that is not one of rows."""
    sizes = {"u8": 1, "bf16": 2, "f32": 4}
    passes = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call"}
    found = re.findall(r"= (u8|bf16|f32)\[([\d,]+)\]\S* ([\w-]+)\(", text)
    shapes = [(kind, [int(size) for size in shape.split(",")]) for kind, shape, code in found if code not in passes]
    return max(sizes[kind] * math.prod(shape) for kind, shape in shapes if shape[0] not in rows)


@pytest.mark.parametrize("card", some_in_ci([(card,) for card in CASES], lambda index: index in (0, 4)))
def test_one_launch_per_direction_and_no_expert_dequantized(compile_for, card):
    tiles, tile = 100, 64
    compiled = compiled_for(compile_for, card, step, tiles, tile)
    kernels = [kernel for kernel in compiled.kernels if kernel.tensor_core_instructions]
    assert {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels} == set(CASES[card])
    assert " while(" not in compiled.text
    scales = 2 * EXPERTS * math.prod(SHAPE) // 64
    assert largest_array_made(compiled.text, {tiles * tile}) <= 2 * scales
    assert compiled.memory.device.temporaries <= 2 * tiles * tile * SHAPE[0] + 2 * scales + 4096


@pytest.mark.parametrize("card", some_in_ci([(card,) for card in CASES], lambda index: index == 1))
def test_experts_in_blocks_of_a_file_are_multiplied_in_one_launch(compile_for, card):
    compiled = compiled_for(compile_for, card, step, 100, 64, "MXFP4")
    kernels = [kernel for kernel in compiled.kernels if kernel.tensor_core_instructions]
    assert {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels} == set(CASES[card])
    scales = 2 * EXPERTS * math.prod(SHAPE) // 32
    assert largest_array_made(compiled.text, {100 * 64}) <= 2 * scales


@pytest.mark.parametrize("card", some_in_ci([("h100",), ("a100",), ("rtx5090",), ("b200",)], lambda index: False))
def test_decoding_multiplies_tiles_of_eight_rows(compile_for, card):
    compiled = compiled_for(compile_for, card, grouped_matmul, 32, 8)
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    assert kernel.name.startswith("skinny") and kernel.opcodes["HMMA"] == 16
