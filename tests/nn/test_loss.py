"""Tests each function with a custom VJP against autodiff of its equation in f32: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.attention import cached_attention
from qlora_jax.nn.lm_head import Head, HeadWithRows, TrainableHead
from qlora_jax.nn.lm_head_tiles import TILES, Tile
from qlora_jax.nn.lora import lora_deltas
from qlora_jax.nn.loss import token_nll
from qlora_jax.nn.matmul import dot_nn, dot_nt, dot_tn
from qlora_jax.nn.mlp import ACTIVATIONS, apply_activation, gated_activation
from qlora_jax.nn.new_token_rows import NewTokenRows
from qlora_jax.nn.norm import layer_norm, rms_norm
from qlora_jax.nn.rope import Rope, rotate, rotations


def _random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def _check(ours, plain, *args, tolerance=2e-5):
    """Compares values, and gradients of a random linear function of them."""
    value, vjp = jax.vjp(ours, *args)
    expected, expected_vjp = jax.vjp(plain, *args)
    cotangent = _random(*value.shape, seed=9)
    for actual, wanted in zip([value, *vjp(cotangent)], [expected, *expected_vjp(cotangent)], strict=True):
        scale = float(jnp.max(jnp.abs(wanted))) + 1e-6
        np.testing.assert_allclose(actual / scale, wanted / scale, atol=tolerance)


def _plain_norm(x, weight):
    rstd = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return x * rstd * weight[None]


def _plain_attention(q, k, v, scale=0.3):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf)), v)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    args = _random(6, 32), _random(32)
    _check(lambda x, w: rms_norm(x, w, 1e-5, offset), lambda x, w: _plain_norm(x, offset + w), *args)


def test_layer_norm():
    def plain(x, weight, bias):
        mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-5) * weight[None] + bias[None]

    args = 3 * _random(6, 32) + 2, _random(32), _random(32, seed=1)
    _check(lambda x, w, b: layer_norm(x, w, b, 1e-5), plain, *args)


PLAIN_ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "gelu_tanh": lambda x: x / (1 + jnp.exp(-2 * np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    plain, gate, up = PLAIN_ACTIVATIONS[activation], 2 * _random(6, 32), _random(6, 32, seed=1)
    _check(lambda x: apply_activation(x, activation), plain, gate)
    _check(lambda gate, up: gated_activation(gate, up, activation), lambda gate, up: plain(gate) * up, gate, up)


@pytest.mark.parametrize("narrow", ["a", "b"])
def test_dot_that_contracts_rows(narrow):
    a, b = (_random(2, 40, 8), _random(2, 40, 24)) if narrow == "a" else (_random(2, 40, 24), _random(2, 40, 8))
    np.testing.assert_allclose(dot_tn(a, b), jnp.swapaxes(a, 1, 2) @ b, atol=2e-5)


def test_attention_over_a_cache_equals_causal_attention():
    q, k, v = _random(2, 9, 4, 16), _random(2, 12, 2, 16), _random(2, 12, 2, 16, seed=1)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    np.testing.assert_allclose(
        cached_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), positions, 0.3),
        _plain_attention(q, k[:, :9], v[:, :9]),
        atol=2e-6,
    )


@pytest.mark.parametrize("vocab", [50, 64, 100], ids=["a tile and a rest", "two tiles", "three and a rest"])
@pytest.mark.parametrize("supervised", [0, 1, 37, 700])
def test_token_nll(supervised, vocab, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    m = 700
    hidden, head = _random(m, 24), _random(vocab, 24)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, vocab, m), jnp.int32)
    mask = jnp.asarray(np.random.default_rng(1).permutation(m) < supervised)

    def plain(hidden):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        return jnp.where(mask, -jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], 0.0)

    _check(lambda hidden: token_nll(hidden, Head(head), targets, mask), plain, hidden)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_nll_with_bias_and_softcap(biased, softcap, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, head, bias = _random(300, 24), _random(100, 24), _random(100) if biased else None
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 100, 300), jnp.int32)

    def plain(hidden):
        logits = hidden @ head.T + (0 if bias is None else bias[None])
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]

    _check(lambda hidden: token_nll(hidden, Head(head, bias, softcap), targets, jnp.ones(300, bool)), plain, hidden)


def test_token_nll_of_logits_beyond_exp(monkeypatch):
    """exp(l) alone would overflow, and the first tile's largest logit is far below the second's."""
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, head = _random(8, 24), _random(64, 24) * jnp.where(jnp.arange(64) < 32, 0.01, 200.0)[:, None]
    targets = jnp.arange(0, 64, 8, dtype=jnp.int32)
    everyone = jnp.ones(8, bool)

    def plain(hidden):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), targets[:, None], 1)[:, 0]

    _check(lambda hidden: token_nll(hidden, Head(head), targets, everyone), plain, hidden)


@pytest.mark.parametrize("ids", [(100, 101, 102), (98, 99, 100), (40, 7, 99)], ids=["beyond", "across", "within"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_token_nll_with_rows_that_train(ids, softcap, biased, monkeypatch):
    """Trainable rows replace and extend a head; the replaced frozen rows have no influence."""
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, table, rows = _random(700, 24), _random(100, 24), _random(3, 24)
    bias, row_bias = (_random(100), _random(3)) if biased else (None, None)
    places = np.asarray(ids)
    size = max(100, *places + 1)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, size, 700), jnp.int32).at[:60:2].set(ids[1])
    mask = jnp.asarray(np.random.default_rng(1).random(700) < 0.4)

    def grown(x, own):
        return jnp.pad(x, ((0, size - 100),) + ((0, 0),) * (x.ndim - 1)).at[places].set(own)

    def logits(hidden, rows):
        logits = hidden @ grown(table, rows).T + (0 if bias is None else grown(bias, row_bias)[None])
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def plain(hidden, rows):
        log_p = jax.nn.log_softmax(logits(hidden, rows))
        return jnp.where(mask, -jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0], 0.0)

    def head(rows):
        return HeadWithRows.of(Head(table, bias, softcap), rows, row_bias, ids)

    _check(lambda hidden, rows: token_nll(hidden, head(rows), targets, mask), plain, hidden, rows)
    np.testing.assert_allclose(head(rows).logits(hidden), logits(hidden, rows), atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("supervised", [0, 1, 300])
def test_token_nll_of_a_head_that_trains_whole(supervised, softcap, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(256, 32))
    hidden, weight = _random(700, 24), _random(100, 24)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 100, 700), jnp.int32)
    mask = jnp.asarray(np.random.default_rng(1).permutation(700) < supervised)

    def plain(hidden, weight):
        logits = hidden @ weight.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jnp.where(mask, -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0], 0.0)

    _check(lambda h, w: token_nll(h, TrainableHead(w, softcap), targets, mask), plain, hidden, weight)


@pytest.mark.parametrize("ids", [(50, 51), (49, 50), (3, 20)], ids=["beyond", "across", "within"])
def test_rows_of_an_embedding(ids):
    table, rows = _random(50, 24), _random(2, 24)
    tokens = jnp.asarray([0, ids[1], 4, ids[0], ids[1], 48, ids[1]], jnp.int32)

    def plain(rows):
        return jnp.pad(table, ((0, 2), (0, 0))).at[np.asarray(ids)].set(rows)[tokens]

    _check(lambda rows: NewTokenRows(rows, None, ids).lookup(tokens, table), plain, rows)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_deltas(dropout):
    key = jax.random.key(3)
    keep = jax.random.bernoulli(key, 1 - dropout, (30, 48)).astype(jnp.float32) / (1 - dropout)

    def ours(x, a, b):
        return lora_deltas(x, a, (b,), (2.0,), dropout, key)[0]

    _check(ours, lambda x, a, b: 2.0 * (x * keep) @ a @ b, _random(30, 48), _random(48, 4), _random(4, 20))


def test_lora_deltas_of_one_x():
    """Ranks, widths and scalings differ; each result and gradient equals that of one adapter alone."""

    def ours(x, a1, a2, b1, b2):
        return jnp.concatenate(lora_deltas(x, jnp.concatenate([a1, a2], 1), (b1, b2), (2.0, 0.5), 0.0, None), 1)

    def plain(x, a1, a2, b1, b2):
        return jnp.concatenate([2.0 * x @ a1 @ b1, 0.5 * x @ a2 @ b2], axis=1)

    _check(ours, plain, _random(30, 48), _random(48, 4), _random(48, 3), _random(4, 20), _random(3, 12))


def test_adapters_in_bf16_take_gradients_rounded_to_it():
    def ours(x, a, b):
        return lora_deltas(x, a, (b,), (2.0,), 0.0, None)[0]

    x, a, b = _random(30, 48), _random(48, 4).astype(jnp.bfloat16), _random(4, 20).astype(jnp.bfloat16)
    value, vjp = jax.vjp(ours, x, a, b)
    expected, expected_vjp = jax.vjp(ours, x, a.astype(jnp.float32), b.astype(jnp.float32))
    (dx, *grads), (wanted_dx, *wanted) = vjp(value), expected_vjp(expected)
    jax.tree.map(np.testing.assert_array_equal, (value, dx), (expected, wanted_dx))
    for found, exact in zip(grads, wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_dropout_needs_a_key_and_none_means_none():
    x, a, b = _random(30, 48), _random(48, 4), _random(4, 20)
    without = lora_deltas(x, a, (b,), (2.0,), 0.0, None)[0]
    np.testing.assert_array_equal(lora_deltas(x, a, (b,), (2.0,), 0.5, None)[0], without)


@pytest.mark.parametrize("heads", [1, 3])
def test_rotate_turns_pairs_of_a_head_as_complex_numbers(heads):
    positions = jnp.asarray([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], jnp.int32)
    cos, sin = rotations(Rope(theta=100.0, dim=16, max_positions=32), positions, 32)

    def plain(x):
        angles = (
            positions[..., None, None].astype(jnp.float32)
            * np.float32(100.0) ** -(np.arange(8, dtype=np.float32) / 8)[None, None, None]
        )
        turned = jax.lax.complex(x[..., :8], x[..., 8:]) * jnp.exp(jax.lax.complex(jnp.zeros_like(angles), angles))
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    _check(lambda x: rotate(x, cos, sin), plain, _random(2, 5, heads, 16))


def test_a_product_of_one_row_is_that_of_the_row_among_others():
    """Products of one row run with two rows on CPUs in bfloat16, which must not change the result."""
    a, b = _random(3, 64).astype(jnp.bfloat16), _random(40, 64).astype(jnp.bfloat16)
    np.testing.assert_allclose(dot_nt(a[:1], b), dot_nt(a, b)[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dot_nn(a[:1], b.T), dot_nn(a, b.T)[:1], rtol=1e-5, atol=1e-5)
    assert dot_tn(a[:1], a[:1]).shape == (64, 64)
