"""The Mistral family: Mistral 7B, NeMo, Small. A Llama whose layers may have a sliding window."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import SLIDING, windows_of

MODEL_TYPES = ("mistral",)

ONLY = {"hidden_act": "silu", "layer_types": None}
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    window, layers = attributes.window("sliding_window", 4096), attributes.integer("num_hidden_layers")
    windows = windows_of(attributes, [SLIDING] * layers, window) if window else ()
    model = decoder_from_hf(attributes, DEFAULTS, windows=windows)
    attributes.finish()
    return model
