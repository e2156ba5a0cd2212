"""OLMo 3: OLMo 2 with sliding windows in three of four layers; only layers without a window scale their rotation."""

import dataclasses
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import periodic_windows, ropes_by_window, ropes_of_windows

MODEL_TYPES = ("olmo3",)

ONLY = {"hidden_act": "silu", "clip_qkv": None}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
THETA = 5e5
# transformers 5 gives a top-level rope_theta only to the layers without a window, earlier releases to all layers.
AMBIGUOUS_THETA = (
    "rope_theta={}: it would depend on transformers' release which layers use it. Give rope_parameters with "
    "full_attention and sliding_attention instead"
)


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", False)
    windows = periodic_windows(attributes, period=4)
    whole, local = ropes_by_window(attributes, theta=THETA, local_theta=THETA)
    if config.get("rope_parameters") is None and config.get("rope_theta") not in (None, THETA):
        attributes.refuse(AMBIGUOUS_THETA.format(config["rope_theta"]))
    features = {"qkv_bias": bias, "o_bias": bias, "layout": "post", "qk_norm": "width", "windows": windows}
    model = decoder_from_hf(attributes, DEFAULTS, rope=whole, **features)
    attributes.finish()
    ropes = ropes_of_windows(model, local)
    return dataclasses.replace(model, ropes=() if set(ropes) == {model.rope} else ropes)
