"""The Llama family: Llama 1, 2 and 3, SmolLM2, and other models with `model_type` llama."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.rope_config import rope_from_hf
from qlora_jax.nn.rope import Rope
from qlora_jax.untrusted_json import JsonObject

MODEL_TYPES = ("llama",)

# Attributes that the decoder does not implement, with the only value that is accepted.
ONLY = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "layer_types": None,
    "sliding_window": None,
}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias, mlp_bias = attributes.boolean("attention_bias", False), attributes.boolean("mlp_bias", False)
    defaults = {"max_position_embeddings": 2048}
    model = decoder_from_hf(attributes, defaults, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
    attributes.finish()
    return model


def decoder_from_hf(
    attributes: Attributes,
    defaults: JsonObject,
    *,
    eps: str = "rms_norm_eps",
    rope: Callable[[int, int], Rope] | None = None,
    **features: Any,
) -> ModelConfig:
    """Reads the attributes that configs of all families share.

    Args:
      defaults: transformers' defaults for attributes that are missing or null.
      eps: name of the norms' epsilon.
      rope: (head_dim, max_positions) -> Rope; None: `rope_from_hf`.
      features: further fields of ModelConfig.
    """
    heads, width = attributes.integer("num_attention_heads"), attributes.integer("hidden_size")
    usual = width // heads if heads and width else 2  # 2: one of them is wrong, and that is reported already
    head_dim = attributes.integer("head_dim", defaults.get("head_dim", usual))
    max_positions = attributes.integer("max_position_embeddings", defaults["max_position_embeddings"])
    model = ModelConfig(
        vocab_size=attributes.integer("vocab_size"),
        embed_dim=width,
        num_layers=attributes.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=attributes.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        head_dim=head_dim,
        mlp_dim=attributes.integer("intermediate_size"),
        norm_eps=attributes.number(eps, defaults.get(eps, 1e-6)),
        rope=rope(head_dim, max_positions) if rope else rope_from_hf(attributes, head_dim, max_positions),
        tie_embeddings=attributes.boolean("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
        max_positions=max_positions,
        **features,
    )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        attributes.refuse(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={model.num_kv_heads}")
    if model.rope.dim % 2:
        attributes.refuse(f"found {model.rope.dim} rotated of {head_dim} dimensions per head, expected an even number")
    return model
