"""Tests attention in rows with branches against a dense mask by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot
from qlora_jax.nn.attention.branching import Branching, BranchingMask
from qlora_jax.nn.attention.causal import causal_attention
from qlora_jax.nn.attention.tiles import Tiling
from tests.nn.attention.test_causal import SCALE, _inputs, _largest_errors, _plain_value_and_gradients, tiles  # noqa: F401
from tests.nn.trees import random_trees, row_of_trees, visible_keys

SLOW = pytest.mark.slow
CARDS = ("h100", "a100", "a6000", "rtx4090", "l40s")
needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
pytestmark = pytest.mark.usefixtures("tiles")


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


def test_chunks_that_no_query_sees_are_not_visited():
    tiling = Tiling(batch=1, length=1280, kv_heads=1, chunk=128)
    # A trunk of 256, and branches of 384 that see 256, 100 and 0 of its positions.
    spans = spans_of(row_of_trees(1280, [(256, [(256, 384), (100, 384), (0, 256)])])[None])
    assert _visited(BranchingMask.of(tiling, None, spans)) == [
        [], [0],  # the trunk
        [0, 1], [0, 1, 2], [0, 1, 2, 3],
        [0], [0, 5], [0, 5, 6],
        [], [8],
    ]  # fmt: skip
    assert _visited(BranchingMask.of(tiling, 130, spans)) == [
        [], [0], [0, 1], [1, 2], [2, 3], [0], [0, 5], [5, 6], [], [8],
    ]  # fmt: skip


def _visited(mask):
    return [chunks[:count] for chunks, count in zip(mask.visited_II.tolist(), mask.counts_I.tolist(), strict=True)]


def test_spans_include_segments():
    q, k, v, _ = _inputs(8, 2, 2)
    rows_B4T = rows_of_trees(0, 2, 8)
    with pytest.raises(ValueError, match="expected one of them"):
        causal_attention(q, k, v, SCALE, spans=spans_of(rows_B4T), segments_BT=jnp.asarray(rows_B4T[:, 0]))


@needs_compiler
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("card", ["h100", *(pytest.param(card, marks=pytest.mark.exhaustive) for card in CARDS[1:])])
@pytest.mark.slow
def test_absent_cards_visit_chunks_and_store_no_square(card, window):
    length, heads, kv_heads, head_dim = 4096, 8, 2, 64
    shapes = [(1, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def gradients(q, k, v, d_out, segments, parents, depths):
        spans = Branching(parents, depths).spans(segments)
        attention = functools.partial(causal_attention, scale=SCALE, window=window, spans=spans)
        return jax.vjp(attention, q, k, v)[1](d_out)

    compiled = aot.compile_for(card, gradients, *arrays, ids, ids, ids)
    assert not compiled.spilled
    assert compiled.memory.device.temporaries < heads * length * length  # bytes: a quarter of the scores in f32
