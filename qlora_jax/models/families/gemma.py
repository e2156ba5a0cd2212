"""The text models of the Gemma family: norms of 1 + weight, a scaled embedding, GeGLU.

Gemma 2 and 3 also normalize the results of attention and MLP, and most of their layers have a sliding window.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypedDict

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import Base, periodic_windows, ropes_by_window, ropes_of_windows

ONLY = {"use_bidirectional_attention": False}
SHARED = {"tie_word_embeddings": True, "head_dim": 256}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    bias = attributes.boolean("attention_bias", False)
    model = GENERATIONS[str(config["model_type"])](attributes)
    attributes.finish()
    return dataclasses.replace(
        model, qkv_bias=bias, o_bias=bias, norm_offset=1.0, embed_scale=math.sqrt(model.embed_dim)
    )


def _gemma1(attributes: Attributes) -> ModelConfig:
    # Published configs have "gelu" but mean the approximation, which transformers uses in its place.
    act = {"gelu": "gelu_tanh"}.get(given := attributes.activation("hidden_act", "gelu_pytorch_tanh"), given)
    attributes.ignore(["hidden_activation"])
    defaults = SHARED | {"max_position_embeddings": 8192, "num_key_value_heads": 16}
    return decoder_from_hf(attributes, defaults, activation=act)


def _gemma2(attributes: Attributes) -> ModelConfig:
    features = _later(attributes, attention_softcap=50.0, head_softcap=30.0)
    windows = periodic_windows(attributes, period=2)
    defaults = SHARED | {"max_position_embeddings": 8192, "num_key_value_heads": 4}
    return decoder_from_hf(attributes, defaults, windows=windows, **features)


def _gemma3(attributes: Attributes) -> ModelConfig:
    attributes.require_only({"attn_logit_softcapping": None})  # transformers reads it and ignores it
    features = _later(attributes, attention_softcap=None, head_softcap=None)
    pattern = attributes.integer("sliding_window_pattern", attributes.integer("_sliding_window_pattern", 6))
    windows = periodic_windows(attributes, pattern or 1)
    local_theta = attributes.number("rope_local_base_freq", LOCAL_THETA, Base)
    whole, local = ropes_by_window(attributes, theta=GLOBAL_THETA, local_theta=local_theta)
    defaults = SHARED | {"max_position_embeddings": 131072, "num_key_value_heads": 4}
    model = decoder_from_hf(attributes, defaults, rope=whole, qk_norm="head", windows=windows, **features)
    return dataclasses.replace(model, ropes=ropes_of_windows(model, local))


GENERATIONS = {"gemma": _gemma1, "gemma2": _gemma2, "gemma3_text": _gemma3}
MODEL_TYPES = tuple(GENERATIONS)


class _Later(TypedDict):
    layout: str
    activation: str
    query_scale: float
    attention_softcap: float | None
    head_softcap: float | None


def _later(attributes: Attributes, *, attention_softcap: float | None, head_softcap: float | None) -> _Later:
    """Returns the features that Gemma 2 and 3 share; the softcaps are defaults."""
    attributes.ignore(["hidden_act", "sliding_window_size"])  # older names, which newer ones override
    return {
        "layout": "both",
        "activation": attributes.activation("hidden_activation", "gelu_pytorch_tanh"),
        "query_scale": attributes.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": attributes.optional("attn_logit_softcapping", attention_softcap),
        "head_softcap": attributes.optional("final_logit_softcapping", head_softcap),
    }
