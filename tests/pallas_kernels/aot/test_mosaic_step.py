"""A training step of scanned, recomputed layers: the arrays that XLA copies and computes around the kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kernel_report import abstract_weight
from pallas_kernels.mosaic import installation
from pallas_kernels.nf4_matmul import nf4_matmul

Abstract = jax.ShapeDtypeStruct
BF16 = jnp.bfloat16
LAYERS = 4


def stacked(shape):
    one = abstract_weight(shape, "split_k")
    return jax.tree.map(lambda leaf: Abstract((LAYERS, *leaf.shape), leaf.dtype), one)


def step_gradient(x, up, down):
    def layer(x, index):
        return x + nf4_matmul(jnp.tanh(nf4_matmul(x, up, index)), down, index), None

    def loss(x):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(LAYERS))
        return jnp.sum(y.astype(jnp.float32))

    return jax.grad(loss)(x)


def made(text):
    """Returns (dtype, sizes) of arrays that instructions compute, which parameters, tuples, loops and views do not."""
    passes = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call"}
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", text)
    return [(dtype, [int(s) for s in sizes.split(",") if s]) for dtype, sizes, opcode in found if opcode not in passes]


def whole_weights(text, shapes):
    """Returns computed arrays as large as a layer's codes in bytes, or of the shape of its weights."""
    codes = min(n * k // 2 for n, k in shapes)
    return [one for one in made(text) if one[0] == "u8" and np.prod(one[1]) >= codes] + [
        one for one in made(text) if one[0] in ("bf16", "f16", "f32") and sorted(one[1])[-2:] in map(sorted, shapes)
    ]


@pytest.mark.parametrize(
    ("card", "rows"),
    [
        ("h100", 512),
        *(
            pytest.param(card, rows, marks=pytest.mark.slow)
            for card, rows in (("h100", 2048), ("a100", 512), ("a6000", 512), ("rtx4090", 512), ("l40s", 2048))
        ),
    ],
)
def test_a_scanned_step_copies_no_codes_and_makes_no_weight(compile_for, card, rows):
    width, inner = 1024, 2816
    shapes = [(inner, width), (width, inner)]
    compiled = compile_for(card, step_gradient, Abstract((rows, width), BF16), *map(stacked, shapes))
    kernels = [kernel for kernel in compiled.kernels if "mosaic" in kernel.name]
    assert len(kernels) >= 4 and not compiled.spilled  # two products, forward and backward
    assert not whole_weights(compiled.text, shapes)
    activations = LAYERS * rows * width * 2 + 8 * rows * inner * 2
    scales = 4 * 2 * width * inner // 64
    assert compiled.memory.device.temporaries <= activations + scales


def test_the_checks_of_a_step_can_fail(compile_for):
    """A card without a fused kernel computes whole weights, and slices of codes."""
    shapes = [(2816, 1024), (1024, 2816)]
    compiled = compile_for("b200", step_gradient, Abstract((512, 1024), BF16), *map(stacked, shapes))
    assert whole_weights(compiled.text, shapes)


@pytest.mark.parametrize("card", ["h100", pytest.param("l40s", marks=pytest.mark.slow)])
def test_scanned_decoding_copies_no_codes_and_makes_no_weight(compile_for, card):
    """Eight rows forward use `skinny` on every card."""
    width, inner = 1024, 2816
    shapes = [(inner, width), (width, inner)]

    def layers(x, up, down):
        def layer(x, index):
            return x + nf4_matmul(jnp.tanh(nf4_matmul(x, up, index)), down, index), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]

    compiled = compile_for(card, layers, Abstract((8, width), BF16), *map(stacked, shapes))
    assert len([kernel for kernel in compiled.kernels if "mosaic" in kernel.name]) >= 2 and not compiled.spilled
    assert not whole_weights(compiled.text, shapes)


@pytest.mark.parametrize("card", ["h100", "a100"])
def test_a_jax_that_is_too_old_dequantizes_and_leaves_the_product_to_a_library(compile_for, monkeypatch, card):
    monkeypatch.setattr(installation, "LEAST_JAX", (99, 0))
    shape = (1024, 2048)

    def product(x, weight):
        return nf4_matmul(x, weight)

    compiled = compile_for(card, product, Abstract((512, 2048), BF16), abstract_weight(shape, "split_k"))
    assert not [kernel for kernel in compiled.kernels if "mosaic" in kernel.name]
    assert whole_weights(compiled.text, [shape])
