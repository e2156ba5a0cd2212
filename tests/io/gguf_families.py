"""GGUF files of every architecture, written as llama.cpp's converter writes them: for tests of the reader.

Names of tensors and keys are the gguf package's; its changes of rows and norms are copied in its form.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from flax import nnx

from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from tests.io.tiny_models import TOKENS, add_vocabulary, permute_rows

SIZES = dict(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)
RMS = SIZES | dict(rms_norm_eps=1e-5, rope_theta=5000.0)
LAYER = SIZES | dict(layer_norm_eps=1e-5, num_key_value_heads=4)
LONG, SHORT = [1.5, 1.7, 2.0, 3.0], [1.0, 1.1, 1.2, 1.25]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0)
OLMO3_YARN = YARN | dict(attention_factor=0.1 * math.log(4.0) + 1.0)
MINISTRAL = dict(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5)
LONGROPE = dict(rope_type="longrope", long_factor=LONG, short_factor=SHORT, attention_factor=1.25)
# By name: llama.cpp's architecture, and a config with what it can say away from the default.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", RMS | dict(model_type="llama", tie_word_embeddings=True)),
    "qwen2": ("qwen2", RMS | dict(model_type="qwen2")),
    # 128 is what transformers takes, whatever the file says.
    "qwen3": ("qwen3", RMS | dict(model_type="qwen3", head_dim=128, tie_word_embeddings=True)),
    "smollm3": ("smollm3", RMS | dict(model_type="smollm3")),
    "olmo2": ("olmo2", RMS | dict(model_type="olmo2")),
    "olmo3": (
        "olmo2",
        RMS | dict(model_type="olmo3", num_hidden_layers=4, sliding_window=16, rope_theta=5e5, rope_scaling=OLMO3_YARN)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "exaone4": (
        "exaone4",
        RMS | dict(model_type="exaone4", sliding_window=None, tie_word_embeddings=True)
        | dict(layer_types=["full_attention"] * 2),
    ),
    # llama.cpp gives windows to models of 64 layers alone.
    "exaone4, windows": ("exaone4", RMS | dict(model_type="exaone4", num_hidden_layers=64, sliding_window=16)),
    "seed_oss": (
        "seed_oss",
        RMS | dict(model_type="seed_oss", head_dim=32, attention_dropout=0.0, residual_dropout=0.0),
    ),
    "glm4": ("glm4", RMS | dict(model_type="glm4", head_dim=16)),
    "granite": (
        "granite",
        RMS | dict(model_type="granite", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        | dict(embedding_multiplier=12.0, attention_multiplier=0.5, residual_multiplier=0.25, logits_scaling=8.0),
    ),
    "cohere2": (
        "cohere2",
        LAYER
        | dict(model_type="cohere2", num_hidden_layers=4, num_key_value_heads=2, sliding_window=16, logit_scale=0.25),
    ),
    "ministral3": (
        "mistral3",
        RMS | dict(model_type="ministral3", head_dim=32)
        | dict(rope_scaling=YARN | dict(original_max_position_embeddings=8) | MINISTRAL),
    ),
    "gemma": ("gemma", RMS | dict(model_type="gemma", head_dim=32, rope_theta=10000.0)),
    "gemma2": (
        "gemma2",
        RMS
        | dict(model_type="gemma2", head_dim=32, rope_theta=10000.0, sliding_window=16, query_pre_attn_scalar=32)
        | dict(attn_logit_softcapping=40.0, final_logit_softcapping=20.0),
    ),
    "gemma3": (
        "gemma3",
        RMS | dict(model_type="gemma3_text", head_dim=32, sliding_window=16, query_pre_attn_scalar=32)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
    ),
    "phi2": ("phi2", LAYER | dict(model_type="phi", partial_rotary_factor=0.5)),
    "phi3": ("phi3", RMS | dict(model_type="phi3", sliding_window=24)),
    "phi3, longrope": (
        "phi3",
        RMS | dict(model_type="phi3", partial_rotary_factor=0.5, original_max_position_embeddings=64)
        | dict(rope_scaling=LONGROPE),
    ),
    "gptneox": ("gptneox", LAYER | dict(model_type="gpt_neox", use_parallel_residual=False, rotary_pct=0.5)),
}  # fmt: skip
ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# llama.cpp rounds the limits of YaRN's ramp, gpt-oss does not: with this base they are 0 and 4.99999.
GPT_OSS_THETA = 1681.1512
GPT_OSS_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", RMS | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=3)),
    "qwen2moe": ("qwen2moe", RMS | ROUTED | dict(model_type="qwen2_moe", shared_expert_intermediate_size=64)),
    "qwen3moe": ("qwen3moe", RMS | ROUTED | dict(model_type="qwen3_moe", head_dim=32, norm_topk_prob=True)),
    "olmoe": (
        "olmoe",
        RMS | dict(model_type="olmoe", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
    ),
    "glm4moe": (
        "glm4moe",
        RMS
        | dict(model_type="glm4_moe", head_dim=32, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True)
        | dict(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2)
        | dict(moe_intermediate_size=32, n_shared_experts=2, routed_scaling_factor=1.5, norm_topk_prob=True),
    ),
    "gptoss": (
        "gpt-oss",
        RMS
        | dict(model_type="gpt_oss", head_dim=32, attention_bias=True, sliding_window=8)
        | dict(num_local_experts=4, num_experts_per_tok=2, rope_theta=GPT_OSS_THETA)
        | dict(rope_scaling=GPT_OSS_YARN | dict(beta_fast=32.0, beta_slow=1.0)),
    ),
}
FAMILIES |= MIXTURES
# Text halves of models of images and text, by the wrapper's model_type: llama.cpp's architecture, the family that
# computes the same on text, further attributes, and the rotary pairs that turn by time, height and width. With these
# numbers llama.cpp turns all of Qwen3-VL's interleaved pairs. llama-cpp-python 0.3.36 does not read qwen2vl's epsilon,
# and takes 0.
TEXT_HALVES: dict[str, tuple[str, str, dict[str, Any], list[int]]] = {
    "qwen2_vl": ("qwen2vl", "qwen2", dict(rms_norm_eps=1e-9), [2, 3, 3]),
    "qwen2_5_vl": ("qwen2vl", "qwen2", dict(rms_norm_eps=1e-9, tie_word_embeddings=True), [2, 3, 3]),
    "qwen3_vl": ("qwen3vl", "qwen3", {}, [22, 21, 21]),
    "qwen3_vl_moe": ("qwen3vlmoe", "qwen3moe", {}, [6, 5, 5]),
    "glm4v": ("glm4", "glm4", dict(partial_rotary_factor=0.5), [1, 1, 2]),
    "glm4v_moe": ("glm4moe", "glm4moe", dict(use_qk_norm=False), [2, 3, 3]),
}
DEEPSTACK = ("qwen3vl", "qwen3vlmoe")  # their first layers add features of images
ROTARY = ("llama", "smollm3", "granite", "mistral3")
ONE_MORE = ("gemma", "gemma2", "gemma3")
WITHOUT_ROTATED = (
    "qwen2vl",
    *DEEPSTACK,
    "qwen2",
    "qwen3",
    "olmo2",
    "exaone4",
    "seed_oss",
    "qwen2moe",
    "qwen3moe",
    "olmoe",
    *ONE_MORE,
)


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """f32 values of every tensor that a checkpoint of this config holds, by Hugging Face's name."""
    features, rng = model_config(config), np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: CausalLM(features, WeightFormat(quant_type=None, dtype="float32")))
    shapes = {name: slot.shape for slot in slots_of(model) for name in slot.names}
    drawn = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in sorted(shapes.items())}
    return {name: drawn[name] for name in shapes}  # experts of one projection behind each other, as a writer has them


def with_images(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config of a model of images and text, config of the text model that computes the same on text)."""
    _, family, changes, sections = TEXT_HALVES[kind]
    text = FAMILIES[family][1] | changes
    rope = {"rope_type": "default", "mrope_section": sections}
    half = text | {"model_type": f"{kind}_text", "rope_scaling": rope}
    whole = {"model_type": kind, "text_config": half, "tie_word_embeddings": text.get("tie_word_embeddings", False)}
    return whole, text


def write_family(
    path: Path,
    architecture: str,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    sections: list[int] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
) -> Path:
    """The file that the converter would make; with `sections`, of the text half of a model of images and text.

    Args:
      kinds: types of some tensors, by their names in the file; others are in f32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, architecture, config)
    if sections is not None:
        writer.add_rope_dimension_sections([*sections, 0][:4])
        if architecture in DEEPSTACK:
            writer.add_num_deepstack_layers(3)
    add_vocabulary(writer)
    writer.add_pad_token_id(0)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, values in stacked_experts(tensors).items():
        name = name.removesuffix("_correction_bias") + "_correction.bias" if name.endswith("_bias") else name
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        found = f"{found}.weight" if name.endswith(".sinks") else found
        values = converted(architecture, config, name, values)
        if sections is not None and architecture == "glm4":
            values = rotary_halves(config, name, values)
        kind = kinds.get(found, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(found, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    if scaling := config.get("rope_scaling"):
        _add_scaling(writer, config, scaling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stacked_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins the matrices of a layer's experts, as the converter does."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\.(\d+)\.", item[0])]):
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(values)
    return {name: np.stack(each) if ".experts." in name else each[0] for name, each in found.items()}


def _add_sizes(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if architecture != "gptneox":
        writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    part = config.get("partial_rotary_factor", config.get("rotary_pct", 0.5 if architecture == "glm4" else 1.0))
    if architecture not in WITHOUT_ROTATED:
        writer.add_rope_dimension_count(int(head_dim * part))
    for name, add in _optional(writer).items():
        if config.get(name) is not None:
            add(config[name])
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if architecture == "glm4moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config.get("sliding_window") and architecture in ("olmo2", "exaone4"):
        types = config.get("layer_types") or [(layer + 1) % 4 for layer in range(config["num_hidden_layers"])]
        writer.add_sliding_window_pattern([kind not in ("full_attention", 0) for kind in types])
    if architecture == "phi3" and "sliding_window" not in config:
        writer.add_sliding_window(0)


def _optional(writer: gguf.GGUFWriter) -> dict[str, Callable[[Any], None]]:
    """The methods that write the keys of attributes that a config may have."""
    return {
        "rms_norm_eps": writer.add_layer_norm_rms_eps,
        "layer_norm_eps": writer.add_layer_norm_eps,
        "rope_theta": writer.add_rope_freq_base,
        "sliding_window": writer.add_sliding_window,
        "logit_scale": writer.add_logit_scale,
        "logits_scaling": writer.add_logit_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "attention_multiplier": writer.add_attention_scale,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "use_parallel_residual": writer.add_parallel_residual,
        "original_max_position_embeddings": writer.add_rope_scaling_orig_ctx_len,
        "num_experts": writer.add_expert_count,
        "num_local_experts": writer.add_expert_count,
        "n_routed_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
        "n_shared_experts": writer.add_expert_shared_count,
        "first_k_dense_replace": writer.add_leading_dense_block_count,
        "routed_scaling_factor": writer.add_expert_weights_scale,
        "num_nextn_predict_layers": writer.add_nextn_predict_layers,
    }


def _add_scaling(writer: gguf.GGUFWriter, config: dict[str, Any], scaling: dict[str, Any]) -> None:
    if scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
        return
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        if "attention_factor" in scaling:
            writer.add_rope_scaling_yarn_attn_factor(scaling["attention_factor"])
        if "llama_4_scaling_beta" in scaling:
            writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"])
            writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])
        return
    writer.add_rope_scaling_attn_factors(scaling["attention_factor"])
    writer.add_tensor("rope_factors_long.weight", np.asarray(scaling["long_factor"], np.float32))
    writer.add_tensor("rope_factors_short.weight", np.asarray(scaling["short_factor"], np.float32))


def rotary_halves(config: dict[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """Moves the rows of GLM-4V's queries and keys as the converter does: rotary pairs, once neighbours, are halves."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    by_head = values.reshape(-1, head_dim, *values.shape[1:])
    turned, rest = np.split(by_head, [int(head_dim * config["partial_rotary_factor"])], axis=1)
    return np.concatenate([turned[:, ::2], turned[:, 1::2], rest], axis=1).reshape(values.shape)


def converted(architecture: str, config: dict[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """Applies the converter's change to a tensor, given by Hugging Face's name."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if "shared_expert_gate" in name:
        return values[0]
    if architecture in ROTARY and ".q_proj." in name:
        return permute_rows(values, heads)
    if architecture in ROTARY and ".k_proj." in name:
        return permute_rows(values, kv_heads)
    if architecture in ONE_MORE and name.endswith("norm.weight"):
        return values + 1
    if "query_key_value" in name:
        by_head = values.reshape(heads, 3, config["hidden_size"] // heads, *values.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *values.shape[1:]) for part in range(3)])
    return values
