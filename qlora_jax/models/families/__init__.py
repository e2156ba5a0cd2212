"""Maps Hugging Face configs to the decoder's features, one module per family (docs/families.md: how to add one)."""

from collections.abc import Mapping
from typing import TypedDict

from qlora_jax.metadata import check_value, shorten
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import (
    cohere2,
    exaone4,
    gemma,
    glm4,
    glm4_moe,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from qlora_jax.models.families.expert_attributes import COUNTS
from qlora_jax.models.families.multimodal import TEXT_CONFIG, WRAPPERS, in_wrapper, text_config, wrapper_of

MODULES = (
    *(llama, mistral, ministral3, qwen2, qwen3, smollm3, olmo2, olmo3, gemma, phi3, phi, gpt_neox),
    *(granite, seed_oss, exaone4, glm4, cohere2),
    *(mixtral, qwen2_moe, qwen3_moe, olmoe, glm4_moe, gpt_oss),
)
FAMILIES = {model_type: family for family in MODULES for model_type in family.MODEL_TYPES}


class ModelKind(TypedDict, total=False):
    """The attributes that choose a family."""

    model_type: str | None


def model_config(config: Mapping[str, object], name: str = "config.json") -> ModelConfig:
    """Maps a Hugging Face config to features, by the family of its `model_type`.

    The config of a multimodal model gives the features of its text half.

    Args:
      name: the file of the config, for messages.

    Raises:
      ValueError: an unknown model_type, or all attributes that the family does not support.
    """
    check_value(config, ModelKind, name)
    if wrapper_of(config) is None:
        return _text_model(config, name)
    text = text_config(config, name)
    return in_wrapper(_text_model(text, f"{name}: {TEXT_CONFIG}"), text["model_type"], name)


def _text_model(config: Mapping[str, object], name: str) -> ModelConfig:
    model_type = check_value(config, ModelKind, name).get("model_type")
    if model_type not in FAMILIES:
        known = f"known are {sorted(FAMILIES)}"
        if TEXT_CONFIG in config:
            known = f"of models of images and text, known are {sorted(WRAPPERS)}"
        experts = [f"{key}={shorten(config[key])}" for key in COUNTS if config.get(key)]
        mixture = f" (a mixture of experts, {', '.join(experts)})" if experts else ""
        raise ValueError(f"{name}: model_type={shorten(model_type)} is not supported{mixture}: {known}")
    return FAMILIES[model_type].from_hf(config, name)
