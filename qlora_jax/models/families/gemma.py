"""The text models of the Gemma family: norms of 1 + weight, a scaled embedding, GeGLU.

Gemma 2 and 3 also normalize the results of attention and MLP, and most of their layers have a sliding window.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TypedDict

from qlora_jax.metadata import shorten
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import (
    FULL,
    SLIDING,
    Base,
    RopeNumbers,
    layer_types,
    rope_from_hf,
    rope_of,
    windows_of,
)
from qlora_jax.nn.rope import Rope

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
    windows = _windows(attributes, pattern=2)
    defaults = SHARED | {"max_position_embeddings": 8192, "num_key_value_heads": 4}
    return decoder_from_hf(attributes, defaults, windows=windows, **features)


def _gemma3(attributes: Attributes) -> ModelConfig:
    attributes.require_only({"attn_logit_softcapping": None})  # transformers reads it and ignores it
    features = _later(attributes, attention_softcap=None, head_softcap=None)
    pattern = attributes.integer("sliding_window_pattern", attributes.integer("_sliding_window_pattern", 6))
    windows = _windows(attributes, pattern=pattern or 1)
    whole, local = _ropes(attributes)
    defaults = SHARED | {"max_position_embeddings": 131072, "num_key_value_heads": 4}
    model = decoder_from_hf(attributes, defaults, rope=whole, qk_norm="head", windows=windows, **features)
    turned_locally = local(model.head_dim, model.max_positions)
    ropes = tuple(model.rope if window is None else turned_locally for window in windows)
    return dataclasses.replace(model, ropes=ropes)


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


def _windows(attributes: Attributes, pattern: int) -> tuple[int | None, ...]:
    """Returns windows per layer; by default every `pattern`-th layer has none."""
    layers, window = attributes.integer("num_hidden_layers"), attributes.window("sliding_window", 4096)
    types = layer_types(attributes, [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)])
    return windows_of(attributes, types, window)


def _ropes(attributes: Attributes) -> tuple[Callable[[int, int], Rope], Callable[[int, int], Rope]]:
    """Returns the ropes of layers without and with a window.

    A config has them per kind of layer (transformers 5), or as two bases and a scaling of the first.
    """
    base = attributes.number("rope_local_base_freq", LOCAL_THETA, Base)
    given = attributes.mapping("rope_parameters", dict[str, RopeNumbers | None])
    if given is None:
        whole = functools.partial(rope_from_hf, attributes, theta=GLOBAL_THETA)
        return whole, functools.partial(rope_of, attributes, {}, theta=base)
    attributes.require_only({"rope_scaling": None})
    if unknown := given.keys() - {FULL, SLIDING}:
        attributes.refuse(f"rope_parameters: found {shorten(sorted(unknown))}, expected {FULL!r} and {SLIDING!r}")
    numbers = [given.get(kind) or {} for kind in (FULL, SLIDING)]
    thetas = (attributes.number("rope_theta", GLOBAL_THETA, Base), base)
    whole, local = (functools.partial(rope_of, attributes, n, theta=t) for n, t in zip(numbers, thetas, strict=True))
    return whole, local
