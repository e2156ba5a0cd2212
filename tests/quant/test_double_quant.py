"""The mean and the 8-bit look-up of double quantization."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.tables import dynamic_map
from qlora_jax.quant.double_quant import mean, quantize_constants
from qlora_jax.quant.dynamic_8bit import LOOK_UP_SIZE, nearest_code_look_up

GOLDEN = Path(__file__).resolve().parent.parent / "golden/quant.npz"


def in_torchs_order(values: np.ndarray) -> np.float32:
    """The sum of torch's SumKernel.cpp, one addition at a time: its counter decides when a level moves up."""
    lanes = 8 if len(values) >= 8 else 1
    vectors = values[: len(values) // lanes * lanes].reshape(-1, lanes)
    rows = vectors[: len(vectors) // 4 * 4].reshape(-1, 4 * lanes)
    power = max(4, (len(rows) - 1).bit_length() // 4) if len(rows) > 2 else 4
    levels = np.zeros((4, 4 * lanes), np.float32)
    for done, row in enumerate(rows, start=1):
        levels[0] += row
        for level in range(1, 4):
            if done % 2 ** (level * power):
                break
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
    for level in range(1, 4):
        levels[0] += levels[level]
    columns = levels[0].reshape(4, lanes)
    for vector in (*vectors[len(rows) * 4 :], *columns[1:]):
        columns[0] += vector
    total = np.float32(0)
    for value in (*values[vectors.size :], *columns[0]):
        total += value
    return total


@pytest.mark.parametrize("count", [1, 6, 7, 8, 9, 33, 1000, 4096, 13824])
def test_mean_is_torchs_to_the_last_bit_and_equal_under_jit(count: int) -> None:
    absmax = np.random.default_rng(count).gamma(9.0, 0.01, count).astype(np.float32)
    assert mean(absmax) == in_torchs_order(absmax) / np.float32(count)
    np.testing.assert_array_equal(np.asarray(jax.jit(mean)(jnp.asarray(absmax))), mean(absmax))


def test_mean_adds_groups_of_groups_of_groups() -> None:
    """A single column has values, so that no rounding of the other additions hides its order."""
    absmax = np.random.default_rng(0).gamma(9.0, 0.01, (4, 4725, 32)).astype(np.float32)
    absmax[..., 1:] = 0
    for values in absmax.reshape(4, -1):
        assert mean(values) == in_torchs_order(values) / np.float32(values.size)


def test_jit_divides_and_does_not_multiply_by_the_reciprocal() -> None:
    rng, in_jit = np.random.default_rng(1), jax.jit(mean)
    arrays = rng.gamma(9.0, 0.01, (400, 999)).astype(np.float32)
    np.testing.assert_array_equal([np.asarray(in_jit(absmax)) for absmax in arrays], [mean(a) for a in arrays])


def test_look_up_is_nearest_but_for_its_own_step() -> None:
    """A value whose code is not the nearest is within one of the 65,536 steps of a midpoint."""
    levels = dynamic_map()
    values = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    codes = nearest_code_look_up()[np.round((values.astype(np.float64) + 1) / 2 * (LOOK_UP_SIZE - 1)).astype(np.int64)]
    midpoints = (levels[:-1] + levels[1:]) / 2
    nearest = np.searchsorted(midpoints, values)
    different = np.flatnonzero(codes != nearest)
    assert 0 < different.size < 0.01 * values.size
    to_midpoint = np.abs(values[different, None] - midpoints[None, :]).min(-1)
    assert to_midpoint.max() <= 2.0 / (LOOK_UP_SIZE - 1)


@pytest.mark.parametrize("jit", [False, True], ids=["numpy", "jit"])
def test_codes_change_where_bitsandbytes_changes_them(jit: bool) -> None:
    """Finds every threshold of the look-up by bisection, and checks the codes there and one ulp below."""
    with np.load(GOLDEN) as golden:
        at, expected = golden["look_up.thresholds"], golden["look_up.codes"]
    blocks = [np.append(np.float32(1), values) for values in (at, np.nextafter(at, np.float32(-2)))]
    absmax = np.concatenate(blocks)
    quantize = jax.jit(quantize_constants, static_argnums=2) if jit else quantize_constants
    codes, nested_absmax = quantize(jnp.asarray(absmax) if jit else absmax, np.zeros((), np.float32), 256)
    np.testing.assert_array_equal(np.asarray(nested_absmax), 1)
    np.testing.assert_array_equal(np.asarray(codes).reshape(2, 256)[:, 1:], expected)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_constants_under_jit_equal_numpy(count: int) -> None:
    absmax = np.random.default_rng(count).gamma(9.0, 0.01, count).astype(np.float32)
    codes, nested_absmax = quantize_constants(absmax, mean(absmax), 256)
    in_jit = jax.jit(quantize_constants, static_argnums=2)(jnp.asarray(absmax), jnp.asarray(mean(absmax)), 256)
    np.testing.assert_array_equal(np.asarray(in_jit[0]), codes)
    np.testing.assert_array_equal(np.asarray(in_jit[1]), nested_absmax)
    assert codes.dtype == np.uint8 and codes.shape == (count,) and nested_absmax.shape == (-(-count // 256),)


def test_blocks_of_equal_constants_take_code_zero() -> None:
    absmax = np.full(300, 0.25, np.float32)
    codes, nested_absmax = quantize_constants(absmax, mean(absmax), 256)
    assert not codes.any() and not nested_absmax.any()
