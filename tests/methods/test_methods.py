"""The contract of finetuning methods, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.methods.attach import add_lora, check_targets
from qlora_jax.methods.method import Method, linears, method_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition, prepare_for_decoding, trained_leaves
from qlora_jax.nn.linear import FrozenLayer
from tests.io.tiny_models import tiny_config

SETTINGS = {"oft": {"oft_block_size": 8}, "vera": {"rank": 8}}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)))


def tiny() -> tuple[ModelConfig, CausalLM]:
    config = model_config(tiny_config(attention_bias=True, mlp_bias=True, num_hidden_layers=3))
    model = nnx.eval_shape(lambda: CausalLM(config, WeightFormat(quant_type=None, dtype="float32")))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), nnx.state(model))
    nnx.update(model, drawn)
    return config, model


def adapted(name: str) -> CausalLM:
    _, model = tiny()
    add_lora(model, LoraArgs(method=name, **SETTINGS.get(name, {})), jax.random.key(0))
    return model


@pytest.mark.parametrize("name", METHODS.names())
def test_the_start_changes_no_bit_and_every_trained_array_is_declared(name: str):
    config, plain = tiny()
    model = adapted(name)
    assert isinstance(method_of(name), Method)
    check_targets(config, LoraArgs(method=name, **SETTINGS.get(name, {})))
    before, after = (each.head.logits(each.hidden(TOKENS)) for each in (plain, model))
    if name == "dora":  # its quotient of norms rounds
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(after, before)
    leaves = {leaf for leaves in partition(model).lora.values() for leaf in leaves}
    assert leaves and leaves <= {leaf.name for leaf in trained_leaves(model)}


@pytest.mark.parametrize("name", METHODS.names())
def test_merged_layers_compute_what_their_adapters_do(name: str):
    model = adapted(name)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        noise = np.random.default_rng(len(str(path))).normal(0, 0.05, variable.get_value().shape)
        variable.set_value(variable.get_value() + jnp.asarray(noise, variable.get_value().dtype))
        nnx.update(model, nnx.from_flat_state([(path, variable)]))
    for full_name, linear in linears(model):
        if linear.adapter is None:
            continue
        one, (n, k) = linear.adapter.select_layer(1), linear.shape
        # Methods that train the weight or the bias have freed the frozen one.
        weight = linear.weight[...][1] if len(linear.weight[...]) else jnp.zeros((n, k))
        bias = linear.bias[...][1] if linear.bias is not None and len(linear.bias[...]) else None
        frozen, x_MK = FrozenLayer(weight, bias, None), jnp.asarray(np.random.default_rng(1).normal(size=(5, k)), "f4")
        (found,) = one.apply([one], x_MK, [frozen], [None])
        (of_three, *_) = one.apply([one] * 3, x_MK, [frozen] * 3, [None] * 3)
        np.testing.assert_allclose(of_three, found, rtol=1e-5, atol=1e-5)
        merged = x_MK @ one.merge(weight).T + one.merge_bias(jnp.zeros(n) if bias is None else bias)[None]
        np.testing.assert_allclose(found, merged, rtol=2e-4, atol=2e-4, err_msg=full_name)


@pytest.mark.parametrize("name", METHODS.names())
def test_decoding_keeps_vectors_and_what_is_prepared_twice(name: str):
    parts = partition(adapted(name))
    once = prepare_for_decoding(parts)
    twice = prepare_for_decoding(once)
    assert jax.tree.structure(once.lora) == jax.tree.structure(twice.lora)
    jax.tree.map(np.testing.assert_array_equal, once.lora, twice.lora)
    assert parts.lora.keys() == once.lora.keys()
