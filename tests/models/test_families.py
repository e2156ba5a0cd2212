"""Tests the features of Hugging Face configs, and that all unsupported attributes are reported at once."""

import pytest

from qlora_jax.models.families import model_config
from qlora_jax.nn.rope import SCALING_NUMBERS, SCALINGS

SMOLLM2 = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000,
    tie_word_embeddings=True,
    hidden_act="silu",
)


def test_smollm2_has_the_published_number_of_parameters():
    config = model_config(SMOLLM2)
    linear = config.num_layers * sum(n * k for (n, k), _ in config.linear_shapes().values())
    norms = (2 * config.num_layers + 1) * config.embed_dim
    assert linear == 106_168_320
    assert linear + norms + config.vocab_size * config.embed_dim == 134_515_008


def test_older_and_newer_names_of_rope_mean_the_same():
    numbers = dict(factor=8.0, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    older = model_config(SMOLLM2 | dict(rope_scaling=dict(numbers, type="llama3")))
    newer = {k: v for k, v in SMOLLM2.items() if k != "rope_theta"}
    newer = model_config(newer | dict(rope_parameters=dict(numbers, rope_type="llama3", rope_theta=100000.0)))
    assert older == newer
    assert older.rope.scaling.get("low_freq_factor") == 1.0


def test_every_problem_is_told_at_once():
    bad = dict(hidden_act="gelu", num_attention_heads=8, hidden_size="wide", sliding_window=128, clip_qkv=8.0)
    with pytest.raises(ValueError) as caught:
        model_config(SMOLLM2 | bad)
    text = str(caught.value)
    for part in ("hidden_act='gelu'", "hidden_size: found 'wide'", "sliding_window=128", "clip_qkv=8.0", "multiple of"):
        assert part in text


@pytest.mark.parametrize(
    ("scaling", "part"),
    [
        (dict(type="spiral", factor=2.0), "'spiral' is not supported"),
        (dict(type="linear"), "lacks ['factor']"),
        (dict(type="linear", factor=2.0, beta_fast=3), "has unknown ['beta_fast']"),
    ],
)
def test_rope_scalings_that_are_not_understood_are_refused(scaling, part):
    with pytest.raises(ValueError) as caught:
        model_config(SMOLLM2 | dict(rope_scaling=scaling))
    assert part in str(caught.value)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="model_type='mamba' is not supported: known are \\['gemma', 'gemma2', "):
        model_config(dict(SMOLLM2, model_type="mamba"))


def test_each_scaling_says_what_it_needs():
    assert SCALING_NUMBERS.keys() == SCALINGS.keys()


def test_an_unknown_mixture_of_experts_is_refused_as_such():
    for experts in (dict(num_local_experts=8), dict(num_experts=64), dict(n_routed_experts=160)):
        with pytest.raises(ValueError, match=r"'jamba' is not supported \(a mixture of experts, .*experts=\d+\)"):
            model_config(dict(SMOLLM2, model_type="jamba", **experts))


def test_an_unknown_model_of_images_and_text_is_refused_as_such():
    with pytest.raises(ValueError, match="'qwen2_vl' is not supported: of models of images and text, known are"):
        model_config(dict(model_type="qwen2_vl", text_config=dict(SMOLLM2)))


GEMMA3 = dict(
    model_type="gemma3_text",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=32,
)


def test_older_and_newer_configs_of_gemma3_mean_the_same():
    older = dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0))
    ropes = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6))
    newer = dict(rope_parameters=ropes | dict(sliding_attention=dict(rope_type="default", rope_theta=1e4)))
    model = model_config(GEMMA3 | older | dict(sliding_window_pattern=6))
    assert model == model_config(GEMMA3 | newer)
    assert model.windows == (32,) * 5 + (None, 32)
    assert [rope.theta for rope in model.ropes] == [1e4] * 5 + [1e6, 1e4]
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50\.0 is not supported"):
        model_config(GEMMA3 | dict(attn_logit_softcapping=50.0))


NEOX = dict(
    model_type="gpt_neox",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def test_older_and_newer_configs_of_gpt_neox_mean_the_same():
    older = model_config(NEOX | dict(rotary_pct=0.5, rotary_emb_base=5000))
    newer = dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5)
    assert older == model_config(NEOX | dict(rope_parameters=newer))
    assert older.rope.dim == 8 and older.layout == "parallel"
    assert older.hugging_face_name("model.layers.1.mlp.up_proj.bias") == "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"


def test_what_a_family_does_not_have_is_refused_by_name():
    with pytest.raises(ValueError) as caught:
        model_config(NEOX | dict(hidden_act="quick_gelu", rotary_pct=0.3, logit_scale=2.0))
    for part in ("hidden_act='quick_gelu'", "logit_scale=2.0"):
        assert part in str(caught.value)


def test_features_at_their_defaults_leave_a_fingerprint_as_it_was():
    described = model_config(SMOLLM2).fingerprint_features()
    assert described.keys() == {
        *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm_eps"),
        *("rope", "tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "max_positions"),
    }
    assert model_config(NEOX).fingerprint_features().keys() > described.keys()
