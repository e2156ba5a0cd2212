"""Tests targets, ranks and scalings of adapters, and errors for patterns that cannot be honoured."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.methods.bitfit import bias_targets
from qlora_jax.methods.method import linears
from qlora_jax.methods.norms import norm_targets
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.nn.linear import FrozenLayer
from tests.io.gguf_families import FAMILIES
from tests.io.tiny_models import tiny_config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def adapted(**settings):
    """Returns {last part of a projection's name: its adapter} of a tiny model."""
    config = model_config(tiny_config(num_hidden_layers=3))
    model = nnx.eval_shape(lambda: CausalLM(config, WeightFormat()))
    attach_method(model, LoraArgs(**settings), jax.random.key(0))
    return {name.rsplit(".")[-1]: linear.adapter for name, linear in linears(model) if linear.adapter}


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", ATTENTION + MLP),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
        (r"model\.layers\.\d+\.mlp\..*", MLP),
        (r".*\.(q|k)_proj", ["q_proj", "k_proj"]),
    ],
)
def test_targets(target_modules, expected):
    assert list(adapted(target_modules=target_modules)) == expected


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (dict(target_modules=["w_pack"]), "'w_pack' matches none of the linear layers: model.layers.self_attn.q_proj"),
        (dict(target_modules=["q_proj", "proj"]), "'proj' matches none"),
        (dict(target_modules=r".*lm_head"), "matches none"),
        (dict(target_modules="q_proj,v_proj"), "are a list, [q_proj, v_proj]): 'q_proj,v_proj' matches none"),
        (dict(method="dora", target_modules=r"model\.layers\.[01]\..*up_proj"), "up_proj (2 of 3 layers): layers are"),
        (dict(layers_to_transform=[0, 3]), "found layer 3, expected 0 to 2"),
        (dict(layers_to_transform=2, target_modules=["layers.1.mlp.up_proj"]), "none of these layers is among"),
        (dict(layers_to_transform="1-2", rank_pattern={r"layers\.1\..*q_proj": 4}), "q_proj (1 of 2 layers)"),
        (dict(target_modules=["q_proj"], rank_pattern={"up_proj": 4}), "rank_pattern: 'up_proj' matches none"),
        (dict(alpha_pattern={r"layers\.0\.mlp\.up_proj": 4.0}), "alpha_pattern"),
        (dict(rank_pattern={"(": 4}), "rank_pattern: '(': not a regular expression: missing )"),
        (dict(target_modules=r".*(?<!q)_proj"), "'.*(?<!q)_proj': not supported in a pattern"),
        (dict(target_modules=r"(([a-z_.0-9]+)+)+!"), "matches none of the linear layers"),  # years with Python's engine
    ],
)
def test_patterns_that_cannot_be_honoured_are_refused(settings, part):
    with pytest.raises(ValueError) as caught:
        adapted(**settings)
    assert part in str(caught.value)


def test_ranks_and_scalings():
    adapters = adapted(rank=8, alpha=16.0, rank_pattern={"up_proj": 2}, alpha_pattern={"mlp.down_proj": 3.0})
    assert adapters["q_proj"].lora_a[...].shape == (3, 64, 8) and adapters["q_proj"].scaling == 2.0
    assert adapters["up_proj"].lora_b[...].shape == (3, 2, 128) and adapters["up_proj"].scaling == 8.0
    assert adapters["down_proj"].scaling == 3.0 / 8
    assert adapted(rank=9, alpha=6.0, use_rslora=True)["q_proj"].scaling == pytest.approx(6.0 / math.sqrt(9))


def test_initial_values_are_pefts_and_belong_to_the_name():
    some, every = adapted(target_modules=["v_proj"])["v_proj"], adapted()["v_proj"]
    np.testing.assert_array_equal(some.lora_a[...], every.lora_a[...])
    assert not np.any(every.lora_b[...])
    bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt(5): sqrt(6 / (1 + 5) / K)
    values = np.asarray(every.lora_a[...])
    assert np.abs(values).max() <= bound and np.abs(values).max() > 0.98 * bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not np.array_equal(values[0], values[1])


def test_partition_and_combine_are_inverse():
    config = model_config(tiny_config())
    model = CausalLM(config, WeightFormat(dtype="float32"))
    attach_method(model, LoraArgs(rank=2), jax.random.key(0))
    parts = partition(model)
    assert parts.lora["model.layers.mlp.up_proj"].keys() == {"lora_a", "lora_b"}
    again = partition(combine(parts))
    assert again.graphdef == parts.graphdef
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_merge_does_what_the_adapter_does():
    adapter = adapted(rank=4)["q_proj"]
    rng = np.random.default_rng(0)
    adapter.lora_b[...] = jax.numpy.asarray(rng.standard_normal((3, 4, 64), np.float32))
    weight, x = rng.standard_normal((64, 64), np.float32), rng.standard_normal((5, 64), np.float32)
    one = type(adapter)(adapter.lora_a[...][1], adapter.lora_b[...][1], adapter.scaling, 0.0)
    (y,) = one.apply([one], jax.numpy.asarray(x), [FrozenLayer(jax.numpy.asarray(weight[None]), None, 0)], [None])
    np.testing.assert_allclose(y, x @ one.merge(jax.numpy.asarray(weight)).T, rtol=1e-4, atol=1e-4)


def test_ia3_is_on_keys_values_and_the_inputs_of_the_last_projection():
    adapters = adapted(method="ia3")
    assert {name: (a.on_input, a.vector[...].shape) for name, a in adapters.items()} == {
        "k_proj": (False, (3, 32)),
        "v_proj": (False, (3, 32)),
        "down_proj": (True, (3, 128)),
    }
    chosen = adapted(method="ia3", target_modules=["q_proj", "down_proj"], feedforward_modules=["q_proj"])
    assert {name: a.on_input for name, a in chosen.items()} == {"q_proj": True, "down_proj": False}
    assert all(np.all(np.asarray(a.vector[...]) == 1) for a in chosen.values())
    with pytest.raises(ValueError, match="feedforward_modules: 'up_proj' matches none of the linear layers"):
        adapted(method="ia3", feedforward_modules=["up_proj"])


def test_norms_of_the_residual_stream_train_and_others_by_name():
    qwen3 = model_config(FAMILIES["qwen3"][1])
    residual = ["model.layers.input_layernorm", "model.layers.post_attention_layernorm", "model.norm"]
    assert norm_targets(qwen3, LoraArgs(method="ln_tuning")) == residual
    named = norm_targets(qwen3, LoraArgs(method="ln_tuning", target_modules=["norm", "q_norm"]))
    assert named == ["model.layers.self_attn.q_norm", "model.norm"]
    with pytest.raises(ValueError, match=r"'q_proj' matches none of the norms: model.layers.input_layernorm, "):
        norm_targets(qwen3, LoraArgs(method="ln_tuning", target_modules=["q_proj"]))


def test_biases_that_there_are_train():
    qwen2, neox = (model_config(FAMILIES[name][1]) for name in ("qwen2", "gptneox"))
    attention = [f"model.layers.self_attn.{name}_proj" for name in "qkv"]
    assert bias_targets(qwen2, LoraArgs(method="bitfit")) == attention
    assert bias_targets(qwen2, LoraArgs(method="bitfit", target_modules=["q_proj"])) == attention[:1]
    targets = bias_targets(neox, LoraArgs(method="bitfit"))
    assert len(targets) == 4 + 3 and "gpt_neox.final_layer_norm" in targets
    with pytest.raises(ValueError, match="'o_proj' matches none of the modules with a bias"):
        bias_targets(qwen2, LoraArgs(method="bitfit", target_modules=["o_proj"]))


@pytest.mark.parametrize(("method", "modules"), [("houlsby", ["mlp", "self_attn"]), ("pfeiffer", ["mlp"])])
def test_bottlenecks_follow_attention_and_mlp(method, modules):
    model = nnx.eval_shape(lambda: CausalLM(model_config(tiny_config()), WeightFormat()))
    attach_method(model, LoraArgs(method=method, rank=3), jax.random.key(0))
    lora = partition(model).lora
    assert sorted(lora) == [f"model.layers.{module}" for module in modules]
    shapes = {leaf: values.shape for leaf, values in lora["model.layers.mlp"].items()}
    assert shapes == {"down": (2, 64, 3), "down_bias": (2, 3), "up": (2, 3, 64), "up_bias": (2, 64)}


def test_oft_has_a_rotation_for_each_block_of_inputs():
    shapes = {name: a.oft_r[...].shape for name, a in adapted(method="oft", oft_block_size=16).items()}
    assert shapes == {name: (3, 8 if name == "down_proj" else 4, 120) for name in ATTENTION + MLP}
    shared = adapted(method="oft", oft_blocks=2, block_share=True, target_modules=["q_proj", "down_proj"])
    assert {name: a.oft_r[...].shape for name, a in shared.items()} == {
        "q_proj": (3, 1, 32 * 31 // 2),
        "down_proj": (3, 1, 64 * 63 // 2),
    }
    assert not any(np.any(np.asarray(a.oft_r[...])) for a in shared.values())
    with pytest.raises(
        ValueError, match=r"lora.oft_block_size: found 48, but model.layers.self_attn.q_proj has 64 inp"
    ):
        adapted(method="oft", oft_block_size=48)
    with pytest.raises(
        ValueError,
        match=r"lora.oft_blocks: found 128, which makes blocks of 1 input in .*Set a smaller number of blocks",
    ):
        adapted(method="oft", oft_blocks=128)
    with pytest.raises(
        ValueError, match=r"lora.oft_blocks: found 64, which makes blocks of 1 input in model.layers.self_attn.q_proj, "
    ):
        adapted(method="oft", oft_blocks=64)  # blocks of one input do not rotate


def test_vera_shares_frozen_matrices_of_the_largest_sizes():
    adapters = adapted(method="vera", rank=5, d_initial=0.2)
    assert {name: (a.lambda_d[...].shape, a.lambda_b[...].shape) for name, a in adapters.items()} == {
        name: ((3, 5), (3, {"k_proj": 32, "v_proj": 32, "gate_proj": 128, "up_proj": 128}.get(name, 64)))
        for name in ATTENTION + MLP
    }
    assert {a.a[...].shape for a in adapters.values()} == {(128, 5)}
    some = adapted(method="vera", rank=5, target_modules=["q_proj", "k_proj"])
    assert some["k_proj"].a is some["q_proj"].a and some["k_proj"].b[...].shape == (64, 5)


def test_veras_matrices_are_one_frozen_pair_of_the_model():
    model = CausalLM(model_config(tiny_config()), WeightFormat(dtype="float32"))
    attach_method(model, LoraArgs(method="vera", rank=5), jax.random.key(0))
    parts = partition(model)
    assert all(leaves.keys() == {"lambda_d", "lambda_b"} for leaves in parts.lora.values())
    assert [leaf.shape for leaf in jax.tree.leaves(parts.base)].count((128, 5)) == 2  # A and B, once each
    again = combine(parts)
    assert again.model.layers.mlp.up_proj.adapter.a is again.model.layers.self_attn.q_proj.adapter.a
