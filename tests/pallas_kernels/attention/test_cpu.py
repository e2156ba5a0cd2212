"""Tests of the C++ loops alone: bits, where they run, transformations and memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import causal_attention
from pallas_kernels.attention import cpu as attention_cpu
from tests.pallas_kernels.attention.loops import native  # noqa: F401
from tests.pallas_kernels.attention.test_branching import rows_of_trees, spans_of
from tests.pallas_kernels.attention.test_contract import SCALE, _inputs, _value_and_gradients

pytestmark = pytest.mark.usefixtures("native")

BF16 = jnp.bfloat16


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_every_run_gives_the_same_bits(dtype, branching):
    """Results are bit-identical for any number of threads, because each adds to dq in the order of keys."""
    spans = spans_of(rows_of_trees(5, 2, 700)) if branching else None
    function = functools.partial(causal_attention, scale=SCALE, spans=spans, window=130 if branching else None)
    inputs = _inputs(700, 6, 2, 2, 64, dtype)
    first = _value_and_gradients(function, *inputs)
    for _ in range(4):
        again = _value_and_gradients(function, *inputs)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(again, first, strict=True))


def test_a_row_does_not_depend_on_the_others():
    q, k, v, _ = _inputs(300, 4, 2, batch=3)
    attention = jax.jit(functools.partial(causal_attention, scale=SCALE))
    np.testing.assert_array_equal(attention(q, k, v)[1:2], attention(q[1:2], k[1:2], v[1:2]))


def test_causal_attention_takes_them_where_they_are_at_home():
    def calls(dtype, head_dim):
        shapes = [jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)] * 3
        text = jax.jit(lambda q, k, v: causal_attention(q, k, v, SCALE, softcap=2.0)).lower(*shapes).as_text()
        return re.findall(r"custom_call @(attention_(?:for|back)ward)", text)

    assert calls(BF16, 64) == calls(jnp.float32, 20) == ["attention_forward"]
    assert calls(jnp.float16, 64) == []
    assert "CPUs" in attention_cpu.unsupported_reason("gpu", BF16)
    assert "not float16" in attention_cpu.unsupported_reason("cpu", "float16")


def test_vmap_and_checkpoint():
    q, k, v, d_out = (x.reshape(2, 1, *x.shape[1:]) for x in _inputs(70, 2, 1, 2, 32, BF16))

    def loss(q, k, v, d_out):
        out = jax.checkpoint(lambda *qkv: causal_attention(*qkv, SCALE))(q, k, v)
        return jnp.sum((out * d_out).astype(jnp.float32))

    mapped = jax.vmap(jax.grad(loss))(q, k, v, d_out)
    alone = jnp.stack([jax.grad(loss)(*(x[i] for x in (q, k, v, d_out))) for i in range(2)])
    np.testing.assert_array_equal(np.asarray(mapped, np.float32), np.asarray(alone, np.float32))


def test_packed_operands_are_counted_and_linear_in_length():
    def scratch(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 64), BF16) for n in (9, 3, 3, 9)]

        def gradients(q, k, v, d_out):
            return jax.vjp(lambda *qkv: causal_attention(*qkv, SCALE), q, k, v)[1](d_out)

        return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = scratch(1024), scratch(8192)
    assert 7.5 * short < long < 8.5 * short
    assert long < 8192 * 64 * 4 * (3 * 9 + 2 * 3)  # f32 sums and two packed arrays of 16 bits a q-head, and some
