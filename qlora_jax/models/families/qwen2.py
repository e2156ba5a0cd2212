"""The Qwen2 family: Qwen2 and Qwen2.5, dense models. A Llama whose q, k and v projections always add a bias."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes, NotNegative
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import FULL, SLIDING, layer_types, windows_of

MODEL_TYPES = ("qwen2",)

ONLY = {"hidden_act": "silu", "use_mrope": False}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    model = decoder_from_hf(attributes, DEFAULTS, qkv_bias=True, windows=late_windows(attributes))
    attributes.finish()
    return model


def late_windows(attributes: Attributes) -> tuple[int | None, ...]:
    """Returns the windows of Qwen models: from layer `max_window_layers` on, if `use_sliding_window`."""
    layers, window = attributes.integer("num_hidden_layers"), attributes.window("sliding_window", 4096)
    first = attributes.number("max_window_layers", 28, NotNegative)
    if not attributes.boolean("use_sliding_window", False):
        window = None
    slides = [window is not None and layer >= first for layer in range(layers)]
    return windows_of(attributes, layer_types(attributes, [SLIDING if s else FULL for s in slides]), window)
