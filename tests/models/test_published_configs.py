"""Configs as published on the Hugging Face Hub, under names of its repositories, and their numbers of parameters.

They are quoted in public repositories; that of EXAONE is put together from two quotations. Those of OLMo 3 32B
(rasbt/LLMs-from-scratch, ch05/13_olmo3) and Ministral 3 14B (a data set's README for its base model, and the number of
parameters counted from its config.json) are quoted as numbers under other names. Gemma 3 1B is quoted by TensorRT-LLM's
tests, with fewer layers and a shorter window, which other quotations give. Numbers of parameters of Gemma 3 are those
that llama.cpp prints for its GGUF files, and of 1B that of KerasHub's preset.
Attributes that do not describe the computation (torch_dtype and the like) are kept as well: they must not be refused.
"""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.io.open_model import open_model
from qlora_jax.models import catalog
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import alone, text_config

PERIODIC = ["sliding_attention"] * 3 + ["full_attention"]
GENERAL = dict(attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, use_cache=True)
BFLOAT16 = GENERAL | dict(torch_dtype="bfloat16")
LLAMA3 = dict(factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192)
QWEN3_MOE = BFLOAT16 | dict(
    architectures=["Qwen3MoeForCausalLM"],
    decoder_sparse_step=1,
    eos_token_id=151645,
    head_dim=128,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    norm_topk_prob=True,
    num_experts_per_tok=8,
    output_router_logits=False,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    transformers_version="4.51.0",
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN3_CODER = QWEN3_MOE | dict(
    max_position_embeddings=262144,
    qkv_bias=False,
    rope_theta=10000000,
    router_aux_loss_coef=0.0,
    shared_expert_intermediate_size=0,
    use_qk_norm=True,
)
PIXTRAL = dict(
    model_type="pixtral", head_dim=64, hidden_size=1024, image_size=1540, num_hidden_layers=24, patch_size=14
)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=1152, image_size=896, num_hidden_layers=27, patch_size=14)
GPT_OSS = GENERAL | dict(
    architectures=["GptOssForCausalLM"],
    attention_bias=True,
    eos_token_id=200002,
    experts_per_token=4,
    head_dim=64,
    hidden_size=2880,
    initial_context_length=4096,
    intermediate_size=2880,
    max_position_embeddings=131072,
    model_type="gpt_oss",
    num_attention_heads=64,
    num_experts_per_tok=4,
    num_key_value_heads=8,
    output_router_logits=False,
    pad_token_id=199999,
    quantization_config=dict(
        modules_to_not_convert=[
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        quant_method="mxfp4",
    ),
    rms_norm_eps=1e-05,
    rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096)
    | dict(rope_type="yarn", truncate=False),
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    transformers_version="4.55.0.dev0",
    vocab_size=201088,
)


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    """Returns the config of a size of gpt-oss."""
    sizes = dict(num_hidden_layers=layers, num_local_experts=experts)
    return GPT_OSS | sizes | dict(layer_types=["sliding_attention", "full_attention"] * (layers // 2))


def gemma3(*sizes: int, **others: int) -> dict[str, Any]:
    """Returns the config of a Gemma 3 with images; `sizes` are width, MLP width and layers."""
    of_text = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), sizes, strict=True))
    text = dict(model_type="gemma3_text", rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024)
    return dict(
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        model_type="gemma3",
        text_config=text | of_text | others,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        vision_config=SIGLIP,
    )


# By repository: (config, number of parameters where a public source gives it).
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "allenai/Olmo-3-1025-7B": (
        GENERAL
        | dict(
            architectures=["Olmo3ForCausalLM"],
            attention_bias=False,
            dtype="bfloat16",
            hidden_size=4096,
            intermediate_size=11008,
            layer_types=PERIODIC * 8,
            max_position_embeddings=65536,
            model_type="olmo3",
            num_attention_heads=32,
            num_hidden_layers=32,
            num_key_value_heads=32,
            rms_norm_eps=1e-06,
            rope_scaling=dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0)
            | dict(original_max_position_embeddings=8192, rope_type="yarn"),
            rope_theta=500000,
            sliding_window=4096,
            tie_word_embeddings=False,
            vocab_size=100278,
        ),
        7_298_011_136,
    ),
    "allenai/Olmo-3-1125-32B": (
        GENERAL
        | dict(
            architectures=["Olmo3ForCausalLM"],
            attention_bias=False,
            hidden_size=5120,
            intermediate_size=27648,
            layer_types=PERIODIC * 16,
            max_position_embeddings=65536,
            model_type="olmo3",
            num_attention_heads=40,
            num_hidden_layers=64,
            num_key_value_heads=8,
            rms_norm_eps=1e-06,
            rope_scaling=dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0)
            | dict(original_max_position_embeddings=8192, rope_type="yarn"),
            rope_theta=500000,
            sliding_window=4096,
            tie_word_embeddings=False,
            vocab_size=100278,
        ),
        None,
    ),
    "mistralai/Ministral-3-14B-Base-2512": (
        dict(
            model_type="mistral3",
            text_config=GENERAL
            | dict(
                head_dim=128,
                hidden_size=5120,
                intermediate_size=16384,
                max_position_embeddings=262144,
                model_type="ministral3",
                num_attention_heads=32,
                num_hidden_layers=40,
                num_key_value_heads=8,
                rms_norm_eps=1e-05,
                rope_parameters=dict(beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0)
                | dict(mscale_all_dim=1.0, original_max_position_embeddings=16384, rope_theta=1e9, rope_type="yarn"),
                vocab_size=131072,
            ),
            tie_word_embeddings=False,
        ),
        13_506_073_600,
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        dict(
            architectures=["SeedOssForCausalLM"],
            attention_bias=True,
            attention_out_bias=False,
            head_dim=128,
            hidden_act="silu",
            hidden_size=5120,
            intermediate_size=27648,
            max_position_embeddings=524288,
            mlp_bias=False,
            model_type="seed_oss",
            num_attention_heads=80,
            num_hidden_layers=64,
            num_key_value_heads=8,
            rms_norm_eps=1e-06,
            rope_scaling=dict(rope_type="default"),
            rope_theta=10000000.0,
            tie_word_embeddings=False,
            use_cache=True,
            vocab_size=155136,
        ),
        36_151_104_512,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": (
        BFLOAT16
        | dict(
            architectures=["Exaone4ForCausalLM"],
            bos_token_id=1,
            eos_token_id=361,
            head_dim=128,
            hidden_size=5120,
            intermediate_size=27392,
            layer_types=PERIODIC * 16,
            max_position_embeddings=131072,
            model_type="exaone4",
            num_attention_heads=40,
            num_hidden_layers=64,
            num_key_value_heads=8,
            pad_token_id=0,
            reorder_qk_norm=True,
            rms_norm_eps=1e-05,
            rope_scaling=LLAMA3 | dict(rope_type="llama3"),
            rope_theta=1000000,
            sliding_window=4096,
            sliding_window_pattern="LLLG",
            tie_word_embeddings=False,
            vocab_size=102400,
        ),
        None,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        BFLOAT16
        | dict(
            architectures=["GraniteForCausalLM"],
            attention_bias=False,
            attention_multiplier=0.0078125,
            bos_token_id=0,
            embedding_multiplier=12.0,
            eos_token_id=0,
            hidden_size=4096,
            intermediate_size=12800,
            logits_scaling=16.0,
            max_position_embeddings=131072,
            mlp_bias=False,
            model_type="granite",
            num_attention_heads=32,
            num_hidden_layers=40,
            num_key_value_heads=8,
            pad_token_id=0,
            residual_multiplier=0.22,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=10000000.0,
            tie_word_embeddings=True,
            transformers_version="4.49.0",
            vocab_size=49159,
        ),
        None,
    ),
    "ibm-granite/granite-3.3-2b-instruct": (
        GENERAL
        | dict(
            architectures=["GraniteForCausalLM"],
            attention_bias=False,
            attention_multiplier=0.015625,
            bos_token_id=0,
            embedding_multiplier=12.0,
            eos_token_id=0,
            hidden_size=2048,
            intermediate_size=8192,
            logits_scaling=8.0,
            max_position_embeddings=131072,
            mlp_bias=False,
            model_type="granite",
            num_attention_heads=32,
            num_hidden_layers=40,
            num_key_value_heads=8,
            residual_multiplier=0.22,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=10000000.0,
            tie_word_embeddings=True,
            vocab_size=49159,
        ),
        2_533_539_840,
    ),
    "google/gemma-3-1b-it": (
        dict(
            architectures=["Gemma3ForCausalLM"],
            attention_bias=False,
            attention_dropout=0.0,
            attn_logit_softcapping=None,
            bos_token_id=2,
            cache_implementation="hybrid",
            eos_token_id=[1, 106],
            final_logit_softcapping=None,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            hidden_size=1152,
            initializer_range=0.02,
            intermediate_size=6912,
            max_position_embeddings=32768,
            model_type="gemma3_text",
            num_attention_heads=4,
            num_hidden_layers=26,
            num_key_value_heads=1,
            pad_token_id=0,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-06,
            rope_local_base_freq=10000,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=512,
            sliding_window_pattern=6,
            torch_dtype="bfloat16",
            transformers_version="4.50.0.dev0",
            use_cache=True,
            vocab_size=262144,
        ),
        999_885_952,
    ),
    "google/gemma-3-4b-it": (gemma3(2560, 10240, 34), 3_880_263_168),
    "google/gemma-3-12b-it": (gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8), 11_766_034_176),
    "google/gemma-3-27b-it": (
        gemma3(
            *(5376, 21504, 62),
            head_dim=128,
            num_attention_heads=32,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
        ),
        27_009_346_304,
    ),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506, saved by transformers 4.57": (
        dict(
            architectures=["Mistral3ForConditionalGeneration"],
            dtype="bfloat16",
            image_token_index=10,
            model_type="mistral3",
            multimodal_projector_bias=False,
            projector_hidden_act="gelu",
            spatial_merge_size=2,
            tie_word_embeddings=False,  # not quoted; open_model sets it, because the files have a head
            text_config=GENERAL
            | dict(
                dtype="bfloat16",
                head_dim=128,
                hidden_size=5120,
                intermediate_size=32768,
                max_position_embeddings=131072,
                model_type="mistral",
                num_attention_heads=32,
                num_hidden_layers=40,
                num_key_value_heads=8,
                rms_norm_eps=1e-05,
                rope_theta=1000000000.0,
                sliding_window=None,
                vocab_size=131072,
            ),
            transformers_version="4.57.1",
            vision_config=PIXTRAL,
            vision_feature_layer=-1,
        ),
        23_572_403_200,
    ),
    "openai/gpt-oss-20b": (gpt_oss(24, 32), 20_914_757_184),
    "openai/gpt-oss-120b": (gpt_oss(36, 128), 116_829_156_672),
    "mistralai/Mixtral-8x7B-v0.1": (
        BFLOAT16
        | dict(
            architectures=["MixtralForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
            hidden_size=4096,
            intermediate_size=14336,
            max_position_embeddings=32768,
            model_type="mixtral",
            num_attention_heads=32,
            num_experts_per_tok=2,
            num_hidden_layers=32,
            num_key_value_heads=8,
            num_local_experts=8,
            output_router_logits=False,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.02,
            sliding_window=None,
            tie_word_embeddings=False,
            transformers_version="4.36.0.dev0",
            vocab_size=32000,
        ),
        46_702_792_704,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (
        BFLOAT16
        | dict(
            architectures=["Qwen2MoeForCausalLM"],
            bos_token_id=151643,
            decoder_sparse_step=1,
            eos_token_id=151645,
            hidden_size=2048,
            intermediate_size=5632,
            max_position_embeddings=32768,
            max_window_layers=21,
            model_type="qwen2_moe",
            moe_intermediate_size=1408,
            norm_topk_prob=False,
            num_attention_heads=16,
            num_experts=60,
            num_experts_per_tok=4,
            num_hidden_layers=24,
            num_key_value_heads=16,
            output_router_logits=False,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.001,
            shared_expert_intermediate_size=5632,
            sliding_window=32768,
            tie_word_embeddings=False,
            transformers_version="4.39.0.dev0",
            use_sliding_window=False,
            vocab_size=151936,
        ),
        14_315_784_192,
    ),
    "Qwen/Qwen3-30B-A3B": (
        QWEN3_MOE
        | dict(
            attention_bias=False,
            bos_token_id=151643,
            hidden_size=2048,
            intermediate_size=6144,
            max_position_embeddings=40960,
            max_window_layers=48,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_experts=128,
            num_hidden_layers=48,
            num_key_value_heads=4,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.001,
        ),
        30_532_122_624,
    ),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": (
        QWEN3_CODER
        | dict(
            hidden_size=2048,
            intermediate_size=5472,
            max_window_layers=28,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_experts=128,
            num_hidden_layers=48,
            num_key_value_heads=4,
        ),
        30_532_122_624,
    ),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (
        QWEN3_CODER
        | dict(
            hidden_size=6144,
            intermediate_size=8192,
            max_window_layers=62,
            moe_intermediate_size=2560,
            num_attention_heads=96,
            num_experts=160,
            num_hidden_layers=62,
            num_key_value_heads=8,
        ),
        480_154_875_392,
    ),
    "allenai/OLMoE-1B-7B-0125-Instruct": (
        BFLOAT16
        | dict(
            architectures=["OlmoeForCausalLM"],
            attention_bias=False,
            clip_qkv=None,
            hidden_size=2048,
            intermediate_size=1024,
            max_position_embeddings=4096,
            model_type="olmoe",
            norm_topk_prob=False,
            num_attention_heads=16,
            num_experts=64,
            num_experts_per_tok=8,
            num_hidden_layers=16,
            num_key_value_heads=16,
            output_router_logits=False,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=10000.0,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=False,
            vocab_size=50304,
        ),
        6_919_161_856,
    ),
    "HuggingFaceTB/SmolLM3-3B-Base": (
        BFLOAT16
        | dict(
            architectures=["SmolLM3ForCausalLM"],
            attention_bias=False,
            bos_token_id=None,
            eos_token_id=128001,
            hidden_size=2048,
            intermediate_size=11008,
            max_position_embeddings=65536,
            model_type="smollm3",
            no_rope_layer_interval=4,
            num_attention_heads=16,
            num_hidden_layers=36,
            num_key_value_heads=4,
            pad_token_id=128004,
            pretraining_tp=2,
            rms_norm_eps=1e-06,
            rope_scaling=None,
            rope_theta=5000000.0,
            sliding_window=None,
            tie_word_embeddings=True,
            use_sliding_window=False,
            vocab_size=128256,
        ),
        3_075_098_624,
    ),
    # Its sizes are smaller than the published model's.
    "CohereLabs/c4ai-command-a-03-2025, saved by transformers 4.56": (
        GENERAL
        | dict(
            _sliding_window_pattern=4,
            attention_bias=False,
            bos_token_id=5,
            eos_token_id=255001,
            head_dim=128,
            hidden_size=512,
            intermediate_size=1024,
            layer_norm_eps=1e-05,
            layer_types=PERIODIC * 10,
            logit_scale=0.0625,
            max_position_embeddings=8192,
            model_type="cohere2",
            num_attention_heads=4,
            num_hidden_layers=40,
            num_key_value_heads=2,
            pad_token_id=0,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=4096,
            transformers_version="4.56.0",
            vocab_size=256000,
        ),
        None,
    ),
    "zai-org/GLM-4.5-Air": (
        BFLOAT16
        | dict(
            architectures=["Glm4MoeForCausalLM"],
            attention_bias=True,
            eos_token_id=[151329, 151336, 151338],
            first_k_dense_replace=1,
            head_dim=128,
            hidden_size=4096,
            intermediate_size=10944,
            max_position_embeddings=131072,
            model_type="glm4_moe",
            moe_intermediate_size=1408,
            n_group=1,
            n_routed_experts=128,
            n_shared_experts=1,
            norm_topk_prob=True,
            num_attention_heads=96,
            num_experts_per_tok=8,
            num_hidden_layers=46,
            num_key_value_heads=8,
            num_nextn_predict_layers=1,
            pad_token_id=151329,
            partial_rotary_factor=0.5,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=1000000,
            routed_scaling_factor=1.0,
            tie_word_embeddings=False,
            topk_group=1,
            transformers_version="4.54.1",
            use_qk_norm=False,
            vocab_size=151552,
        ),
        None,
    ),
    "zai-org/GLM-4.5V": (
        dict(
            architectures=["Glm4vMoeForConditionalGeneration"],
            dtype="bfloat16",
            image_end_token_id=151340,
            image_start_token_id=151339,
            image_token_id=151363,
            model_type="glm4v_moe",
            text_config=GENERAL
            | dict(
                attention_bias=True,
                bos_token_id=None,
                dtype="bfloat16",
                eos_token_id=[151329, 151336, 151338],
                first_k_dense_replace=1,
                head_dim=128,
                hidden_size=4096,
                image_end_token_id=151340,
                image_start_token_id=151339,
                image_token_id=151363,
                intermediate_size=10944,
                max_position_embeddings=65536,
                model_type="glm4v_moe_text",
                moe_intermediate_size=1408,
                n_group=1,
                n_routed_experts=128,
                n_shared_experts=1,
                norm_topk_prob=True,
                num_attention_heads=96,
                num_experts_per_tok=8,
                num_hidden_layers=46,
                num_key_value_heads=8,
                pad_token_id=151329,
                partial_rotary_factor=0.5,
                rms_norm_eps=1e-05,
                rope_parameters=dict(
                    mrope_section=[8, 12, 12], partial_rotary_factor=0.5, rope_theta=10000.0, rope_type="default"
                ),
                routed_scaling_factor=1.0,
                router_aux_loss_coef=0.0001,
                tie_word_embeddings=False,
                topk_group=1,
                use_qk_norm=False,
                vocab_size=151552,
            ),
            tie_word_embeddings=False,
            transformers_version="5.7.0",
            video_end_token_id=151342,
            video_start_token_id=151341,
        ),
        106_852_245_504,  # those of GLM-4.5-Air
    ),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (
        dict(
            architectures=["Qwen3VLMoeForConditionalGeneration"],
            image_token_id=151655,
            model_type="qwen3_vl_moe",
            text_config=GENERAL
            | dict(
                attention_bias=False,
                bos_token_id=151643,
                decoder_sparse_step=1,
                dtype="bfloat16",
                eos_token_id=151645,
                head_dim=128,
                hidden_size=2048,
                intermediate_size=6144,
                max_position_embeddings=262144,
                mlp_only_layers=[],
                model_type="qwen3_vl_moe_text",
                moe_intermediate_size=768,
                norm_topk_prob=True,
                num_attention_heads=32,
                num_experts=128,
                num_experts_per_tok=8,
                num_hidden_layers=48,
                num_key_value_heads=4,
                rms_norm_eps=1e-06,
                rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
                rope_theta=5000000,
                vocab_size=151936,
            ),
            tie_word_embeddings=False,
            video_token_id=151656,
            vision_config=dict(deepstack_visual_indexes=[8, 16, 24], depth=27),
        ),
        30_532_122_624,  # those of Qwen3-30B-A3B
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        BFLOAT16
        | dict(
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            bos_token_id=151643,
            eos_token_id=151645,
            hidden_size=3584,
            image_token_id=151655,
            intermediate_size=18944,
            max_position_embeddings=128000,
            max_window_layers=28,
            model_type="qwen2_5_vl",
            num_attention_heads=28,
            num_hidden_layers=28,
            num_key_value_heads=4,
            rms_norm_eps=1e-06,
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
            rope_theta=1000000.0,
            sliding_window=32768,
            tie_word_embeddings=False,
            transformers_version="4.41.2",
            use_sliding_window=False,
            video_token_id=151656,
            vision_config=dict(depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16),
            vision_end_token_id=151653,
            vision_start_token_id=151652,
            vision_token_id=151654,
            vocab_size=152064,
        ),
        7_615_616_512,  # those of Qwen2.5-7B
    ),
}


# Names in the catalog of these configs.
IN_CATALOG = {
    "olmo3-7b": "allenai/Olmo-3-1025-7B",
    "olmo3-32b": "allenai/Olmo-3-1125-32B",
    "ministral-3-14b": "mistralai/Ministral-3-14B-Base-2512",
    "seed-oss-36b": "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "exaone-4-32b": "LGAI-EXAONE/EXAONE-4.0-32B",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-instruct",
    "granite-3.3-8b": "ibm-granite/granite-3.3-8b-instruct",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "gemma-3-27b": "google/gemma-3-27b-it",
    "mistral-small-3.1-24b": "mistralai/Mistral-Small-3.2-24B-Instruct-2506, saved by transformers 4.57",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-vl-30b-a3b": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "olmoe-1b-7b": "allenai/OLMoE-1B-7B-0125-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B-Base",
    "glm-4.5-air": "zai-org/GLM-4.5-Air",
    "glm-4.5v": "zai-org/GLM-4.5V",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}


@pytest.mark.parametrize("name", IN_CATALOG)
def test_the_catalog_has_the_published_features(name: str) -> None:
    assert alone(model_config(catalog.PUBLISHED[name])) == alone(model_config(PUBLISHED[IN_CATALOG[name]][0]))


def test_the_catalog_has_the_features_of_a_published_file(gemma3_gguf: Path) -> None:
    assert model_config(catalog.PUBLISHED["gemma-3-270m"]) == model_config(open_model(gemma3_gguf).config)


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_configs_are_read(repository: str) -> None:
    config, parameters = PUBLISHED[repository]
    model = model_config(config)
    assert model.num_layers == text_config(config)["num_hidden_layers"]
    assert parameters is None or model.parameters() == parameters
