"""The contract of attention in rows with branches, for all loops: a dense mask by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import causal_attention
from pallas_kernels.attention.branching import Branching
from tests.nn.trees import random_trees, visible_keys
from tests.pallas_kernels.attention.loops import loops  # noqa: F401
from tests.pallas_kernels.attention.test_contract import SCALE, _inputs, _largest_errors, _plain_value_and_gradients

SLOW = pytest.mark.slow


def spans_of(rows_B4T):
    segments, parents, depths, _ = (jnp.asarray(rows_B4T[:, i]) for i in range(4))
    return Branching(parents, depths).spans(segments)


@functools.partial(jax.jit, static_argnames=("attention", "window", "softcap"))
def _ours(attention, q, k, v, cotangent, spans, traced=None, window=None, softcap=None):
    visible = {"spans": spans, "window": window if traced is None else traced, "softcap": softcap}
    value, vjp = jax.vjp(lambda *qkv: attention(*qkv, SCALE, **visible), q, k, v)
    return value, *vjp(cotangent)


def branching_errors(inputs, rows_B4T, window=None, softcap=None, *, is_traced=False, attention=causal_attention):
    """Returns the largest relative errors of value, dq, dk and dv against a dense mask in f32."""
    chosen = {"traced": jnp.int32(window)} if is_traced else {"window": window}
    ours = _ours(attention, *inputs, spans_of(rows_B4T), softcap=softcap, **chosen)
    f32 = [x.astype(jnp.float32) for x in inputs]
    plain = _plain_value_and_gradients(*f32, visible_keys(rows_B4T, window), softcap=softcap)
    return _largest_errors(ours, plain)


def rows_of_trees(seed, batch, length):
    rng = np.random.default_rng(seed)
    return np.stack([random_trees(rng, length) for _ in range(batch)])


# One tile, unrolled, and in a loop over tiles of 256 and (batch x heads above 16) of 128.
@pytest.mark.parametrize(
    ("length", "heads"), [(300, 2), (700, 10), *(pytest.param(*each, marks=SLOW) for each in [(48, 2), (900, 2)])]
)
def test_random_trees(length, heads):
    inputs = _inputs(length, heads, heads // 2)
    for seed in range(4):
        assert max(branching_errors(inputs, rows_of_trees(seed, 2, length))) < 5e-6, seed


@pytest.mark.parametrize(
    ("length", "heads", "is_traced", "softcap"),
    [
        (900, 2, True, 0.7),
        *(
            pytest.param(*each, marks=SLOW)
            for each in [(900, 2, False, None), (300, 2, True, None), (300, 2, False, 0.7)]
        ),
    ],
)
def test_windows_count_positions_of_the_text(length, heads, is_traced, softcap):
    inputs = _inputs(length, heads, heads // 2)
    for seed, window in enumerate((1, 70, 258, 1000) if is_traced else (70,)):
        assert (
            max(branching_errors(inputs, rows_of_trees(seed, 2, length), window, softcap, is_traced=is_traced)) < 5e-6
        ), window


def test_spans_include_segments():
    q, k, v, _ = _inputs(8, 2, 2)
    rows_B4T = rows_of_trees(0, 2, 8)
    with pytest.raises(ValueError, match="expected one of them"):
        causal_attention(q, k, v, SCALE, spans=spans_of(rows_B4T), segments_BT=jnp.asarray(rows_B4T[:, 0]))
