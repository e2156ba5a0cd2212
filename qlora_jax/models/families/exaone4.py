"""EXAONE 4: norms after attention and MLP, and of each head's queries and keys.

Its larger model has sliding windows in three of four layers; the layers without a window then have no rotation.
"""

import dataclasses
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import FULL, SLIDING, layer_types, windows_of

MODEL_TYPES = ("exaone4",)

# Published configs have the second, which transformers does not read: its norms are those of True.
ONLY = {"hidden_act": "silu", "reorder_qk_norm": True}
DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    window = attributes.window("sliding_window", 4096)
    types = layer_types(attributes, _default_types(attributes, window, config.get("layer_types") is not None))
    features = {"layout": "post", "qk_norm": "head", "windows": windows_of(attributes, types, window)}
    model = decoder_from_hf(attributes, DEFAULTS, **features)
    attributes.finish()
    rotates = [window is None or kind == SLIDING for kind in types]
    ropes = () if all(rotates) else tuple(model.rope if rotated else None for rotated in rotates)
    return dataclasses.replace(model, ropes=ropes)


def _default_types(attributes: Attributes, window: int | None, given: bool) -> list[str]:
    """Returns the kinds of layers in a config without `layer_types`: every `sliding_window_pattern`-th has no window.

    Published configs also have a pattern in letters, which transformers does not read.
    """
    layers = attributes.integer("num_hidden_layers")
    if window is None or given:
        attributes.ignore(["sliding_window_pattern"])
        return [FULL] * layers
    period = attributes.integer("sliding_window_pattern", 4) or 1
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
