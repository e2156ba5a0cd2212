"""Seed-OSS: a Llama with biases of q, k and v, and with heads whose joint width is not that of the model."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf

MODEL_TYPES = ("seed_oss",)

ONLY = {"hidden_act": "silu"}
UNUSED = ("residual_dropout", "pretraining_tp")  # dropout of pretraining; transformers does not read the second
DEFAULTS = {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    model = decoder_from_hf(
        attributes,
        DEFAULTS,
        qkv_bias=attributes.boolean("attention_bias", True),
        o_bias=attributes.boolean("attention_out_bias", False),
        mlp_bias=attributes.boolean("mlp_bias", False),
    )
    attributes.finish()
    return model
