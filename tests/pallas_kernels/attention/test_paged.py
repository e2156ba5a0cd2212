"""The contract of attention over pages, for all loops: the definition, and results that depend on nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import KVPages, paged_attention
from pallas_kernels.attention.pages import PAGE, dequantize, quantize
from tests.pallas_kernels.attention.loops import TILES, loops  # noqa: F401
from tests.pallas_kernels.attention.test_contract import SCALE, _random

LAYERS, LAYER, SLOTS = 2, 1, 10 * PAGE
LENGTHS = (300, 70, 1)  # positions that are written, per row
CALL = 360  # tokens
FEATURES = [
    ((9, 3), 64, {}),
    ((4, 2), 20, {"window": 5, "sinks": True}),
    ((7, 1), 33, {"softcap": 0.7, "sinks": True}),
    ((2, 2), 16, {"window": 150, "softcap": 0.7}),
]


def _written(heads, dtype, stored=None, seed=0, order=0):
    """Returns pages with keys and values of each row, and these as [L, R, S, K, H]; unused pages have NaN."""
    table = np.random.default_rng(order).permutation(LAYERS * len(LENGTHS) * 10) + 1
    table_LRI = jnp.asarray(table.reshape(LAYERS, len(LENGTHS), 10), jnp.int32)
    pages = KVPages.empty(len(table) + 1, *heads, stored or dtype, table_LRI)
    if pages.k_scale is None:
        nan = jnp.full_like(pages.k, jnp.nan)
        pages = dataclasses.replace(pages, k=nan, v=nan)
    k, v = (_random(LAYERS, len(LENGTHS), SLOTS, *heads, seed=seed + i, dtype=dtype) for i in (1, 2))
    at_RS = np.broadcast_to(np.arange(SLOTS), (len(LENGTHS), SLOTS))
    rows_RS = jnp.broadcast_to(jnp.arange(len(LENGTHS))[:, None], at_RS.shape)
    positions_RS = jnp.asarray(np.where(at_RS < np.asarray(LENGTHS)[:, None], at_RS, -1))
    for layer in range(LAYERS):
        pages = pages.write(layer, k[layer], v[layer], rows_RS, positions_RS)
    return pages, k, v


def _plain(q, k, v, rows, positions, window=None, softcap=None, sinks_N=None):
    """Computes transformers' definition of each query in f64; the sink is one more logit, whose weight is dropped."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for at in np.ndindex(q.shape[:3]):
        row, position, kv_head = rows[at[:2]], positions[at[:2]], at[2] // (q.shape[2] // k.shape[2])
        if position < 0:
            continue
        first = 0 if window is None else max(0, position - window + 1)
        scores = k[row, first : position + 1, kv_head] @ q[at] * SCALE
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        logits = scores if sinks_N is None else np.append(scores, sinks_N[at[2]])
        weights = np.exp(logits - logits.max())
        out[at] = (weights / weights.sum())[: len(scores)] @ v[row, first : position + 1, kv_head]
    return out


def _calls(heads, head_dim, dtype):
    """Yields queries, rows and positions: a prompt's part with another's and padding, and one token per row."""
    rows = np.asarray([[0] * 100 + [1] * 70 + [0] * 30 + [0] * 10])
    positions = np.asarray([[*range(30, 130), *range(70), *range(270, 300), *[-1] * 10]])
    yield _random(1, 210, heads, head_dim, dtype=dtype), rows, positions
    yield (
        _random(4, 1, heads, head_dim, dtype=dtype),
        np.asarray([[1], [0], [2], [2]]),
        np.asarray([[69], [299], [0], [-1]]),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim", "how"), FEATURES)
def test_equals_the_definition(dtype, heads, head_dim, how):
    """In bf16 weights and result are rounded, each by 2^-9."""
    pages, k, v = _written((heads[1], head_dim), dtype)
    sinks_N = jnp.linspace(0, 3, heads[0]) if how.get("sinks") else None
    chosen = {"window": how.get("window"), "softcap": how.get("softcap"), "sinks_N": sinks_N}
    attend = jax.jit(functools.partial(paged_attention, scale=SCALE, **chosen))
    for q, rows, positions in _calls(heads[0], head_dim, dtype):
        ours = attend(q, pages, LAYER, rows, positions)
        assert ours.dtype == dtype
        q, k_RSKH, v_RSKH = (x.astype(jnp.float32) for x in (q, k[LAYER], v[LAYER]))
        plain = _plain(q, k_RSKH, v_RSKH, rows, positions, **chosen)
        tolerance = 3e-6 if dtype == jnp.float32 else 2 * 2**-9 * float(jnp.max(jnp.abs(v_RSKH)))
        np.testing.assert_allclose(np.asarray(ours, np.float32), plain, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_are_attended_as_the_numbers_that_they_stand_for(dtype):
    pages, k, _ = _written((2, 24), dtype, stored=jnp.int8)
    assert pages.k_scale is not None and pages.v_scale is not None
    k_PKSH, v_PKSH = dequantize(pages.k, pages.k_scale), dequantize(pages.v, pages.v_scale)
    numbers = dataclasses.replace(pages, k=k_PKSH, v=v_PKSH, k_scale=None, v_scale=None)
    for q, rows, positions in _calls(6, 24, dtype):
        attend = jax.jit(functools.partial(paged_attention, scale=SCALE))
        np.testing.assert_array_equal(*(attend(q, x, LAYER, rows, positions) for x in (pages, numbers)))
    page, slot = int(pages.pages_LRI[LAYER, 0, 3]), 5
    written = np.asarray(k[LAYER, 0, 3 * PAGE + slot], np.float32)
    steps = np.abs(written).max(axis=1) / 127
    np.testing.assert_allclose((numbers.k[page, :, slot] - written) / steps[:, None], 0, atol=0.5001)


def test_numbers_are_quantized_by_the_greatest_of_a_head():
    codes, scales = quantize(jnp.asarray([[0.5, -2.0, 1.0], [0, 0, 0]], jnp.bfloat16))
    np.testing.assert_array_equal(codes, [[32, -127, 64], [0, 0, 0]])
    np.testing.assert_allclose(scales, [2 / 127, 0], rtol=1e-7)


def test_tokens_without_a_position_write_to_the_scratch_page():
    pages, k, v = _written((2, 8), jnp.float32)
    new = pages.write(LAYER, k[:1, 0, :3], v[:1, 0, :3], jnp.asarray([[1, 1, 1]]), jnp.asarray([[70, -1, -1]]))
    changed = np.unique(np.nonzero(np.asarray(new.k != pages.k) & ~np.isnan(new.k))[0])
    assert set(changed) <= {0, int(pages.pages_LRI[LAYER, 1, 70 // PAGE])}
    page = int(pages.pages_LRI[LAYER, 1, 70 // PAGE])
    np.testing.assert_array_equal(new.k[page, :, 70 % PAGE], k[0, 0, 0])


def test_a_window_that_is_traced():
    pages, k, v = _written((2, 16), jnp.float32)
    ours = jax.jit(
        lambda window, q, rows, positions: paged_attention(q, pages, LAYER, rows, positions, SCALE, window=window)
    )
    for q, rows, positions in _calls(4, 16, jnp.float32):
        for window in (1, 40, 200):
            plain = _plain(q, k[LAYER], v[LAYER], rows, positions, window)
            np.testing.assert_allclose(ours(jnp.int32(window), q, rows, positions), plain, atol=3e-6)


def _chunked(attend, q, pages, size, before=0, after=0):
    """Attends for all positions of row 0 in chunks of a size, between tokens of row 1, in calls of CALL tokens."""
    length, parts = LENGTHS[0], []
    for first in range(0, length, size):
        count = min(size, length - first)
        padding = CALL - before - count - after
        rows = np.asarray([[1] * before + [0] * count + [1] * after + [0] * padding])
        positions = [*range(before), *range(first, first + count), *range(3, 3 + after), *[-1] * padding]
        tokens = [*range(before), *range(first, first + count), *range(after + padding)]
        out = attend(q[:, np.asarray(tokens) % length], pages, LAYER, rows, np.asarray([positions]))
        parts.append(out[:, before : before + count])
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim", "how"), FEATURES)
def test_a_query_of_a_prompt_has_the_same_bits_in_any_call(loops, dtype, heads, head_dim, how):  # noqa: F811
    if loops == TILES:
        pytest.skip("plain JAX promises no bits")
    pages = _written((heads[1], head_dim), dtype)[0]
    elsewhere = _written((heads[1], head_dim), dtype, order=1)[0]
    sinks_N = jnp.linspace(0, 3, heads[0]) if how.get("sinks") else None
    chosen = {"window": how.get("window"), "softcap": how.get("softcap"), "sinks_N": sinks_N}
    attend = jax.jit(functools.partial(paged_attention, scale=SCALE, **chosen))
    q = _random(1, LENGTHS[0], heads[0], head_dim, dtype=dtype)
    whole = _chunked(attend, q, pages, LENGTHS[0])
    for size in (32, 64, 256):
        np.testing.assert_array_equal(_chunked(attend, q, pages, size), whole)
    np.testing.assert_array_equal(_chunked(attend, q, pages, 64, before=37, after=20), whole)
    np.testing.assert_array_equal(_chunked(attend, q, elsewhere, 256, before=3), whole)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_one_token_per_row_has_the_same_bits_among_any_others(loops, stored):  # noqa: F811
    if loops == TILES:
        pytest.skip("plain JAX promises no bits")
    dtype = jnp.bfloat16 if stored == jnp.bfloat16 else jnp.float32
    pages = _written((2, 32), dtype, stored=stored)[0]
    elsewhere = _written((2, 32), dtype, stored=stored, order=1)[0]
    attend = jax.jit(functools.partial(paged_attention, scale=SCALE, window=100))
    rng = np.random.default_rng(0)
    q, rows = _random(16, 1, 6, 32, dtype=dtype), rng.integers(0, 2, (16, 1))
    positions = rng.integers(0, np.asarray(LENGTHS)[rows])
    whole = attend(q, pages, LAYER, rows, positions)
    for count in (1, 2, 7, 16):
        some = rng.permutation(16)[:count]
        np.testing.assert_array_equal(attend(q[some], elsewhere, LAYER, rows[some], positions[some]), whole[some])
