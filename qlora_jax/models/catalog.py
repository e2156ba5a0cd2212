"""Hugging Face configs of published models by name, for plans of models that are not downloaded.

Sources: the papers and model cards of LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), Mistral 7B
(2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388), SmolLM2 (2502.02737), SmolLM3, OLMo 2 (2501.00656), Gemma
(2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786), Phi-1.5 and 2 (2309.05463), Phi-3 (2404.14219), Phi-4
(2412.08905), GPT-NeoX-20B (2204.06745), Pythia (2304.01373), OLMo 3 (2512.13961), Seed-OSS, EXAONE 4 (2507.11407),
GLM-4-0414 (2406.12793), Granite 3.3, Command R7B (2504.00698), Ministral 3 (2601.08584), Mixtral (2401.04088),
Qwen1.5-MoE, OLMoE (2409.02060), GLM-4.5 (2508.06471), gpt-oss (2508.10925), Qwen2.5-VL (2502.13923) and Qwen3-VL, and
the config.json of each. Sizes of GLM-4.5, gpt-oss and Qwen3-MoE are also those of the recipes of Megatron Bridge and
MindSpeed. A model of images and text stands for its text half.
"""

import difflib

Config = dict[str, object]


def _of(model_type: str, sizes: tuple[int, ...], vocabulary: int, positions: int, theta: float, eps: float) -> Config:
    """Returns a config; `sizes` are width, MLP width, layers, query heads, key and value heads."""
    width, inner, layers, heads, kv_heads = sizes
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
    }


def _llama1(*sizes: int, eps: float) -> Config:
    return _of("llama", sizes, 32000, 2048, 1e4, eps)


def _llama3(*sizes: int) -> Config:
    return _of("llama", sizes, 128256, 8192, 5e5, 1e-5)


def _llama31(*sizes: int, factor: float = 8.0) -> Config:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    return _of("llama", sizes, 128256, 131072, 5e5, 1e-5) | {"rope_scaling": scaling}


def _llama32(*sizes: int, head_dim: int) -> Config:
    return _llama31(*sizes, factor=32.0) | {"head_dim": head_dim, "tie_word_embeddings": True}


def _qwen2(*sizes: int, vocabulary: int, tied: bool = False) -> Config:
    return _of("qwen2", sizes, vocabulary, 131072, 1e6, 1e-6) | {"tie_word_embeddings": tied}


def _qwen3(*sizes: int, tied: bool = False) -> Config:
    return _of("qwen3", sizes, 151936, 40960, 1e6, 1e-6) | {"head_dim": 128, "tie_word_embeddings": tied}


def _smollm2(*sizes: int, theta: float) -> Config:
    return _of("llama", sizes, 49152, 8192, theta, 1e-5) | {"tie_word_embeddings": True}


def _olmo2(*sizes: int) -> Config:
    return _of("olmo2", sizes, 100352, 4096, 5e5, 1e-6)


def _gemma(*sizes: int) -> Config:
    return _of("gemma", sizes, 256000, 8192, 1e4, 1e-6) | {"head_dim": 256}


def _gemma2(*sizes: int, head_dim: int = 256, scalar: int = 256) -> Config:
    heads = {"head_dim": head_dim, "query_pre_attn_scalar": scalar}
    return _of("gemma2", sizes, 256000, 8192, 1e4, 1e-6) | heads


def _gemma3(*sizes: int, window: int) -> Config:
    return _of("gemma3_text", sizes, 262144, 32768, 1e6, 1e-6) | {"head_dim": 256, "sliding_window": window}


def _with_images(model_type: str, text_config: Config, **others: object) -> Config:
    """Returns a config whose text half is another config, without those of its vision tower."""
    return {"model_type": model_type, "text_config": text_config, **others}


def _gemma3_with_images(width: int, inner: int, layers: int, **others: object) -> Config:
    """Returns a config as it is published: `text_config` omits the defaults of transformers."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    text = {"model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    return _with_images("gemma3", text | sizes | others)


def _phi3(*sizes: int, vocabulary: int, **others: object) -> Config:
    return _of("phi3", sizes, vocabulary, 4096, 1e4, 1e-5) | others


def _olmo3(*sizes: int) -> Config:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2079441541679836}
    return _of("olmo3", sizes, 100278, 65536, 5e5, 1e-6) | {"sliding_window": 4096, "rope_scaling": yarn}


def _exaone4(*sizes: int, positions: int, head_dim: int, **others: object) -> Config:
    scaling = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    return (
        _of("exaone4", sizes, 102400, positions, 1e6, 1e-5) | {"head_dim": head_dim, "rope_scaling": scaling} | others
    )


def _glm4(*sizes: int, bias: bool) -> Config:
    config = _of("glm4", sizes, 151552, 32768, 1e4, 1e-5)
    return config | {"head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": bias}


def _granite(*sizes: int, attention: float, logits: float) -> Config:
    scales = {"attention_multiplier": attention, "logits_scaling": logits}
    scales |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    return _of("granite", sizes, 49159, 131072, 1e7, 1e-5) | scales | {"tie_word_embeddings": True}


def _ministral3(*sizes: int, theta: float = 1e6, tied: bool = False) -> Config:
    config = _of("ministral3", sizes, 131072, 262144, theta, 1e-5)
    del config["rope_theta"]
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 16.0, "original_max_position_embeddings": 16384}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    return config | {"head_dim": 128, "rope_parameters": rope, "tie_word_embeddings": tied}


def _layer_norms(config: Config) -> Config:
    """Renames the epsilon to that of a LayerNorm."""
    return {name: value for name, value in config.items() if name != "rms_norm_eps"} | {
        "layer_norm_eps": config["rms_norm_eps"]
    }


def _phi(*sizes: int, partial: float) -> Config:
    return _layer_norms(_of("phi", sizes, 51200, 2048, 1e4, 1e-5)) | {"partial_rotary_factor": partial}


def _neox(width: int, layers: int, heads: int, vocabulary: int) -> Config:
    config = _layer_norms(_of("gpt_neox", (width, 4 * width, layers, heads, heads), vocabulary, 2048, 1e4, 1e-5))
    del config["num_key_value_heads"], config["rope_theta"]
    return config | {"rotary_pct": 0.25}


def _mixtral(*sizes: int, positions: int) -> Config:
    config = _of("mixtral", sizes, 32000, positions, 1e6, 1e-5) | {"sliding_window": None}
    return config | {"num_local_experts": 8, "num_experts_per_tok": 2}


def _routed(count: int, per_token: int, inner: int) -> Config:
    """Returns the attributes of a Qwen's experts; `inner` is the width of one."""
    return {"num_experts": count, "num_experts_per_tok": per_token, "moe_intermediate_size": inner}


def _qwen2_moe(*sizes: int, positions: int, shared: int) -> Config:
    return _of("qwen2_moe", sizes, 151936, positions, 1e6, 1e-6) | {"shared_expert_intermediate_size": shared}


def _qwen3_moe(*sizes: int) -> Config:
    return _of("qwen3_moe", sizes, 151936, 40960, 1e6, 1e-6) | {"head_dim": 128, "norm_topk_prob": True}


def _positions_of_images(*section: int, **others: object) -> Config:
    """Returns a rope_scaling: the dimensions that time, height and width rotate."""
    return {"rope_scaling": {"rope_type": "default", "mrope_section": list(section), **others}}


def _glm45(*sizes: int, inner: int, count: int, dense: int, scale: float, qk_norm: bool) -> Config:
    """Returns a config; `dense` is the number of dense layers, which come first."""
    experts = {"n_routed_experts": count, "num_experts_per_tok": 8, "n_shared_experts": 1}
    experts |= {"moe_intermediate_size": inner, "first_k_dense_replace": dense, "routed_scaling_factor": scale}
    others = {"head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": qk_norm}
    return _of("glm4_moe", sizes, 151552, 131072, 1e6, 1e-5) | experts | others


def _gpt_oss(layers: int, experts: int) -> Config:
    """Returns a config of the published files, whose experts are in MXFP4."""
    config = _of("gpt_oss", (2880, 2880, layers, 64, 8), 201088, 131072, 150000.0, 1e-5)
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    return config | {"num_local_experts": experts, "num_experts_per_tok": 4, "head_dim": 64, "sliding_window": 128}


PUBLISHED: dict[str, Config] = {
    "llama-7b": _llama1(4096, 11008, 32, 32, 32, eps=1e-6),
    "llama-13b": _llama1(5120, 13824, 40, 40, 40, eps=1e-6),
    "llama-33b": _llama1(6656, 17920, 60, 52, 52, eps=1e-6),
    "llama-65b": _llama1(8192, 22016, 80, 64, 64, eps=1e-5),
    "llama-2-7b": _of("llama", (4096, 11008, 32, 32, 32), 32000, 4096, 1e4, 1e-5),
    "llama-2-13b": _of("llama", (5120, 13824, 40, 40, 40), 32000, 4096, 1e4, 1e-5),
    "llama-2-70b": _of("llama", (8192, 28672, 80, 64, 8), 32000, 4096, 1e4, 1e-5),
    "llama-3-8b": _llama3(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama3(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _llama31(16384, 53248, 126, 128, 8),
    "llama-3.2-1b": _llama32(2048, 8192, 16, 32, 8, head_dim=64),
    "llama-3.2-3b": _llama32(3072, 8192, 28, 24, 8, head_dim=128),
    "mistral-7b": _of("mistral", (4096, 14336, 32, 32, 8), 32000, 32768, 1e4, 1e-5) | {"sliding_window": 4096},
    "mistral-nemo-12b": _of("mistral", (5120, 14336, 40, 32, 8), 131072, 131072, 1e6, 1e-5)
    | {"sliding_window": None, "head_dim": 128},
    "mistral-small-3.1-24b": _with_images(
        "mistral3",
        _of("mistral", (5120, 32768, 40, 32, 8), 131072, 131072, 1e9, 1e-5) | {"sliding_window": None, "head_dim": 128},
        tie_word_embeddings=False,
    ),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, vocabulary=151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, vocabulary=151936, tied=True),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, vocabulary=152064),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, vocabulary=151936, tied=True),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, vocabulary=152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, vocabulary=152064),
    "qwen2.5-vl-7b": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064)
    | {"model_type": "qwen2_5_vl", "max_position_embeddings": 128000, **_positions_of_images(16, 24, 24)},
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, theta=1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, theta=1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, theta=1.3e5),
    "smollm3-3b": _of("smollm3", (2048, 11008, 36, 16, 4), 128256, 65536, 5e6, 1e-6),
    "olmo2-1b": _olmo2(2048, 8192, 16, 16, 16),
    "olmo2-7b": _olmo2(4096, 11008, 32, 32, 32),
    "olmo2-13b": _olmo2(5120, 13824, 40, 40, 40),
    "olmo2-32b": _olmo2(5120, 27648, 64, 40, 8),
    "olmo3-7b": _olmo3(4096, 11008, 32, 32, 32),
    "olmo3-32b": _olmo3(5120, 27648, 64, 40, 8),
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, scalar=144),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, window=512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, window=512),
    "gemma-3-4b": _gemma3_with_images(2560, 10240, 34),
    "gemma-3-12b": _gemma3_with_images(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
    "gemma-3-27b": _gemma3_with_images(
        *(5376, 21504, 62),
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
    "phi-1.5": _phi(2048, 8192, 24, 32, 32, partial=0.5),
    "phi-2": _phi(2560, 10240, 32, 32, 32, partial=0.4),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, vocabulary=32064, sliding_window=2047),
    "phi-3-medium": _phi3(5120, 17920, 40, 40, 10, vocabulary=32064, sliding_window=2047),
    "phi-4": _phi3(5120, 17920, 40, 40, 10, vocabulary=100352, max_position_embeddings=16384, rope_theta=250000.0),
    "seed-oss-36b": _of("seed_oss", (5120, 27648, 64, 80, 8), 155136, 524288, 1e7, 1e-6) | {"head_dim": 128},
    "exaone-4-1.2b": _exaone4(
        *(2048, 4096, 30, 32, 8), positions=65536, head_dim=64, sliding_window=None, tie_word_embeddings=True
    ),
    "exaone-4-32b": _exaone4(5120, 27392, 64, 40, 8, positions=131072, head_dim=128, sliding_window=4096),
    "glm-4-9b-0414": _glm4(4096, 13696, 40, 32, 2, bias=True),
    "glm-4-32b-0414": _glm4(6144, 23040, 61, 48, 2, bias=False),
    "granite-3.3-2b": _granite(2048, 8192, 40, 32, 8, attention=0.015625, logits=8.0),
    "granite-3.3-8b": _granite(4096, 12800, 40, 32, 8, attention=0.0078125, logits=16.0),
    "command-r7b": _layer_norms(_of("cohere2", (4096, 14336, 32, 32, 8), 256000, 8192, 5e4, 1e-5))
    | {"logit_scale": 0.25, "sliding_window": 4096},
    "ministral-3-3b": _ministral3(3072, 9216, 26, 32, 8, tied=True),
    "ministral-3-8b": _ministral3(4096, 14336, 34, 32, 8),
    "ministral-3-14b": _ministral3(5120, 16384, 40, 32, 8, theta=1e9),
    "mixtral-8x7b": _mixtral(4096, 14336, 32, 32, 8, positions=32768),
    "mixtral-8x22b": _mixtral(6144, 16384, 56, 48, 8, positions=65536),
    "qwen1.5-moe-a2.7b": _qwen2_moe(2048, 5632, 24, 16, 16, positions=32768, shared=5632) | _routed(60, 4, 1408),
    "qwen2-57b-a14b": _qwen2_moe(3584, 18944, 28, 28, 4, positions=131072, shared=20480) | _routed(64, 8, 2560),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, 32, 4) | _routed(128, 8, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 94, 64, 4) | _routed(128, 8, 1536),
    "qwen3-vl-30b-a3b": _with_images(
        "qwen3_vl_moe",
        _qwen3_moe(2048, 6144, 48, 32, 4)
        | _routed(128, 8, 768)
        | {"model_type": "qwen3_vl_moe_text", "rope_theta": 5e6, "max_position_embeddings": 262144}
        | _positions_of_images(24, 20, 20, mrope_interleaved=True),
    ),
    "olmoe-1b-7b": _of("olmoe", (2048, 1024, 16, 16, 16), 50304, 4096, 1e4, 1e-5)
    | {"num_experts": 64, "num_experts_per_tok": 8},
    "glm-4.5": _glm45(5120, 12288, 92, 96, 8, inner=1536, count=160, dense=3, scale=2.5, qk_norm=True),
    "glm-4.5-air": _glm45(4096, 10944, 46, 96, 8, inner=1408, count=128, dense=1, scale=1.0, qk_norm=False),
    "glm-4.5v": _with_images(
        "glm4v_moe",
        _glm45(4096, 10944, 46, 96, 8, inner=1408, count=128, dense=1, scale=1.0, qk_norm=False)
        | {"model_type": "glm4v_moe_text", "rope_theta": 1e4, "max_position_embeddings": 65536}
        | _positions_of_images(8, 12, 12),
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "gpt-neox-20b": _neox(6144, 44, 64, 50432),
    "pythia-70m": _neox(512, 6, 8, 50304),
    "pythia-160m": _neox(768, 12, 12, 50304),
    "pythia-410m": _neox(1024, 24, 16, 50304),
    "pythia-1b": _neox(2048, 16, 8, 50304),
    "pythia-1.4b": _neox(2048, 24, 16, 50304),
    "pythia-2.8b": _neox(2560, 32, 32, 50304),
    "pythia-6.9b": _neox(4096, 32, 32, 50432),
    "pythia-12b": _neox(5120, 36, 40, 50688),
}


def nearest(name: str) -> str | None:
    """Returns the published name that is most similar to `name`, or None."""
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1, cutoff=0.6)
    return near[0] if near else None
