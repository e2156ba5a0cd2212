"""Tests the features of Hugging Face configs, and that all unsupported attributes are reported at once."""

import time

import pytest

from qlora_jax.models.config import MAX_EXPERTS
from qlora_jax.models.families import model_config
from qlora_jax.models.families.attributes import COUNTS, expert_count
from qlora_jax.models.families.multimodal import text_only
from qlora_jax.nn.rope import SCALING_NUMBERS, SCALINGS, QueryPositionScale
from tests.io.gguf_families import MIXTURES

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
    with pytest.raises(ValueError, match="model_type='mamba' is not supported: known are \\['cohere2', 'exaone4', "):
        model_config(dict(SMOLLM2, model_type="mamba"))


def test_each_scaling_says_what_it_needs():
    assert SCALING_NUMBERS.keys() == SCALINGS.keys()


def test_an_unknown_mixture_of_experts_is_refused_as_such():
    for experts in (dict(num_local_experts=8), dict(num_experts=64), dict(n_routed_experts=160)):
        with pytest.raises(ValueError, match=r"'jamba' is not supported \(a mixture of experts, .*experts=\d+\)"):
            model_config(dict(SMOLLM2, model_type="jamba", **experts))


def test_an_unknown_model_of_images_and_text_is_refused_as_such():
    with pytest.raises(ValueError, match="'idefics3' is not supported: of models of images and text, known are"):
        model_config(dict(model_type="idefics3", text_config=dict(SMOLLM2)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(model_type="gemma3n", text_config={}),
            r"'gemma3n' is not supported, because layers have their own token embeddings",
        ),
        (
            dict(model_type="gemma4_text"),
            "'gemma4_text' is not supported, because layers have their own token embeddings",
        ),
        (dict(model_type="mistral3", text_config=dict(model_type="mistral4")), "text_config: .*latent attention"),
        (dict(model_type="llava", text_config=dict(model_type={"": "llama"})), "text_config.model_type: not text"),
        (dict(model_type="mistral_large4", text_config={}), "is not supported, because .*latent attention"),
        (
            dict(model_type="qwen3_5_moe", num_experts=4),
            r"\(a mixture of experts, num_experts=4\), because most layers",
        ),
    ],
)
def test_a_model_that_the_decoder_cannot_compute_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        model_config(config)


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


TINY = NEOX | dict(num_hidden_layers=4, num_key_value_heads=2)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
PERIODIC = (9, 9, 9, None)


def test_only_the_layers_of_olmo3_without_a_window_scale_their_rotation():
    older = TINY | dict(model_type="olmo3", sliding_window=9, rope_theta=5e5, rope_scaling=YARN)
    ropes = dict(full_attention=YARN | dict(rope_theta=5e5), sliding_attention=dict(rope_type="default"))
    model = model_config(older)
    assert model == model_config(TINY | dict(model_type="olmo3", sliding_window=9, rope_parameters=ropes))
    assert model.windows == PERIODIC
    assert [rope.scaling.kind for rope in model.ropes] == ["default"] * 3 + ["yarn"]
    assert model_config(older | dict(rope_scaling=None)).ropes == ()
    with pytest.raises(ValueError, match=r"rope_theta=10000.0: it would depend on transformers' release"):
        model_config(older | dict(rope_theta=10000.0))


def test_layers_without_a_window_do_not_rotate_in_exaone4_and_cohere2():
    for model_type in ("exaone4", "cohere2"):
        model = model_config(TINY | dict(model_type=model_type, sliding_window=9))
        assert model.windows == PERIODIC and model.ropes == (*[model.rope] * 3, None)
    small = TINY | dict(model_type="exaone4", sliding_window=None, sliding_window_pattern="LLLG")
    assert model_config(small).windows == model_config(small).ropes == ()
    with pytest.raises(ValueError, match="sliding_window_pattern: found 'LLLG', expected a whole number"):
        model_config(small | dict(sliding_window=9))
    with pytest.raises(ValueError, match="head_dim=32 is not supported"):
        model_config(TINY | dict(model_type="cohere2", head_dim=32))


def test_both_names_of_cohere2s_period_mean_the_same():
    """transformers 4.53 to 4.57 save it with an underscore, next to layer_types."""
    given = TINY | dict(model_type="cohere2", sliding_window=9)
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        assert model_config(given | {name: 2}).windows == (9, None, 9, None)
        types = dict(layer_types=["sliding_attention"] * 3 + ["full_attention"])
        assert model_config(given | types | {name: 4}).windows == PERIODIC


def test_attributes_of_qwen3_coder_have_one_value_alone():
    _, config = MIXTURES["qwen3moe"]
    coder = dict(use_qk_norm=True, qkv_bias=False, shared_expert_intermediate_size=0)
    assert model_config(config | coder) == model_config(config)
    with pytest.raises(ValueError) as caught:
        model_config(config | dict(use_qk_norm=False, qkv_bias=True, shared_expert_intermediate_size=64))
    for part in ("use_qk_norm=False", "qkv_bias=True", "shared_expert_intermediate_size=64"):
        assert f"{part} is not supported (only" in str(caught.value)


def test_names_of_glm4_norms_do_not_collide():
    model = model_config(TINY | dict(model_type="glm4"))
    ours = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    theirs = [model.hugging_face_name(f"model.layers.{name}").removeprefix("model.layers.") for name in ours]
    expected = ["input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"]
    assert theirs == expected and model.rope.dim == 64


def test_scales_of_granite_at_one_are_no_feature():
    scales = dict(embedding_multiplier=1.0, residual_multiplier=1, logits_scaling=4.0, attention_multiplier=0.5)
    model = model_config(TINY | dict(model_type="granite") | scales)
    assert (model.embed_scale, model.residual_scale, model.logit_scale, model.query_scale) == (None, None, 0.25, 0.5)


def test_growth_of_ministral3_queries_is_read_from_the_rope():
    rope = YARN | dict(rope_theta=1e6, llama_4_scaling_beta=0.1, max_position_embeddings=512)
    given = TINY | dict(model_type="ministral3")
    model = model_config(given | dict(rope_parameters=rope))
    assert model.query_position_scale == QueryPositionScale(beta=0.1, period=64)
    assert model_config(given).query_position_scale == QueryPositionScale(beta=0.1, period=16384)  # transformers'
    with pytest.raises(ValueError, match="llama_4_scaling_beta or original_max_position_embeddings is missing"):
        model_config(given | dict(rope_parameters=dict(YARN, rope_theta=1e6)))


def test_features_at_their_defaults_leave_a_fingerprint_as_it_was():
    described = model_config(SMOLLM2).fingerprint_features()
    assert described.keys() == {
        *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm_eps"),
        *("rope", "tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "max_positions"),
    }
    assert model_config(NEOX).fingerprint_features().keys() > described.keys()


GPT_OSS_20B = dict(
    model_type="gpt_oss",
    attention_bias=True,
    attention_dropout=0.0,
    experts_per_token=4,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2880,
    initial_context_length=4096,
    intermediate_size=2880,
    layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072,
    num_attention_heads=64,
    num_experts_per_tok=4,
    num_hidden_layers=24,
    num_key_value_heads=8,
    num_local_experts=32,
    output_router_logits=False,
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"]),
    rms_norm_eps=1e-5,
    rope_scaling=dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096)
    | dict(beta_fast=32.0, beta_slow=1.0, truncate=False),
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    vocab_size=201088,
)


def test_gpt_oss_has_the_published_numbers_of_parameters():
    config = model_config(GPT_OSS_20B)
    assert (config.parameters(), config.active_parameters()) == (20_914_757_184, 4_187_440_704)
    larger = dict(
        num_hidden_layers=36, num_local_experts=128, layer_types=GPT_OSS_20B["layer_types"] + ["full_attention"] * 12
    )
    assert model_config(GPT_OSS_20B | larger).parameters() == 116_829_156_672


def test_gpt_oss_without_a_rope_has_transformers_default():
    omitted = ("rope_scaling", "rope_theta", "layer_types", "num_local_experts", "num_hidden_layers")
    short = {key: value for key, value in GPT_OSS_20B.items() if key not in omitted}
    assert model_config(short | {"num_hidden_layers": 24, "num_local_experts": 32}) == model_config(GPT_OSS_20B)


def test_mixtures_whose_config_transformers_5_saved():
    """It names the number of Qwen3's experts otherwise, and gives Qwen2 without windows one of 0."""
    for name in ("qwen2moe", "qwen3moe"):
        _, config = MIXTURES[name]
        saved = {**config, "sliding_window": 0 if name == "qwen2moe" else None, "use_sliding_window": False}
        if name == "qwen3moe":
            saved["num_local_experts"] = saved.pop("num_experts")
        assert model_config(saved) == model_config(config)
        assert model_config(saved).experts.count == 4


def _mixture(name: str, **changes: object) -> dict[str, object]:
    return MIXTURES[name][1] | changes


def test_a_mixture_inside_a_multimodal_model_is_that_mixture():
    for name in ("gptoss", "qwen3moe", "glm4moe"):
        wrapped = dict(model_type="internvl", text_config=_mixture(name), tie_word_embeddings=False)
        assert text_only(model_config(wrapped)) == model_config(_mixture(name))


SECTIONS = dict(type="mrope", mrope_section=[2, 3, 3])
QWEN_VL = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
QWEN_VL |= dict(num_key_value_heads=2, max_position_embeddings=128, rope_scaling=SECTIONS, rope_theta=5000.0)


def test_sections_of_a_rotation_are_plain_for_text():
    """A flat config, as Qwen2.5-VL's is published, is that of Qwen2 with the same numbers."""
    plain = model_config(QWEN_VL | dict(model_type="qwen2", rope_scaling=None, rms_norm_eps=1e-5))
    images = dict(vision_config=dict(depth=1), image_token_id=5, vision_start_token_id=6, vision_token_id=7)
    assert text_only(model_config(QWEN_VL | images | dict(model_type="qwen2_5_vl"))) == plain
    scaled = dict(rope_scaling=SECTIONS | dict(type="yarn", factor=4.0, original_max_position_embeddings=32))
    yarn = text_only(model_config(QWEN_VL | images | scaled | dict(model_type="qwen2_vl")))
    assert yarn.rope.scaling.kind == "yarn"
    with pytest.raises(ValueError, match="odd_attribute=3 is not known to this model family"):
        model_config(QWEN_VL | images | dict(model_type="qwen2_5_vl", odd_attribute=3))


def test_text_halves_with_sections_need_their_wrapper():
    with pytest.raises(ValueError, match="model_type='qwen3_vl_text' is not supported"):
        model_config(QWEN_VL | dict(model_type="qwen3_vl_text"))


def test_sizes_of_mixtures_have_limits():
    assert model_config(_mixture("olmoe", num_experts=MAX_EXPERTS)).experts.count == MAX_EXPERTS
    with pytest.raises(ValueError, match="num_experts: found 4097, expected at most 4096"):
        model_config(_mixture("olmoe", num_experts=MAX_EXPERTS + 1))
    with pytest.raises(ValueError, match="n_shared_experts: found 257, expected at most 256"):
        model_config(_mixture("glm4moe", n_shared_experts=257))


def test_a_long_list_of_dense_layers_is_read_quickly():
    config = _mixture("qwen2moe", num_hidden_layers=4096, mlp_only_layers=[5000] * 300_000 + [1])
    start = time.process_time()
    assert model_config(config).experts.layers[:2] == (0, 2)
    assert time.process_time() - start < 10  # a scan of the list per layer takes 20 s


def test_a_problem_is_reported_once():
    with pytest.raises(ValueError) as caught:
        model_config(_mixture("olmoe", num_hidden_layers=-1))
    assert str(caught.value).count("num_hidden_layers: found -1") == 1


@pytest.mark.parametrize("name", MIXTURES)
def test_the_number_of_experts_in_files_is_that_of_the_config(name: str):
    config = _mixture(name)
    assert expert_count(config) == model_config(config).experts.count == 4
    stated = {key: value for key, value in config.items() if key not in COUNTS}
    assert expert_count(stated) == model_config(stated).experts.count > 4
