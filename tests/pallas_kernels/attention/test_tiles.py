"""Tests of the tiles alone: which of them are visited, and their memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.attention import causal_attention
from pallas_kernels.attention.branching import Branching, BranchingMask
from pallas_kernels.attention.tile_mask import AttentionMask, Tiling
from tests.nn.trees import row_of_trees
from tests.pallas_kernels.attention.loops import tiles  # noqa: F401
from tests.pallas_kernels.attention.test_branching import spans_of
from tests.pallas_kernels.attention.test_contract import SCALE, _segments
from tests.training.compiled_text import TO_READ

CARDS = ("h100", "a100", "a6000", "rtx4090", "l40s")
needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
pytestmark = pytest.mark.usefixtures("tiles")


def test_what_no_query_of_a_chunk_sees_is_not_visited():
    tiling = Tiling(batch=1, length=1280, kv_heads=1, chunk=256)
    assert AttentionMask.of(tiling, None, None).first_I.tolist() == [0, 0, 0, 0, 0]
    assert AttentionMask.of(tiling, 256, None).first_I.tolist() == [0, 0, 1, 2, 3]
    assert AttentionMask.of(tiling, 258, None).first_I.tolist() == [0, 0, 0, 1, 2]
    assert AttentionMask.of(tiling, None, _segments(1280, (300, 468))).first_I.tolist() == [0, 0, 1, 3, 3]


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


def _temporaries(length, batch=1, heads=9, kv_heads=3, head_dim=64):
    """Returns the scratch bytes of a forward and backward pass in bf16."""
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)

    def gradients(q, k, v, do):
        return jax.vjp(lambda *qkv: causal_attention(*qkv, SCALE), q, k, v)[1](do)

    return jax.jit(gradients).lower(q, k, v, do).compile(TO_READ).memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    lengths = [1024, 2048, 4096, 8192, 16384]
    used = [_temporaries(length) for length in lengths]
    assert all(long <= 2.1 * short for short, long in itertools.pairwise(used))
    for length, size in zip(lengths, used, strict=True):
        # q, do, out and dq, twice each (as rows and in chunks), and four arrays of keys so, in 16 bits; keys'
        # gradients, twice each, in 32; then at most four tiles of scores in 32 bits.
        linear = length * 64 * (2 * 2 * (4 * 9 + 4 * 3) + 2 * 4 * (2 * 3))
        assert size < linear + 4 * (9 * 256 * 256 * 4)


@needs_compiler
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("card", ["h100", *(pytest.param(card, marks=pytest.mark.exhaustive) for card in CARDS[1:])])
@pytest.mark.exhaustive
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
