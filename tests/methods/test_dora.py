"""Tests DoRA against its equation: values, every gradient, and merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.methods.dora import DoRA, InferenceDoRA, row_norms
from qlora_jax.methods.ia3 import IA3
from qlora_jax.nn.dropout import apply_dropout
from qlora_jax.nn.frozen_weight import MixedStack
from qlora_jax.nn.linear import QLinear, project
from tests.nn.frozen_linears import LAYER, K, M, N, R, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array


def _dora(linear: QLinear, a, b, m, dropout: float = 0.0) -> DoRA:
    started = DoRA.init(jnp.stack([a, a]), jnp.stack([b, b]), linear.weight.get_value(), 2.0, dropout)
    return DoRA(a, b, m, started.weight_norms2[...], 2.0, dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quantized", [False, True])
def test_dora(quantized, dropout):
    """The norm has no gradient, as in PEFT; dropout applies to the change only."""
    linear, key = random_linear(quantized=quantized), jax.random.split(jax.random.key(3), 3) if dropout else None
    weight, bias = dequantized_layer(linear), linear.bias[...][1]

    def ours(x, a, b, m):
        adapter = _dora(linear, a, b, m, dropout)
        return DoRA.apply([adapter], x, [linear.select_layer(LAYER)], [key])[0]

    def plain(x, a, b, m):
        whole = weight + 2.0 * (a @ b).T
        norm = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=1))
        x_dropped = apply_dropout(x, dropout, key)
        change = (m / norm)[None] * (x_dropped @ whole.T) - x_dropped @ weight.T
        return x @ weight.T + bias[None] + change

    args = random_array(M, K), random_array(K, R) / 8, random_array(R, N) / 8, 1 + random_array(N) ** 2
    check_vjp(ours, plain, *args)


def test_dora_starts_as_the_weight_and_its_merge_does_what_it_does():
    linear = random_linear(quantized=True)
    factors = jnp.stack([random_array(K, R)] * 2), jnp.stack([random_array(R, N)] * 2)
    fresh = DoRA.init(factors[0], jnp.zeros_like(factors[1]), linear.weight.get_value(), 2.0, 0.0)
    np.testing.assert_allclose(
        fresh.select_layer(1).merge(dequantized_layer(linear)), dequantized_layer(linear), rtol=2e-6, atol=1e-7
    )
    trained = DoRA(*factors, 1 + random_array(2, N) ** 2, fresh.weight_norms2[...], 2.0, 0.0)
    x, one = random_array(M, K), trained.select_layer(1)
    inside = DoRA(
        *(leaf[...] for leaf in (one.lora_a, one.lora_b, one.magnitude)), trained.weight_norms2[...], 2.0, 0.0
    )
    y = DoRA.apply([inside], x, [linear.select_layer(LAYER)], [None])[0]
    merged = x @ one.merge(dequantized_layer(linear)).T + linear.bias[...][1][None]
    np.testing.assert_allclose(y, merged, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(one.merge_bias(linear.bias[...][1]), linear.bias[...][1])


@pytest.mark.parametrize("share", [1e-4, 1.0, 30.0])
def test_doras_norms_are_those_of_the_whole_weight(share):
    """Deltas are much smaller than the weight, similar, and much larger."""
    linear = random_linear(quantized=True)
    a, b = random_array(K, R) / 8, random_array(R, N) * share
    norms2 = _dora(linear, a, b, jnp.ones(N)).weight_norms2[...][1]
    norms = row_norms(a, b, norms2, linear.select_layer(LAYER), 2.0)
    np.testing.assert_allclose(norms, jnp.linalg.norm(dequantized_layer(linear) + 2.0 * (a @ b).T, axis=1), rtol=2e-6)


def test_a_delta_that_undoes_the_weight_gives_no_nan():
    linear = random_linear(quantized=False)
    weight = linear.weight.get_value()[1]
    a, b = jnp.eye(K), -weight.T / 2
    norms = row_norms(a, b, jnp.sum(weight**2, axis=1), linear.select_layer(LAYER), 2.0)
    assert np.all(norms > 0) and np.all(norms < 1e-3)


def test_fresh_adapters_change_nothing_among_others():
    """Projections of one x may have adapters of several kinds."""
    linears = [random_linear(quantized=True) for _ in range(3)]
    for name, linear in zip("abc", linears, strict=True):
        linear.name = name
    x = random_array(M, K)
    before = project(linears, x, LAYER, None)
    linears[0].adapter = IA3(jnp.ones(N), False)
    a, b = random_array(K, R), jnp.zeros((R, N))
    linears[1].adapter = _dora(linears[1], a, b, _dora_magnitude(linears[1], a, b))
    for old, new in zip(before, project(linears, x, LAYER, None), strict=True):
        np.testing.assert_allclose(new, old, rtol=2e-6, atol=1e-6)


def _dora_magnitude(linear: QLinear, a, b):
    return DoRA.init(jnp.stack([a, a]), jnp.stack([b, b]), linear.weight.get_value(), 2.0, 0.0).magnitude[...][1]


def test_dora_over_a_stack_of_both_kinds():
    quantized, dense = (
        random_linear(quantized=True).weight.get_value(),
        random_linear(quantized=False).weight.get_value(),
    )
    stack = MixedStack(parts=(jax.tree.map(lambda leaf: leaf[:1], quantized), dense[1:]), layers=((0,), (1,)))
    a, b = jnp.stack([random_array(K, R)] * 2), jnp.stack([random_array(R, N)] * 2)
    adapter = DoRA.init(a, b, stack, 2.0, 0.0)
    np.testing.assert_allclose(
        adapter.magnitude[...][1], jnp.linalg.norm(dense[1] + 2.0 * (a[1] @ b[1]).T, axis=1), rtol=2e-6
    )
    settled = InferenceDoRA(adapter, stack)
    np.testing.assert_allclose(settled.scale[...], np.ones((2, N)), rtol=1e-5)


def test_decoding_does_not_compute_the_norms_again():
    linear, x = random_linear(quantized=True), random_array(M, K)
    a, b = jnp.stack([random_array(K, R)] * 2), jnp.stack([random_array(R, N)] * 2)
    adapter = DoRA.init(a, b, linear.weight.get_value(), 2.0, 0.0)

    def program(one: DoRA) -> str:
        for leaf in one.LEAVES:
            setattr(one, leaf.name, nnx.LoRAParam(getattr(one, leaf.name)[...][LAYER]))
        return str(jax.make_jaxpr(lambda x: type(one).apply([one], x, [linear.select_layer(LAYER)], [None]))(x))

    settled = InferenceDoRA(adapter, linear.weight.get_value())
    assert "dora_norms" not in program(settled) and "dora_norms" in program(adapter)
