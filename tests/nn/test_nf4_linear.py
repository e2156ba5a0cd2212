"""NF4Linear is `nnx.Linear` with the dequantized kernel: values, dtypes, gradients; and what it saves for backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.layouts import repack
from qlora_jax.config import LoraArgs
from qlora_jax.nn.nf4_linear import NF4Linear, NF4LinearGeneral
from qlora_jax.quant import quantize

IN, OUT = 128, 96


def linear(**changes) -> nnx.Linear:
    layer = nnx.Linear(changes.pop("in_features", IN), OUT, rngs=nnx.Rngs(3), **changes)
    if layer.bias is not None:
        layer.bias[...] = jax.random.normal(jax.random.key(1), (OUT,), layer.bias.dtype)
    return layer


def dequantized(layer: nnx.Linear | nnx.LinearGeneral, quantized: NF4Linear | NF4LinearGeneral):
    """The dense layer with the kernel that the codes stand for: the oracle."""
    dense = nnx.clone(layer)
    dense.kernel[...] = quantized.dequantized_kernel()
    return dense


def inputs(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape, dtype)


def test_codes_are_those_of_the_transposed_kernel():
    layer = linear()
    found = repack(NF4Linear.from_linear(layer).weight.get_value(), "bnb")
    wanted = quantize(layer.kernel[...].T)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (2, 1, 3, IN)])
def test_equals_the_dense_layer_on_inputs_of_any_rank(shape, quant_type):
    layer = linear()
    quantized = NF4Linear.from_linear(layer, quant_type=quant_type, block_size=32, double_quant=False)
    x = inputs(*shape)
    found, wanted = quantized(x), dequantized(layer, quantized)(x)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [("float32", None, "float32"), ("bfloat16", None, "bfloat16"), ("float32", "bfloat16", "float32")],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_promotes_dtypes_as_the_dense_layer_does(x_dtype, dtype, param_dtype, use_bias):
    layer = linear(dtype=dtype, param_dtype=jnp.dtype(param_dtype), use_bias=use_bias)
    quantized = NF4Linear.from_linear(layer)
    x = inputs(4, IN, dtype=jnp.dtype(x_dtype))
    found, wanted = quantized(x), dequantized(layer, quantized)(x)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_promote_where_jax_allows_it():
    layer = linear()
    quantized = NF4Linear.from_linear(layer)
    with jax.numpy_dtype_promotion("standard"):
        found, wanted = quantized(inputs(4, IN, dtype=jnp.bfloat16)), layer(inputs(4, IN, dtype=jnp.bfloat16))
    assert found.dtype == wanted.dtype == jnp.float32


def test_a_width_that_is_not_a_multiple_of_the_block():
    layer = linear(in_features=100)
    quantized = NF4Linear.from_linear(layer)
    x = inputs(4, 100)
    np.testing.assert_allclose(quantized(x), dequantized(layer, quantized)(x), rtol=2e-5, atol=2e-5)


def test_gradient_of_the_input_is_that_of_the_dense_layer():
    layer = linear()
    quantized = NF4Linear.from_linear(layer)
    x = inputs(4, IN)
    found, wanted = (
        jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (quantized, dequantized(layer, quantized))
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_attributes_of_the_dense_layer():
    quantized = NF4Linear.from_linear(linear(dtype=jnp.bfloat16))
    assert (quantized.in_features, quantized.out_features, quantized.use_bias) == (IN, OUT, True)
    assert (quantized.dtype, quantized.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert quantized.dequantized_kernel().shape == (IN, OUT)


def test_reading_the_kernel_names_what_to_use():
    quantized = NF4Linear.from_linear(linear())
    with pytest.raises(AttributeError, match=r"dequantized_kernel\(\)"):
        _ = quantized.kernel


def test_lora_adds_the_scaled_product():
    layer = linear()
    quantized = NF4Linear.from_linear(layer, lora=LoraArgs(rank=4, alpha=6.0), rngs=nnx.Rngs(0))
    x = inputs(3, IN)
    assert np.array_equal(quantized(x), NF4Linear.from_linear(layer)(x))  # B is zero
    lora = quantized.lora
    assert lora.lora_a.shape == (IN, 4) and lora.lora_b.shape == (4, OUT)
    lora.lora_b[...] = jax.random.normal(jax.random.key(5), (4, OUT))
    wanted = NF4Linear.from_linear(layer)(x) + 1.5 * x @ lora.lora_a[...] @ lora.lora_b[...]
    np.testing.assert_allclose(quantized(x), wanted, rtol=1e-4, atol=1e-4)


def test_rank_stabilized_lora_divides_by_the_root():
    args = LoraArgs(rank=4, alpha=6.0, use_rslora=True, dtype="bfloat16")
    quantized = NF4Linear.from_linear(linear(), lora=args, rngs=nnx.Rngs(0))
    assert quantized.lora.scaling == 3.0
    assert quantized.lora.lora_a.dtype == quantized.lora.lora_b.dtype == jnp.bfloat16


def test_dropout_follows_train_and_eval():
    layer = linear()
    quantized = NF4Linear.from_linear(layer, lora=LoraArgs(rank=4, dropout=0.5), rngs=nnx.Rngs(0))
    quantized.lora.lora_b[...] = jnp.ones((4, OUT))
    x = inputs(3, IN)
    first, second = quantized(x), quantized(x)
    assert not np.array_equal(first, second)  # each call draws anew
    quantized.eval()
    assert np.array_equal(quantized(x), quantized(x))
    quantized.train()
    assert not np.array_equal(quantized(x), quantized(x))
    fixed = nnx.view(quantized, deterministic=True)
    assert np.array_equal(fixed(x), fixed(x))


def test_lora_needs_random_numbers():
    with pytest.raises(ValueError, match="rngs"):
        NF4Linear.from_linear(linear(), lora=LoraArgs(rank=4))


def test_lora_settings_that_a_layer_cannot_honour_are_named_at_once():
    with pytest.raises(ValueError) as error:
        NF4Linear.from_linear(linear(), lora=LoraArgs(method="dora", rank_pattern={"a": 2}), rngs=nnx.Rngs(0))
    assert "method" in str(error.value) and "rank_pattern" in str(error.value)


def test_a_layer_whose_settings_cannot_be_honoured_is_an_error():
    layer = linear(precision="highest", dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs))
    with pytest.raises(ValueError) as error:
        NF4Linear.from_linear(layer)
    assert "precision" in str(error.value) and "dot_general" in str(error.value)


def test_out_sharding_is_an_error():
    with pytest.raises(ValueError, match="out_sharding"):
        NF4Linear.from_linear(linear())(inputs(2, IN), out_sharding=jax.sharding.PartitionSpec("data"))


GENERAL = [
    ((64,), (4, 8), (-1,), (2, 3, 64)),
    ((4, 16), (32,), (-2, -1), (2, 3, 4, 16)),
    ((2, 32), (4, 5), (1, -1), (16, 2, 32)),
    ((2, 32), (4,), (-1, 1), (3, 2, 32)),
]


@pytest.mark.parametrize(("in_features", "out_features", "axis", "shape"), GENERAL)
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_general_equals_the_dense_layer(in_features, out_features, axis, shape, use_bias):
    layer = nnx.LinearGeneral(in_features, out_features, axis=axis, use_bias=use_bias, rngs=nnx.Rngs(3))
    if use_bias:
        layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    lora = LoraArgs(rank=2)
    quantized = NF4LinearGeneral.from_linear(layer, lora=lora, rngs=nnx.Rngs(0))
    assert quantized.dequantized_kernel().shape == layer.kernel.shape
    x = inputs(*shape)
    found, wanted = quantized(x), dequantized(layer, quantized)(x)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_linear_general_with_batch_axes_is_an_error():
    layer = nnx.LinearGeneral(64, 8, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="batch_axis"):
        NF4LinearGeneral.from_linear(layer)


def test_a_stack_gives_each_layers_own_codes():
    layers = [linear() for _ in range(2)]
    layers[1].kernel[...] = 2 * layers[0].kernel[...] + 0.1
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    quantized = NF4Linear.from_linear(stack, lora=LoraArgs(rank=4, dropout=0.1), rngs=nnx.Rngs(0))
    assert quantized.lora.lora_a.shape == (2, IN, 4)
    assert quantized.dequantized_kernel().shape == (2, IN, OUT)
    for index, layer in enumerate(layers):
        found = jax.tree.leaves(jax.tree.map(lambda leaf, at=index: leaf[at], quantized.weight.get_value()))
        wanted = jax.tree.leaves(NF4Linear.from_linear(layer).weight.get_value())
        assert all(map(np.array_equal, found, wanted))
    with pytest.raises(ValueError, match=r"nnx\.scan"):
        quantized(inputs(2, IN))


def test_no_dequantized_weight_is_saved_for_backward():
    quantized = NF4Linear.from_linear(linear(), lora=LoraArgs(rank=4), rngs=nnx.Rngs(0))
    _, vjp = jax.vjp(lambda x: jnp.tanh(quantized(x)), inputs(3, IN))
    saved = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    assert saved and not [leaf.shape for leaf in saved if leaf.size >= IN * OUT]


def test_shapes_alone_give_shapes():
    abstract = nnx.eval_shape(lambda: NF4Linear.from_linear(linear(), lora=LoraArgs(rank=4), rngs=nnx.Rngs(0)))
    concrete = NF4Linear.from_linear(linear(), lora=LoraArgs(rank=4), rngs=nnx.Rngs(0))
    found, wanted = (
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), nnx.state(m)) for m in (abstract, concrete)
    )
    assert found == wanted
