"""SmolLM3: a Llama in which every fourth layer has no rotation; these layers may have a sliding window."""

import dataclasses
import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import FULL, SLIDING, layer_types, rope_from_hf, windows_of

MODEL_TYPES = ("smollm3",)

ONLY = {"hidden_act": "silu"}
UNUSED = ("pretraining_tp", "max_window_layers")  # in its published config, but transformers reads neither
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    bias, mlp_bias = attributes.boolean("attention_bias", False), attributes.boolean("mlp_bias", False)
    layers, interval = attributes.integer("num_hidden_layers"), attributes.integer("no_rope_layer_interval", 4) or 1
    default = [int((layer + 1) % interval != 0) for layer in range(layers)]
    rotates = [bool(flag) for flag in attributes.by_layer("no_rope_layers", layers, default, (0, 1))]
    rope = functools.partial(rope_from_hf, attributes, theta=2e6)
    features = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": mlp_bias, "windows": _windows(attributes, rotates)}
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, **features)
    attributes.finish()
    ropes = () if all(rotates) else tuple(model.rope if rotated else None for rotated in rotates)
    return dataclasses.replace(model, ropes=ropes)


def _windows(attributes: Attributes, rotates: list[bool]) -> tuple[int | None, ...]:
    window, used = attributes.window("sliding_window", None), attributes.boolean("use_sliding_window", False)
    slides = [used and window is not None and not turned for turned in rotates]
    types = layer_types(attributes, [SLIDING if s else FULL for s in slides])
    return windows_of(attributes, types, window) if used else ()
