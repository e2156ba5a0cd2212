"""The Qwen2 family: Qwen2 and Qwen2.5, dense models. A Llama whose q, k and v projections always add a bias."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf

MODEL_TYPES = ("qwen2",)

ONLY = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False}
# What only says where a window would begin, were there one.
OF_WINDOWS = ("sliding_window", "max_window_layers")


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The features of a Hugging Face config of this family; refuses, all at once, what it does not know."""
    attributes = Attributes(config)
    attributes.require_only(ONLY)
    attributes.ignore(OF_WINDOWS)
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        attributes.refuse(f"layer_types with {sorted(kinds - {'full_attention'})} are not supported")
    attributes.ignore(["layer_types"])
    # What transformers takes where a config leaves it out.
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    model = decoder_from_hf(attributes, defaults, qkv_bias=True, o_bias=False, mlp_bias=False)
    attributes.finish()
    return model
