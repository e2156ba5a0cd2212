"""The Qwen3 family, dense models: Qwen2 with normalized queries and keys, and optional biases."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.qwen2 import late_windows

MODEL_TYPES = ("qwen3",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", False)
    features = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head", "windows": late_windows(attributes)}
    model = decoder_from_hf(attributes, DEFAULTS, **features)
    attributes.finish()
    return model
