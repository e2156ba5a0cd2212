"""The residuals between forward and backward are the packed codes, once: in saved arrays and compiled text."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.nf4_matmul import nf4_matmul
from tests.pallas_kernels.nf4_matmul.contract import weight

LAYERS, N = 12, 256


@pytest.fixture(scope="module")
def stack():
    layers = [weight((N, N), layout="row_planar", seed=i) for i in range(LAYERS)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _loss(x, stack, policy):
    def layer(x, index):
        return jnp.tanh(nf4_matmul(x, stack, index)), None

    body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jnp.sum(jax.lax.scan(body, x, jnp.arange(LAYERS))[0])


POLICIES = [None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable]


@pytest.mark.parametrize("policy", POLICIES, ids=["no remat", "full remat", "everything saveable"])
def test_saved_residuals_hold_the_codes_once_and_no_weight(stack, policy):
    x = jnp.ones((8, N), jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: _loss(x, stack, policy), x)
    saved = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    codes = [leaf for leaf in saved if leaf.shape == stack.codes.shape and leaf.dtype == jnp.uint8]
    assert {leaf.unsafe_buffer_pointer() for leaf in codes} <= {stack.codes.unsafe_buffer_pointer()}
    dense = [leaf for leaf in saved if leaf.size >= N * N and leaf.dtype != jnp.uint8]
    assert not dense, [(leaf.shape, leaf.dtype) for leaf in dense]
    activations = LAYERS * x.size  # residuals of tanh, at most twice with full precision
    others = [
        leaf for leaf in saved if leaf.dtype in (jnp.bfloat16, jnp.float32) and leaf.size > stack.absmax_codes.size
    ]
    assert sum(leaf.size for leaf in others) <= 3 * activations


@pytest.mark.parametrize("policy", POLICIES, ids=["no remat", "full remat", "everything saveable"])
def test_compiled_step_makes_no_second_copy(stack, policy):
    x = jax.ShapeDtypeStruct((8, N), jnp.bfloat16)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stack)
    compiled = jax.jit(jax.grad(_loss), static_argnums=2).lower(x, abstract, policy).compile()
    one_layer = 2 * N * N  # one layer's weight in bf16, while its product runs
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * one_layer
    made = _shapes_made(compiled.as_text())
    shape = ",".join(map(str, stack.codes.shape))
    assert f"u8[{shape}]" not in made
    assert not [s for s in made if re.fullmatch(rf"(bf16|f16|f32)\[{LAYERS},{N},{N}\]", s)]


def _shapes_made(text: str) -> set[str]:
    """Returns the shapes that instructions compute; parameters, tuples, loops and views only pass arrays on."""
    passes = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call"}
    found = re.findall(r"= (\w+\[[\d,]*\])\S* ([\w-]+)\(", text)
    return {shape for shape, opcode in found if opcode not in passes}


def test_the_checks_can_fail(stack):
    """Differentiates without the custom rule: autodiff then saves every layer's dequantized weight."""

    def plain(x):
        def layer(x, index):
            return jnp.tanh(x @ dequantize(stack.layer(index), x.dtype).T), None

        return jnp.sum(jax.lax.scan(layer, x, jnp.arange(LAYERS))[0])

    x = jnp.ones((8, N), jnp.bfloat16)
    _, vjp = jax.vjp(plain, x)
    assert [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == (LAYERS, N, N) or leaf.shape == (LAYERS, N, N)[::-1]]
    compiled = jax.jit(jax.grad(plain)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > LAYERS * N * N * 2
