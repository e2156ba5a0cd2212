"""quantize_model on Flax models that know nothing of it: values, and every transformation that NNX users reach for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.nn.model_quantization import QuantRule, _check_types, quantize_model
from qlora_jax.nn.nf4_linear import NF4Linear, NF4LinearGeneral
from tests.nn.flax_models import MLP, StackedMLP, Transformer, batch

LORA = LoraArgs(rank=4, alpha=8.0)
ALL = [QuantRule(".*", lora=LORA)]


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 6), 0, 32)


MODELS = {
    "mlp": (lambda: MLP(nnx.Rngs(0)), batch),
    "transformer": (lambda: Transformer(nnx.Rngs(0)), tokens),
    "scanned": (lambda: StackedMLP(nnx.Rngs(0)), batch),
    "scanned, remat": (lambda: StackedMLP(nnx.Rngs(0), remat=True), batch),
    # Flax's own model: linear layers in a cell, which nnx.scan runs over time.
    "recurrent": (lambda: nnx.RNN(nnx.GRUCell(64, 64, rngs=nnx.Rngs(0))), lambda: batch(rows=10).reshape(2, 5, 64)),
}


@pytest.fixture(params=list(MODELS))
def case(request) -> tuple[nnx.Module, jax.Array]:
    """(a dense model, its input)."""
    make, inputs = MODELS[request.param]
    return make(), inputs()


def with_dequantized_kernels(model: nnx.Module, quantized: nnx.Module) -> nnx.Module:
    """The dense model with the kernels that the codes stand for: the oracle."""
    kernels = {
        path: module.dequantized_kernel()
        for path, module in nnx.iter_modules(quantized)
        if isinstance(module, NF4Linear | NF4LinearGeneral)
    }
    dense = nnx.clone(model)
    for path, module in nnx.iter_modules(dense):
        if path in kernels:
            module.kernel[...] = kernels[path]
    return dense


def with_random_b(model: nnx.Module) -> nnx.Module:
    """Sets B, which starts at zero, so that A has a gradient too."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            leaf[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    return model


def loss(model, x) -> jax.Array:
    return jnp.mean(jnp.square(model(x)))


def lora_gradients(model: nnx.Module, x: jax.Array) -> nnx.State:
    """The oracle of gradients: plain JAX over a split model."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    return jax.grad(lambda lora: loss(nnx.merge(graphdef, lora, rest, copy=True), x))(lora)


def arrays(state: nnx.State) -> list[jax.Array]:
    """The leaves of a state, with the data of random keys, which NumPy cannot compare."""
    keys = jax.dtypes.prng_key
    leaves = jax.tree.leaves(state)
    return [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keys) else leaf for leaf in leaves]


def assert_close(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_equals_the_model_with_dequantized_kernels(case):
    model, x = case
    quantized = quantize_model(model, ALL)
    assert type(quantized) is type(model)
    np.testing.assert_allclose(quantized(x), with_dequantized_kernels(model, quantized)(x), rtol=1e-4, atol=1e-4)


def test_the_given_model_stays_as_it_was(case):
    model, x = case
    before = model(x)
    leaves = jax.tree.leaves(nnx.state(model))
    quantized = quantize_model(model, ALL)
    assert [a is b for a, b in zip(jax.tree.leaves(nnx.state(model)), leaves, strict=True)].count(False) == 0
    for leaf in jax.tree.leaves(nnx.state(quantized, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = jnp.zeros_like(leaf[...])
    assert np.array_equal(model(x), before)


def test_only_adapters_are_lora_params(case):
    model, _ = case
    _, lora, rest = nnx.split(quantize_model(model, ALL), nnx.LoRAParam, ...)
    assert {path[-1] for path, _ in nnx.to_flat_state(lora)} == {"lora_a", "lora_b"}
    assert not [path for path, _ in nnx.to_flat_state(rest) if path[-1] == "kernel"]


def test_optimizer_under_jit_trains_the_adapters_alone(case):
    model, x = case
    quantized = quantize_model(model, ALL)
    rest_before = jax.tree.leaves(nnx.split(quantized, nnx.LoRAParam, nnx.RngState, ...)[3])
    optimizer = nnx.Optimizer(quantized, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return value

    losses = [step(quantized, optimizer, x) for _ in range(8)]
    assert losses[-1] < losses[0]
    rest_after = jax.tree.leaves(nnx.split(quantized, nnx.LoRAParam, nnx.RngState, ...)[3])
    assert all(map(np.array_equal, rest_before, rest_after))


def test_nnx_grad_equals_plain_jax(case):
    model, x = case
    quantized = with_random_b(quantize_model(model, ALL))
    found = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(quantized, x)
    wanted = lora_gradients(quantized, x)
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(wanted))
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(wanted))


def test_remat_changes_no_gradient():
    quantized = with_random_b(quantize_model(MLP(nnx.Rngs(0)), ALL))
    rematerialized = nnx.remat(lambda model, x: model(x))
    found = nnx.grad(
        lambda model, x: jnp.mean(jnp.square(rematerialized(model, x))), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(quantized, batch())
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(lora_gradients(quantized, batch())))


def test_a_scanned_stack_equals_its_layers_one_by_one():
    model = StackedMLP(nnx.Rngs(0))
    quantized = with_random_b(quantize_model(model, ALL))
    graphdef, state = nnx.split(quantized.layers)
    x = batch()
    for index in range(3):
        x = x + nnx.merge(graphdef, jax.tree.map(lambda leaf, at=index: leaf[at], state))(x)
    np.testing.assert_allclose(quantized(batch()), x, rtol=1e-4, atol=1e-5)


def test_dropout_in_a_scanned_stack_draws_per_layer_and_per_call():
    rules = [QuantRule(".*", lora=LoraArgs(rank=4, dropout=0.5))]
    quantized = with_random_b(quantize_model(StackedMLP(nnx.Rngs(0)), rules))
    x = batch()
    call = nnx.jit(lambda model, x: model(x))
    assert not np.array_equal(call(quantized, x), call(quantized, x))
    keys = jax.random.key_data(quantized.layers.up.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == 3
    nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(quantized, x)
    quantized.eval()
    assert np.array_equal(call(quantized, x), call(quantized, x))


@pytest.mark.parametrize("name", ["transformer", "scanned"])
def test_eval_shape_gives_the_shapes_of_the_model(name):
    make, _ = MODELS[name]
    abstract = nnx.eval_shape(lambda: quantize_model(make(), ALL))
    concrete = quantize_model(make(), ALL)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), nnx.state(m)) for m in (abstract, concrete)]
    assert shapes[0] == shapes[1]
    assert nnx.graphdef(abstract) == nnx.graphdef(concrete)


def test_orbax_saves_and_restores(case, tmp_path):
    model, x = case
    quantized = with_random_b(quantize_model(model, ALL))
    graphdef, state = nnx.split(quantized)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", state)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "model", abstract)
    assert all(map(np.array_equal, arrays(restored), arrays(state)))
    assert np.array_equal(nnx.merge(graphdef, restored)(x), quantized(x))


@pytest.mark.parametrize("remat", [False, True])
def test_no_dequantized_weight_is_saved_for_backward(remat):
    depth = 6
    quantized = quantize_model(StackedMLP(nnx.Rngs(0), width=128, depth=depth, remat=remat), ALL)
    graphdef, lora, rest = nnx.split(quantized, nnx.LoRAParam, ...)
    x = batch(128, rows=4)
    _, vjp = jax.vjp(lambda lora: nnx.merge(graphdef, lora, rest, copy=True)(x), lora)
    saved = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    codes = rest["layers"]["up"]["weight"].get_value().codes
    packed = [leaf for leaf in saved if leaf.shape == codes.shape and leaf.dtype == jnp.uint8]
    assert {leaf.unsafe_buffer_pointer() for leaf in packed} == {codes.unsafe_buffer_pointer()}  # not even a copy
    dense = [leaf.shape for leaf in saved if leaf.dtype != jnp.uint8 and leaf.size >= 128 * 256]
    assert not dense


def test_the_first_rule_that_matches_applies():
    rules = [
        QuantRule("head", quant_type=None),
        QuantRule(r".*\.attention\.(query|value)", quant_type="fp4", block_size=32, double_quant=False, lora=LORA),
        QuantRule(r"layers\..*"),
    ]
    quantized = quantize_model(Transformer(nnx.Rngs(0)), rules)
    assert type(quantized.head) is nnx.Linear
    attention = quantized.layers[1].attention
    query, key = attention.query.weight.get_value(), attention.key.weight.get_value()
    assert (query.quant_type, query.block_size, query.double_quant) == ("fp4", 32, False)
    assert (key.quant_type, key.block_size, key.double_quant) == ("nf4", 64, True)
    assert attention.query.lora is not None and attention.key.lora is None


def test_initial_adapters_do_not_depend_on_other_rules():
    model = MLP(nnx.Rngs(0))
    both = quantize_model(model, ALL, rngs=nnx.Rngs(5))
    one = quantize_model(model, [QuantRule("down", lora=LORA)], rngs=nnx.Rngs(5))
    assert np.array_equal(both.down.lora.lora_a[...], one.down.lora.lora_a[...])
    assert not np.array_equal(quantize_model(model, ALL).down.lora.lora_a[...], one.down.lora.lora_a[...])


def test_a_shared_layer_stays_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(64, 64, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    quantized = quantize_model(Twice(nnx.Rngs(0)), ALL)
    assert quantized.first is quantized.second


class Tied(nnx.Module):
    """Two layers with one kernel and a bias each, and a scale that is the bias of the first."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs)])
        self.blocks[0].kernel = self.first.kernel
        self.scale = self.first.bias

    def __call__(self, x):
        return self.blocks[0](self.first(x)) * self.scale[...]


@pytest.mark.parametrize("pattern", [".*", "first", r"blocks\.0"])
def test_a_kernel_of_two_layers_is_not_untied(pattern):
    with pytest.raises(ValueError) as error:
        quantize_model(Tied(nnx.Rngs(0)), [QuantRule(pattern, lora=LORA)])
    kernels = {"first.kernel", "blocks.0.kernel"}
    (line,) = [line for line in str(error.value).splitlines() if kernels <= set(re.findall(r"[\w.]+\.kernel", line))]
    assert "Share the whole layer" in line
    assert ("first.bias: one parameter with scale" in str(error.value)) == (pattern != r"blocks\.0")


def test_a_tied_kernel_that_stays_dense_stays_tied():
    rules = [QuantRule("first|blocks.*", quant_type=None)]
    quantized = quantize_model(Tied(nnx.Rngs(0)), rules)
    assert quantized.first.kernel is quantized.blocks[0].kernel


def test_a_model_that_is_one_layer():
    assert isinstance(quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), [QuantRule("")]), NF4Linear)


def test_all_problems_are_reported_at_once():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(64, 64, rngs=rngs)
            self.lora = nnx.LoRALinear(64, 64, lora_rank=2, rngs=rngs)
            self.general = nnx.LinearGeneral(64, 8, batch_axis={0: 3}, rngs=rngs)

    rules = [
        QuantRule("dense", quant_type="nf5", lora=LoraArgs(method="dora")),
        QuantRule("lora|general"),
        QuantRule("absent"),
        QuantRule("dens."),
        QuantRule("[", quant_type=None, lora=LORA),
    ]
    with pytest.raises(ValueError) as error:
        quantize_model(Model(nnx.Rngs(0)), rules)
    for words in (
        "rules[0] 'dense': cannot quantize: quant_type='nf5'",
        "rules[0] 'dense': lora.method",
        "rules[2] 'absent': matches no nnx.Linear",
        "rules[3] 'dens.': earlier rules match all of its layers (dense)",
        "rules[4] '[': not a regular expression",
        "rules[4] '[': lora",
        "lora: a subclass of nnx.Linear",
        "general.batch_axis",
    ):
        assert words in str(error.value), words


def test_no_rules_is_an_error():
    with pytest.raises(ValueError, match="rules: found none, expected at least one"):
        quantize_model(MLP(nnx.Rngs(0)), [])


@pytest.mark.parametrize("rules", [QuantRule(".*"), ".*", {".*": "nf4"}, [".*"]])
def test_rules_in_another_form_are_an_error(rules):
    with pytest.raises(TypeError, match=r"^rules: found .*, expected a list such as \[QuantRule"):
        _check_types(rules)


def test_an_adapter_that_is_a_number_is_an_error():
    rule = QuantRule("up")
    object.__setattr__(rule, "lora", 8)
    with pytest.raises(TypeError, match=r"QuantRule\('up'\): lora: found 8, expected qlora_jax\.LoRA"):
        _check_types([rule])


def test_a_weight_that_is_not_finite_is_reported_with_its_path():
    model = MLP(nnx.Rngs(0))
    model.down.kernel[...] = model.down.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"^down: .*not finite"):
        quantize_model(model, ALL)
