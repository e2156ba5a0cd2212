"""The Qwen3 family, dense models: Qwen2 with normalized queries and keys, and biases only where the config says so."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.qwen2 import late_windows

MODEL_TYPES = ("qwen3",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The features of a Hugging Face config of this family; refuses, all at once, what it does not know."""
    attributes = Attributes(config)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", False)
    features = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head", "windows": late_windows(attributes)}
    model = decoder_from_hf(attributes, DEFAULTS, **features)
    attributes.finish()
    return model
