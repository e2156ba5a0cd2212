"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3 with experts in its sparse layers."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, experts_from_hf, sparse_layers
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import SLIDING, windows_of

MODEL_TYPES = ("qwen3_moe",)

# Qwen3-Coder has these three, which transformers does not read.
ONLY = {"hidden_act": "silu", "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
UNUSED = ("max_window_layers",)  # transformers does not read it in this family
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 4}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    experts = experts_from_hf(
        attributes,
        sparse_layers(attributes),
        # transformers 5 saves num_experts only under this name.
        attributes.integer("num_experts", attributes.integer("num_local_experts", DEFAULT_COUNTS["qwen3_moe"])),
        8,
        mlp_dim=attributes.integer("moe_intermediate_size", 768),
        normalize=attributes.boolean("norm_topk_prob", False),
    )
    bias = attributes.boolean("attention_bias", False)
    features = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head", "windows": _windows(attributes)}
    model = decoder_from_hf(attributes, DEFAULTS, experts=experts, **features)
    attributes.finish()
    return model


def _windows(attributes: Attributes) -> tuple[int | None, ...]:
    """Returns a window in every layer if `use_sliding_window`."""
    layers, window = attributes.integer("num_hidden_layers"), attributes.window("sliding_window", 4096)
    used = attributes.boolean("use_sliding_window", False) and window is not None
    return windows_of(attributes, [SLIDING] * layers, window) if used else ()
