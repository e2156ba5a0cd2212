"""Model families as data: a Hugging Face config in, the decoder's features out."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import llama, qwen2

FAMILIES = {model_type: family for family in (llama, qwen2) for model_type in family.MODEL_TYPES}


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The features of the model that a Hugging Face config describes; its `model_type` chooses the family.

    Raises:
      ValueError: an unknown model_type, or attributes that the family does not have, all at once.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported: known are {sorted(FAMILIES)}")
    return FAMILIES[model_type].from_hf(config)
