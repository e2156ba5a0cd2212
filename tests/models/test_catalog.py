"""Tests parameter counts of published models: exact to the last parameter."""

import math

import jax
import pytest
from flax import nnx

from qlora_jax.models.catalog import PUBLISHED, nearest
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config

# Numbers of elements of all published tensors. Llama 1's paper rounds them to 6.7, 13.0, 32.5 and 65.2 billion.
# Of models of images and text, those of the text half: the published numbers (4,300,079,472, 12,187,325,040,
# 27,432,406,640 of Gemma 3, 24,011,361,280 of Mistral Small 3.1) without vision tower and projector.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-3.1-24b": 23_572_403_200,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-vl-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    # Model cards: 36 B; 1.28 B, of which 1.07 B are not the embedding; 32.0 B, 30.95 B without embeddings; 9.40 B and
    # 32.57 B; 2.53 B and 8.17 B; 8.03 B; 3.4 B, 8.4 B and 13.5 B of the language model.
    "seed-oss-36b": 36_151_104_512,
    "exaone-4-1.2b": 1_279_391_488,
    "exaone-4-32b": 32_003_216_384,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4-32b-0414": 32_566_081_536,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "command-r7b": 8_028_033_024,
    "ministral-3-3b": 3_429_006_336,
    "ministral-3-8b": 8_489_553_920,
    "ministral-3-14b": 13_506_073_600,
    # Without the layer of GLM-4.5 and its Air that predicts tokens ahead, which has 5,539,962,272 and 3,616,573,568 of
    # the published 358,337,791,296 and 110,468,824,832; 14,240 and 5,760 are biases of the routers' choice.
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-vl-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "glm-4.5": 352_797_814_784,
    "glm-4.5-air": 106_852_245_504,
    "glm-4.5v": 106_852_245_504,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}


# Billions of parameters that a token uses, in papers and model cards.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39,
    "qwen1.5-moe-a2.7b": 2.7,
    "qwen2-57b-a14b": 14.2,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "olmoe-1b-7b": 1.3,
}
WITHOUT_EMBEDDING = {"gpt-oss-20b": 3.61, "gpt-oss-120b": 5.13, "glm-4.5": 32, "glm-4.5-air": 12}


def parameters(model: ModelConfig) -> int:
    """Counts the elements of all leaves of a model but biases of routers' choice, without allocating any."""
    state = nnx.state(nnx.eval_shape(lambda: CausalLM(model, WeightFormat(quant_type=None))))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if "e_score_correction_bias" not in str(path))


def test_each_has_a_published_count():
    assert PUBLISHED.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    model = model_config(PUBLISHED[name])
    assert parameters(model) == model.parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", ACTIVE | WITHOUT_EMBEDDING)
def test_active_parameters_are_the_published_ones(name):
    model = model_config(PUBLISHED[name])
    active = model.active_parameters() - (name in WITHOUT_EMBEDDING) * model.vocab_size * model.embed_dim
    within = 0.07 if name.startswith("glm") else 0.02  # published in whole billions
    assert active / 1e9 == pytest.approx((ACTIVE | WITHOUT_EMBEDDING)[name], rel=within)


# Further attributes of published config.json files, by model.
BESIDES = {
    "smollm3-3b": {"pretraining_tp": 2, "max_window_layers": 28, "no_rope_layer_interval": 4, "rope_scaling": None},
    "gemma-2b": {"hidden_act": "gelu", "hidden_activation": None, "attention_bias": False, "rope_scaling": None},
    "gemma-2-9b": {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096, "cache_implementation": "hybrid"},
    "gemma-3-1b": {"rope_local_base_freq": 10000, "sliding_window_pattern": 6, "attn_logit_softcapping": None},
    "phi-2": {"qk_layernorm": False, "resid_pdrop": 0.1, "embd_pdrop": 0.0},
    "phi-3-mini": {
        "original_max_position_embeddings": 4096,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
    "phi-4": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
    "gpt-neox-20b": {"hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "rotary_emb_base": 10000},
    "qwen3-8b": {"max_window_layers": 36, "use_sliding_window": False, "sliding_window": None, "rope_scaling": None},
    "mistral-7b": {"attention_dropout": 0.0, "rope_scaling": None},
    "olmo2-7b": {"attention_bias": False, "rope_scaling": None},
    "olmo3-7b": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8},
    "seed-oss-36b": {
        "attention_bias": True,
        "attention_out_bias": False,
        "residual_dropout": 0.1,
        "pretraining_tp": 1,
        "rope_scaling": {"rope_type": "default"},
    },
    "exaone-4-32b": {
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "sliding_window_pattern": "LLLG",
    },
    "exaone-4-1.2b": {"layer_types": ["full_attention"] * 30, "sliding_window_pattern": None},
    "granite-3.3-8b": {"attention_bias": False, "mlp_bias": False, "rope_scaling": None},
    "command-r7b": {
        "head_dim": 128,
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "cache_implementation": "hybrid",
    },
    "ministral-3-3b": {"sliding_window": None},
    "mixtral-8x7b": {"output_router_logits": False, "router_aux_loss_coef": 0.02, "attention_dropout": 0.0},
    "qwen1.5-moe-a2.7b": {
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3-30b-a3b": {"mlp_only_layers": [], "decoder_sparse_step": 1, "max_window_layers": 48, "rope_scaling": None},
    "olmoe-1b-7b": {"clip_qkv": None, "norm_topk_prob": False, "attention_bias": False, "router_aux_loss_coef": 0.01},
    "glm-4.5": {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1},
    "gpt-oss-20b": {
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}


@pytest.mark.parametrize("name", BESIDES)
def test_what_published_configs_say_besides_is_understood(name):
    assert parameters(model_config(PUBLISHED[name] | BESIDES[name])) == PARAMETERS[name]


def test_a_misspelt_name_finds_its_model():
    assert nearest("llama3-8b") == "llama-3-8b" and nearest("Qwen2-7B") == "qwen2-7b"
    assert nearest("a-folder/of/mine") is None
