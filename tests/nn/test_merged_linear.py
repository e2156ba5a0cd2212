"""Tests products with codes of merged weights against torch with straight-through gradients, and their equation."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.frozen_weight import MixedStack, dense_weight
from qlora_jax.nn.linear import FrozenLayer, QLinear
from qlora_jax.nn.lora import LoRA
from qlora_jax.nn.merged_linear import MergedCodes
from qlora_jax.quant.encoders import ENCODERS, round_trip
from tests.nn.frozen_linears import LAYER, K, M, N, R, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array

SCRIPT = Path(__file__).parents[1] / "oracle/merged_linear.py"
FORMATS = ("Q4_0", "Q8_0", "nf4")
SCALING = 2.0


def _linear(kinds: tuple[str, ...], a, b, *, quantized: bool = True) -> QLinear:
    """Layer 1 has the adapter (a, b), as a scan over layers gives it to the product."""
    linear = random_linear(quantized=quantized)
    linear.merging, linear.adapter = MergedCodes(kinds), LoRA(a, b, SCALING, 0.0)
    return linear


def _factors() -> tuple[jax.Array, jax.Array]:
    return random_array(K, R) / 8, random_array(R, N) / 8


def test_equals_torch_with_straight_through_gradients(oracle):
    x, dy, (a, b) = random_array(M, K), random_array(M, N), _factors()
    weight = dequantized_layer(random_linear(quantized=True, bias=False))
    arrays = {"x": x, "weight": weight, "a": a, "b": b, "dy": dy}
    arrays = {name: np.asarray(each) for name, each in arrays.items()}
    expected = oracle(SCRIPT, **arrays, scaling=SCALING, formats=FORMATS)
    for kind in FORMATS:

        def ours(x, a, b, kind=kind):
            linear = _linear((kind, kind), a, b)
            linear.bias = None
            return linear(x, LAYER, None)

        y, gradient = jax.vjp(ours, x, a, b)
        for name, found in zip(("y", "x", "a", "b"), (y, *gradient(dy)), strict=True):
            np.testing.assert_allclose(found, expected[f"{kind}.{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("quantized", [False, True])
def test_equals_its_equation_with_the_codes_of_the_whole_stack(quantized, kind):
    """Value and gradient of x are those of the dense product; decoding has the same codes to the bit."""
    a, b = _factors()
    linear = _linear((kind, kind), a, b, quantized=quantized)
    merged = round_trip(linear.adapter.merge(dequantized_layer(linear)), ENCODERS[kind])
    check_vjp(lambda x: linear(x, LAYER, None), lambda x: x @ merged.T + linear.bias[...][1][None], random_array(M, K))
    whole = _linear((kind, kind), jnp.stack([a, a]), jnp.stack([b, b]), quantized=quantized)
    whole.replace_by_codes()
    assert whole.adapter is None and whole.merging is None
    np.testing.assert_array_equal(dense_weight(whole.weight.get_value(), jnp.float32)[1], merged)


def test_layers_may_have_several_formats():
    a, b = _factors()
    x = random_array(M, K)
    linear = _linear(("Q8_0", "Q4_0"), a, b)
    np.testing.assert_array_equal(linear(x, LAYER, None), _linear(("Q4_0", "Q4_0"), a, b)(x, LAYER, None))
    whole = _linear(("Q8_0", "Q4_0"), jnp.stack([a, a]), jnp.stack([b, b]))
    whole.replace_by_codes()
    assert isinstance(whole.weight.get_value(), MixedStack)
    np.testing.assert_array_equal(linear(x, LAYER, None), whole(x, LAYER, None))


def test_the_backward_pass_keeps_no_weight():
    """Beside x and the adapter's arrays it keeps the stack as it was given, and no layer of it."""
    linear = _linear(("Q4_0", "Q4_0"), *_factors(), quantized=False)
    x, stack = random_array(M, K), linear.weight.get_value()
    _, gradient = jax.vjp(lambda x, weight: linear.merging.product(x, linear.adapter, weight, LAYER), x, stack)
    kept = [leaf.shape for leaf in jax.tree.leaves(gradient)]
    assert stack.shape in kept and (N, K) not in kept


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_0"), ("Q8_0", "Q4_0")])
def test_a_traced_flag_chooses_products_with_rounding(kinds):
    """One function computes both; without rounding, value and gradients are those of the adapter apart, to the bit."""
    (a, b), x, dy = _factors(), random_array(M, K), random_array(M, N)
    weight, codes = random_linear(quantized=True).weight.get_value(), MergedCodes(kinds)

    @jax.jit
    def product(rounds, x, a, b):
        return codes.product(x, LoRA(a, b, SCALING, 0.0), weight, LAYER, rounds)

    @jax.jit
    def apart(x, a, b):
        return LoRA.apply([LoRA(a, b, SCALING, 0.0)], x, [FrozenLayer(weight, None, LAYER)], [None])[0]

    for flag, other in ((True, functools.partial(product, None)), (False, apart)):
        found, expected = (
            (y, *gradient(dy))
            for y, gradient in (
                jax.vjp(each, x, a, b) for each in (functools.partial(product, jnp.asarray(flag)), other)
            )
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(product(jnp.asarray(True), x, a, b), product(jnp.asarray(False), x, a, b))
