"""OLMo 2: norms after attention and MLP instead of before, and norms over all queries and over all keys."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf

MODEL_TYPES = ("olmo2",)

ONLY = {"hidden_act": "silu", "clip_qkv": None}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", False)
    model = decoder_from_hf(attributes, DEFAULTS, qkv_bias=bias, o_bias=bias, layout="post", qk_norm="width")
    attributes.finish()
    return model
