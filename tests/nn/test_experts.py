"""Experts against a loop over experts in f32: results and gradients, for balanced and extreme choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.methods.expert_lora import ExpertLoRA
from qlora_jax.nn.experts import ExpertLinear, Experts
from tests.marks import EXHAUSTIVE, SLOW

LAYERS, EXPERTS, WIDTH, INNER, RANK = 2, 5, 12, 8, 3
RNG = np.random.default_rng(0)
CHOICES = {
    "balanced": np.stack([RNG.permutation(EXPERTS)[:2] for _ in range(16)]),
    "one token": np.array([[4, 1]]),
    "one expert for all": np.full((16, 1), 3),
    "empty experts": np.stack([RNG.permutation([1, 4]) for _ in range(16)]),
}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def make_experts(share: bool) -> Experts:
    """Returns experts of two layers, with biases and adapters of one layer, as inside the scan."""
    shapes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    linears = {
        name: ExpertLinear(normal(LAYERS, EXPERTS, n, k), normal(LAYERS, EXPERTS, n)) for name, (n, k) in shapes.items()
    }
    experts, own = Experts(**linears, activation="silu", count=EXPERTS), 1 if share else EXPERTS
    experts.gate_up_proj.adapter = ExpertLoRA(normal(own, WIDTH, RANK), normal(own, RANK, 2 * INNER), 0.7)
    experts.down_proj.adapter = ExpertLoRA(normal(own, INNER, RANK), normal(own, RANK, WIDTH), 0.7)
    return experts


def loop(experts: Experts, x_MD, choice, weights_Mk, layer: int):
    """Returns the sum over experts of weight * down(silu(gate(x)) * up(x)), each with W + s (A B)^T."""
    result = jnp.zeros_like(x_MD)
    for expert in range(EXPERTS):
        (a, b), (a_down, b_down) = (
            [leaf[...][expert % len(leaf[...])] for leaf in (one.adapter.lora_a, one.adapter.lora_b)]
            for one in (experts.gate_up_proj, experts.down_proj)
        )
        delta = 0.7 * (a @ b).T

        def projected(name, x, delta, expert=expert):
            linear = getattr(experts, name)
            return x @ (linear.weight[...][layer, expert] + delta).T + linear.bias[...][layer, expert][None]

        gate, up = projected("gate_proj", x_MD, delta[:INNER]), projected("up_proj", x_MD, delta[INNER:])
        y = projected("down_proj", jax.nn.silu(gate) * up, 0.7 * (a_down @ b_down).T)
        result += jnp.where(choice == expert, weights_Mk, 0).sum(axis=1, keepdims=True) * y
    return result


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("empty experts", False),
        pytest.param("one token", True, marks=SLOW),
        pytest.param("one expert for all", False, marks=SLOW),
        pytest.param("balanced", True, marks=EXHAUSTIVE),
    ],
)
def test_results_and_gradients_equal_those_of_a_loop(name, share):
    experts, choice, layer = make_experts(share), jnp.asarray(CHOICES[name], jnp.int32), 1
    graphdef, lora, frozen = nnx.split(experts, nnx.LoRAParam, ...)
    x_MD, weights_Mk, cotangent = normal(len(choice), WIDTH), normal(*choice.shape), normal(len(choice), WIDTH)

    def grouped(lora, x_MD, weights_Mk):
        return nnx.merge(graphdef, lora, frozen)(x_MD, choice, weights_Mk, jnp.int32(layer))

    def looped(lora, x_MD, weights_Mk):
        return loop(nnx.merge(graphdef, lora, frozen), x_MD, choice, weights_Mk, layer)

    def results(function):
        y, vjp = jax.vjp(function, lora, x_MD, weights_Mk)
        return jax.tree.leaves((y, vjp(cotangent)))

    found, expected = jax.jit(lambda: (results(grouped), results(looped)))()
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_results_in_16_bits_are_near_those_of_a_loop():
    experts, choice = make_experts(share=False), jnp.asarray(CHOICES["balanced"], jnp.int32)
    x_MD, weights_Mk = normal(len(choice), WIDTH), normal(*choice.shape)
    graphdef, state = nnx.split(experts)
    half = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    found = jax.jit(lambda x_MD: half(x_MD, choice, weights_Mk, jnp.int32(1)))(x_MD.astype(jnp.bfloat16))
    expected = loop(experts, x_MD, choice, weights_Mk, 1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02 * float(jnp.abs(expected).max()))
