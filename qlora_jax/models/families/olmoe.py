"""OLMoE: experts in every layer, and norms over all queries and over all keys, which may be clipped."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, experts_from_hf
from qlora_jax.models.families.llama import decoder_from_hf

MODEL_TYPES = ("olmoe",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    experts = experts_from_hf(
        attributes,
        tuple(range(attributes.integer("num_hidden_layers"))),
        attributes.integer("num_experts", DEFAULT_COUNTS["olmoe"]),
        8,
        mlp_dim=attributes.integer("intermediate_size"),
        normalize=attributes.boolean("norm_topk_prob", False),
    )
    bias = attributes.boolean("attention_bias", False)
    features = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "width", "experts": experts}
    model = decoder_from_hf(attributes, DEFAULTS, clip_qkv=attributes.optional("clip_qkv", None), **features)
    attributes.finish()
    return model
