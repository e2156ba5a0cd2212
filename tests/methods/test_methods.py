"""The contract of finetuning methods, of ours and of one of another package, on a tiny model."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from householder import DECLARATION

from qlora_jax.config import Config, ConfigError, DataArgs, LoraArgs, ModelArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.config.validate import validate
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.attach import attach_method, check_targets
from qlora_jax.methods.method import Method, form_of, linears, method_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition, prepare_for_decoding, trained_leaves
from qlora_jax.nn.linear import FrozenLayer
from tests.io.tiny_models import tiny_config

NAMES = (*METHODS.names(), "hra")
SETTINGS = {"oft": {"oft_block_size": 8}, "vera": {"rank": 8}, "hra": {"options": {"reflections": 4}}}
# Their start rounds: a quotient of norms, and two reflections.
CLOSE = ("dora", "hra")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)))


@pytest.fixture(autouse=True)
def _extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(METHODS, "_values", {**dict(METHODS.items()), "hra": DECLARATION})


def tiny() -> tuple[ModelConfig, CausalLM]:
    config = model_config(tiny_config(attention_bias=True, mlp_bias=True, num_hidden_layers=3))
    model = nnx.eval_shape(lambda: CausalLM(config, WeightFormat(quant_type=None, dtype="float32")))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), nnx.state(model))
    nnx.update(model, drawn)
    return config, model


def adapted(name: str) -> CausalLM:
    _, model = tiny()
    attach_method(model, LoraArgs(method=name, **SETTINGS.get(name, {})), jax.random.key(0))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_start_changes_no_bit_and_every_trained_array_is_declared(name: str):
    config, plain = tiny()
    model = adapted(name)
    assert isinstance(method_of(name), Method)
    check_targets(config, LoraArgs(method=name, **SETTINGS.get(name, {})))
    before, after = (each.head.logits(each.hidden(TOKENS)) for each in (plain, model))
    if name in CLOSE:
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(after, before)
    leaves = {leaf for leaves in partition(model).lora.values() for leaf in leaves}
    assert leaves and leaves <= {leaf.name for leaf in trained_leaves(model)}


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_decoding_keeps_vectors_and_what_is_prepared_twice(name: str):
    parts = partition(adapted(name))
    once = prepare_for_decoding(parts)
    twice = prepare_for_decoding(once)
    assert jax.tree.structure(once.lora) == jax.tree.structure(twice.lora)
    jax.tree.map(np.testing.assert_array_equal, once.lora, twice.lora)
    assert parts.lora.keys() == once.lora.keys()


@pytest.mark.parametrize("name", NAMES)
def test_declared_exports_are_those_with_a_form(name: str):
    declared, form = METHODS[name], method_of(name).peft
    assert (form is None) == ("peft" in declared.refused_exports) == (declared.peft_type == "")
    assert form is None or form_of(declared.peft_type) is form


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.peft_type] + ["hra"])
def test_adapters_return_from_files_with_the_settings_that_add_them(tmp_path: Path, name: str):
    (config, _), form, model = tiny(), method_of(name).peft, adapted(name)
    assert form is not None
    args = LoraArgs(method=METHODS[name].stored_as or name, **SETTINGS.get(name, {}))
    noise = np.random.default_rng(0)
    lora = {
        module: {leaf: np.asarray(noise.normal(size=values.shape), "f4") for leaf, values in leaves.items()}
        for module, leaves in partition(model).lora.items()
    }
    named = {config.hugging_face_name(module): leaves for module, leaves in lora.items()}
    settings, tensors = in_peft_format(named, args, config, "base")
    write_adapter(tmp_path, tensors, settings)
    read = read_adapter(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, read.lora, lora)
    again = CausalLM(config, WeightFormat(quant_type=None, dtype="float32"))
    attach_method(again, read.args, jax.random.key(1))
    shapes = jax.tree.map(np.shape, partition(again).lora)
    assert shapes == jax.tree.map(np.shape, lora)
    assert form.differences(args, read.args, config) == []


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("nowhere:METHOD", "ModuleNotFoundError: No module named 'nowhere'"),
        ("householder:NOTHING", "has no attribute 'NOTHING'"),
        ("householder:DECLARATION", "which is not a method .found MethodDeclaration, expected an instance of"),
    ],
)
def test_an_implementation_that_cannot_be_loaded_is_one_error(monkeypatch, place: str, problem: str):
    broken = dataclasses.replace(DECLARATION, implementation=place)
    monkeypatch.setattr(METHODS, "_values", {**dict(METHODS.items()), "broken": broken})
    with pytest.raises(ValueError, match=rf"lora\.method: 'broken' is declared as {place}, .*{problem}"):
        method_of("broken")
    assert isinstance(method_of("lora"), Method)


def test_options_are_checked_with_all_other_settings():
    def problems(**lora) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", lora=LoraArgs(**lora)))
        return str(caught.value)

    found = problems(method="hra", options={"reflexions": 1, "reflections": 0}, rank=3)
    assert "lora.options.reflexions: unknown setting; did you mean reflections" in found
    assert "lora.options.reflections: found 0, expected an even number" in found and "lora.rank: found 3" in found
    assert "lora.options: found {'r': 1}, but lora.method=lora has no options" in problems(options={"r": 1})
