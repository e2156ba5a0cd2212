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


@pytest.mark.parametrize("count", [1, 2, 3, 9, 1000, 13824, 100_003])
def test_mean_is_correct_to_the_last_bit_and_equal_under_jit(count: int) -> None:
    absmax = np.random.default_rng(count).gamma(9.0, 0.01, count).astype(np.float32)
    exact = np.float32(absmax.mean(dtype=np.float64))
    np.testing.assert_array_max_ulp(mean(absmax), exact, maxulp=1)
    np.testing.assert_array_equal(np.asarray(jax.jit(mean)(jnp.asarray(absmax))), mean(absmax))


def test_mean_never_takes_one_rounding_for_two() -> None:
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
