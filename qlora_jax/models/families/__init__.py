"""Maps Hugging Face configs to the decoder's features, one module per family (docs/families.md: how to add one)."""

from collections.abc import Mapping
from types import ModuleType
from typing import TypedDict

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
    mrope,
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
from qlora_jax.models.families.attributes import COUNTS
from qlora_jax.models.families.multimodal import TEXT_CONFIG, WRAPPERS, in_wrapper, text_config, wrapper_of
from qlora_jax.models.families.unsupported import REASONS
from qlora_jax.untrusted_json import check_value, shorten

MODULES = (
    *(llama, mistral, ministral3, qwen2, qwen3, smollm3, olmo2, olmo3, gemma, phi3, phi, gpt_neox),
    *(granite, seed_oss, exaone4, glm4, cohere2),
    *(mixtral, qwen2_moe, qwen3_moe, olmoe, glm4_moe, gpt_oss),
)
FAMILIES = {model_type: family for family in MODULES for model_type in family.MODEL_TYPES}
TEXT_HALVES = FAMILIES | dict.fromkeys(mrope.MODEL_TYPES, mrope)


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
        return _family_of(config, name, FAMILIES).from_hf(config, name)
    text, name_of_text = text_config(config, name), f"{name}: {TEXT_CONFIG}"
    family = _family_of(text, name_of_text, TEXT_HALVES)
    return in_wrapper(family.from_hf(text, name_of_text), text["model_type"], name)


def _family_of(config: Mapping[str, object], name: str, families: Mapping[str, ModuleType]) -> ModuleType:
    model_type = check_value(config, ModelKind, name).get("model_type") or ""
    if model_type in families:
        return families[model_type]
    reason = f", because {REASONS[model_type]}" if model_type in REASONS else ""
    known = f"known are {sorted(families)}"
    if TEXT_CONFIG in config:
        known = f"of models of images and text, known are {sorted(WRAPPERS)}"
    experts = [f"{key}={shorten(config[key])}" for key in COUNTS if config.get(key)]
    mixture = f" (a mixture of experts, {', '.join(experts)})" if experts else ""
    raise ValueError(
        f"{name}: model_type={shorten(config.get('model_type'))} is not supported{mixture}{reason}: {known}"
    )
