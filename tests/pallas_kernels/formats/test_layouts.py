"""Layouts against their equations, and repacks between all of them."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.layouts import (
    LAYOUTS,
    layout_problem,
    natural_layout,
    pack_halves,
    pack_pairs,
    pack_runs,
    repack,
    unpack_halves,
    unpack_pairs,
    unpack_runs,
)
from pallas_kernels.formats.qtensor import QTensor

BLOCK_SIZE = 64

# Each layout's equation: the position of code(n, k), as (index of the byte, True for the high nibble).
EQUATIONS = {
    "bnb": lambda n, k, shape: ((n, k // 2), k % 2 == 0),
    "row_planar": lambda n, k, shape: ((n % (shape[0] // 2), k), n < shape[0] // 2),
    "split_k": lambda n, k, shape: ((n, k // 128 * 64 + k % 64), k % 128 >= 64),
    "flat": lambda n, k, shape: (((n * shape[1] + k) // 2,), (n * shape[1] + k) % 2 == 0),
}


def bnb_weight(
    seed: int, rows: int, blocks: int, stack: tuple[int, ...], double_quant: bool, block_size: int = BLOCK_SIZE
) -> QTensor:
    """A weight of random bytes: every byte is a pair of codes."""
    rng = np.random.default_rng(seed)
    shape = (rows, blocks * block_size)
    constants = (*stack, rows, blocks)
    leaves = {"absmax": rng.random(constants, np.float32)}
    if double_quant:
        leaves = {
            "absmax_codes": rng.integers(0, 256, constants, np.uint8),
            "nested_absmax": rng.random((*stack, -(-rows * blocks // 256)), np.float32),
            "nested_offset": rng.random(stack, np.float32),
        }
    return QTensor(
        codes=rng.integers(0, 256, (*stack, rows, shape[1] // 2), np.uint8),
        **leaves,
        quant_type="nf4",
        block_size=block_size,
        nested_block_size=256,
        shape=shape,
        dtype="float32",
        layout="bnb",
    )


bnb_weights = st.builds(
    bnb_weight,
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([2, 12, 64, 128]),
    blocks=st.integers(1, 5),
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    double_quant=st.booleans(),
    block_size=st.sampled_from([32, 64, 128]),
)


def allowed(layout: str, qt: QTensor) -> bool:
    return layout_problem(layout, qt.shape, qt.block_size) is None


def assert_same(actual: QTensor, expected: QTensor) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def code_at(qt: QTensor, n: int, k: int) -> int:
    byte, high = EQUATIONS[qt.layout](n, k, qt.shape)
    return int(qt.codes[byte]) >> 4 if high else int(qt.codes[byte]) & 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpack_follows_the_equation(layout: str) -> None:
    qt = repack(bnb_weight(0, rows=64, blocks=3, stack=(), double_quant=False), layout)
    unpacked = LAYOUTS[layout].unpack(qt.codes, qt.shape)
    expected = [[code_at(qt, n, k) for k in range(qt.shape[1])] for n in range(qt.shape[0])]
    np.testing.assert_array_equal(unpacked, expected)
    assert qt.codes.shape == LAYOUTS[layout].codes_shape(qt.shape)
    assert qt.absmax.shape == LAYOUTS[layout].constants_shape(qt.shape, BLOCK_SIZE)


@hypothesis.given(bnb_weights, st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS)))
def test_repacks_lose_nothing(qt: QTensor, first: str, second: str) -> None:
    hypothesis.assume(allowed(first, qt) and allowed(second, qt))
    there = repack(qt, first)
    assert there.layout == first and isinstance(there.codes, np.ndarray)
    assert there.stack_shape == qt.stack_shape
    assert_same(repack(repack(there, second), "bnb"), qt)
    unpack = LAYOUTS[first].unpack(there.codes, qt.shape)
    np.testing.assert_array_equal(unpack, LAYOUTS["bnb"].unpack(qt.codes, qt.shape))


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40))
def test_packs_undo_unpacks(seed: int, rows: int, columns: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (3, 2 * rows, 2 * columns), np.uint8)
    np.testing.assert_array_equal(unpack_pairs(pack_pairs(codes)), codes)
    np.testing.assert_array_equal(unpack_halves(pack_halves(codes)), codes)


@pytest.mark.parametrize("columns", [64, 128, 192, 576, 896])  # 576 = 4.5 x 128 and 192 = 1.5 x 128 leave a tail
def test_split_k_of_real_widths(columns: int) -> None:
    qt = bnb_weight(2, rows=128, blocks=columns // 64, stack=(2,), double_quant=True)
    there = repack(qt, "split_k")
    assert there.codes.shape == (2, 128, 64 * -(-columns // 128))
    np.testing.assert_array_equal(there.absmax_codes, np.moveaxis(qt.absmax_codes, 1, 2))
    np.testing.assert_array_equal(there.nested_absmax, qt.nested_absmax)
    past_the_end = there.codes[..., there.codes.shape[-1] - 64 :] >> 4
    assert columns % 128 == 0 or not past_the_end.any()
    assert_same(repack(there, "bnb"), qt)


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_runs_are_packed_without_loss(seed: int, runs: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (2, 3, 64 * runs), np.uint8)
    packed = pack_runs(codes)
    assert packed.shape == (2, 3, 64 * -(-runs // 2))
    np.testing.assert_array_equal(unpack_runs(packed, 64 * runs), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repack_of_jax_arrays_equals_numpy(layout: str) -> None:
    qt = bnb_weight(1, rows=64, blocks=3, stack=(2,), double_quant=True)
    repacked = jax.jit(repack, static_argnums=1)(jax.tree.map(jnp.asarray, qt), layout)
    assert_same(repacked, repack(qt, layout))


def test_repack_refuses_what_a_shape_does_not_allow() -> None:
    odd_rows = bnb_weight(0, rows=3, blocks=1, stack=(), double_quant=False, block_size=32)
    with pytest.raises(
        ValueError, match=r"cannot repack from 'bnb': layout 'row_planar' requires an even N.*\(3, 32\)"
    ):
        repack(odd_rows, "row_planar")
    with pytest.raises(ValueError, match="layout 'gpu' is unknown \\(known: bnb, row_planar, split_k, flat"):
        repack(odd_rows, "gpu")
    with pytest.raises(ValueError, match=r"'split_k' requires N, K, block_size in 64s, found shape=\(3, 64\)"):
        repack(bnb_weight(0, rows=3, blocks=1, stack=(), double_quant=False), "split_k")
    ragged = dataclasses.replace(repack(odd_rows, "flat"), shape=(4, 24))
    with pytest.raises(
        ValueError, match=r"requires a matrix \[N, K\] with K % 32 == 0, found shape \(4, 24\); use 'flat'"
    ):
        repack(ragged, "bnb")


def test_natural_layout_is_bnb_for_rows_of_whole_blocks() -> None:
    layouts = {shape: natural_layout(shape, 64) for shape in [(3, 64), (8, 576), (8, 100), (64,), (2, 4, 64), ()]}
    assert [shape for shape, layout in layouts.items() if layout == "bnb"] == [(3, 64), (8, 576)]
