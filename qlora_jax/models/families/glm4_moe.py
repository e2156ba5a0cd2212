"""GLM-4.5 and 4.6: dense layers first, then layers with a shared expert and experts chosen by biased sigmoids."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, NotNegative, experts_from_hf
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import Part, rope_from_hf
from qlora_jax.nn.router import SIGMOID

MODEL_TYPES = ("glm4_moe",)

ONLY = {"hidden_act": "silu"}
UNUSED = ("num_nextn_predict_layers", "num_mtp_layers")  # layers that draft further tokens are left out
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    layers, dense = attributes.integer("num_hidden_layers"), attributes.number("first_k_dense_replace", 1, NotNegative)
    mlp_dim = attributes.integer("moe_intermediate_size", 1408)
    experts = experts_from_hf(
        attributes,
        tuple(layer for layer in range(layers) if layer >= dense),
        attributes.integer("n_routed_experts", DEFAULT_COUNTS["glm4_moe"]),
        8,
        mlp_dim=mlp_dim,
        score=SIGMOID,
        normalize=attributes.boolean("norm_topk_prob", True),
        scale=attributes.number("routed_scaling_factor", 1.0),
        groups=attributes.integer("n_group", 1),
        groups_per_token=attributes.integer("topk_group", 1),
        selection_bias=True,
        shared_mlp_dim=mlp_dim * attributes.integer("n_shared_experts", 1),
    )
    features = {
        "qkv_bias": attributes.boolean("attention_bias", False),
        "qk_norm": "head" if attributes.boolean("use_qk_norm", False) else None,
        "experts": experts,
    }
    partial = attributes.number("partial_rotary_factor", 0.5, Part)
    rope = functools.partial(rope_from_hf, attributes, partial=partial)
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, **features)
    attributes.finish()
    return model
