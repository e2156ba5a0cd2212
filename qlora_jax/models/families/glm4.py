"""GLM-4-0414: four norms per layer, rotary pairs that are neighbours, and one projection for gate and up."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import Part, rope_from_hf

MODEL_TYPES = ("glm4",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
}
FEATURES = {
    "layout": "both",
    "rope_interleaved": True,
    "fused_gate_up": True,
    "names": (  # in this order: the second gets the name that the first gives up
        ("post_attention_layernorm", "post_self_attn_layernorm"),
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        ("post_feedforward_layernorm", "post_mlp_layernorm"),
    ),
}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", True)
    rope = functools.partial(rope_from_hf, attributes, partial=attributes.number("partial_rotary_factor", 0.5, Part))
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, qkv_bias=bias, **FEATURES)
    attributes.finish()
    return model
