"""Granite 3, dense models: a Llama that scales its embedding, scores, residuals and logits."""

import dataclasses
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf

MODEL_TYPES = ("granite",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 2048}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias, mlp_bias = attributes.boolean("attention_bias", False), attributes.boolean("mlp_bias", False)
    scales = {
        "embed_scale": attributes.number("embedding_multiplier", 1.0),
        "residual_scale": attributes.number("residual_multiplier", 1.0),
        "logit_scale": 1 / attributes.number("logits_scaling", 1.0),
    }
    used = {name: scale for name, scale in scales.items() if scale != 1.0}
    query_scale = attributes.number("attention_multiplier", 1.0)
    model = decoder_from_hf(
        attributes, DEFAULTS, query_scale=query_scale, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias
    )
    attributes.finish()
    return dataclasses.replace(model, **used)
