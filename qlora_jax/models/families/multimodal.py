"""Finds the text half of a multimodal model: a decoder of one of the families, inside a wrapper that also sees images.

A wrapper's config has the decoder's config in `text_config`. Its modules are those of the decoder under another prefix,
next to vision tower and projector.
"""

import dataclasses
import re
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.untrusted_json import MetadataError, shorten

TEXT_CONFIG, TIED = "text_config", "tie_word_embeddings"
ALONE, WRAPPED = "model", "model.language_model"  # names of the decoder's module
HEAD = "lm_head"
LOGIT_FEATURES = ("head_softcap", "logit_scale")
# Parts of a wrapper that text does not pass through. Published checkpoints have them with and without `model.`.
OTHER_PARTS = ("vision_tower", "multi_modal_projector", "image_newline", "visual")
OTHER_MODULES = rf"{ALONE}\.({'|'.join(map(re.escape, OTHER_PARTS))})\..*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """transformers' defaults of one kind of multimodal model.

    Attributes:
      text_type: model_type of the text half if `text_config` has none.
      tied: True if the head is the embedding unless the config says otherwise.
      flat: True if published configs have the text half's attributes next to the wrapper's, without `text_config`.
    """

    text_type: str
    tied: bool = False
    flat: bool = False


WRAPPERS = {
    "gemma3": Wrapper(text_type="gemma3_text", tied=True),
    "mistral3": Wrapper(text_type="mistral", tied=True),
    "llava": Wrapper(text_type="llama"),
    "llava_next": Wrapper(text_type="llama"),
    "llava_onevision": Wrapper(text_type="qwen2"),
    "vipllava": Wrapper(text_type="llama"),
    "internvl": Wrapper(text_type="qwen2", tied=True),
    "qwen2_vl": Wrapper(text_type="qwen2_vl_text", flat=True),
    "qwen2_5_vl": Wrapper(text_type="qwen2_5_vl_text", flat=True),
    "qwen3_vl": Wrapper(text_type="qwen3_vl_text"),
    "qwen3_vl_moe": Wrapper(text_type="qwen3_vl_moe_text"),
    "glm4v": Wrapper(text_type="glm4v_text"),
    "glm4v_moe": Wrapper(text_type="glm4v_moe_text"),
}
# Attributes of a wrapper, which a flat config has next to those of the text half.
OF_WRAPPER = ("architectures", "model_type", "transformers_version", "vision_config", TIED)

SIZE_NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# transformers' defaults of sizes, which a `text_config` may omit.
SIZES = {
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "llama": (32000, 4096, 11008, 32, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen3": (151936, 4096, 22016, 32, 32),
    "mixtral": (32000, 4096, 14336, 32, 32),
    "qwen3_moe": (151936, 2048, 6144, 24, 32),
    "gpt_oss": (201088, 2880, 2880, 36, 64),
    "qwen2_vl_text": (152064, 8192, 29568, 80, 64),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64),
    "qwen3_vl_text": (151936, 4096, 22016, 32, 32),
    "qwen3_vl_moe_text": (151936, 2048, 5632, 24, 16),
    "glm4v_text": (151552, 4096, 13696, 40, 32),
    "glm4v_moe_text": (151424, 4096, 10944, 46, 96),
}


def wrapper_of(config: Mapping[str, object]) -> Wrapper | None:
    """Returns the kind of multimodal model that a config describes; None for a text-only model."""
    kind = config.get("model_type")
    return WRAPPERS.get(kind) if isinstance(kind, str) else None


def text_config(config: Mapping[str, object], name: str = "config.json") -> Mapping[str, object]:
    """Returns the config of the text half, with the sizes that it omits; `config` itself for a text-only model.

    Args:
      name: the file of the config, for messages.

    Raises:
      MetadataError: the config of a multimodal model has no object `text_config`, or its `model_type` is not text.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    stated = _stated(config, name)
    kind = stated.get("model_type") or wrapper.text_type
    if not isinstance(kind, str):
        raise MetadataError(f"{name}: {TEXT_CONFIG}.model_type: not text (found {shorten(kind)}). Download it again.")
    sizes = dict(zip(SIZE_NAMES, SIZES.get(kind, ()), strict=False))
    return {**sizes, **stated, "model_type": kind, TIED: ties_embeddings(config, name)}


def ties_embeddings(config: Mapping[str, object], name: str = "config.json") -> object:
    """Returns what the config of a multimodal model says about its head: True if it is the embedding.

    transformers reads the wrapper's attribute. Some published configs have it only in `text_config`.
    """
    found = [config.get(TIED), _stated(config, name).get(TIED), _tied_by_default(config)]
    return next(value for value in found if value is not None)


def ties_without_head(config: Mapping[str, object]) -> object:
    """Returns True if transformers ties the head to the embedding of a checkpoint that has no head."""
    said = config.get(TIED)
    return _stated(config).get(TIED) is True or (_tied_by_default(config) if said is None else said)


def _tied_by_default(config: Mapping[str, object]) -> bool:
    wrapper = wrapper_of(config)
    return wrapper is not None and wrapper.tied


def with_text_attributes(config: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Returns a config whose text half has these attributes."""
    if not changes:
        return dict(config)
    if TEXT_CONFIG not in config:
        return {**config, **changes}
    return {**config, TEXT_CONFIG: {**_stated(config), **changes}}


def in_wrapper(features: ModelConfig, kind: object, name: str) -> ModelConfig:
    """Returns the features of a decoder whose modules have their names inside a wrapper.

    Raises:
      ValueError: the family's module has another name than the one that a wrapper's prefix replaces; or its logits
        are capped or scaled, which wrappers in transformers leave out.
    """
    if not features.hugging_face_name(f"{ALONE}.layers").startswith(f"{ALONE}."):
        raise ValueError(
            f"{name}: {TEXT_CONFIG}: model_type={shorten(kind)} is not supported inside a multimodal model. Use the "
            "text model alone."
        )
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    if changed := [each for each in LOGIT_FEATURES if getattr(features, each) != defaults[each]]:
        raise ValueError(
            f"{name}: {TEXT_CONFIG}: model_type={shorten(kind)} changes the logits ({', '.join(changed)}), which "
            "transformers does in the text model alone, not inside a multimodal model. Use the text model alone."
        )
    return dataclasses.replace(features, names=(*features.names, (ALONE, WRAPPED)))


def text_only(features: ModelConfig) -> ModelConfig:
    """Returns the features of a decoder whose modules have their names outside a wrapper."""
    return dataclasses.replace(features, names=tuple(pair for pair in features.names if pair != (ALONE, WRAPPED)))


def is_text_half(features: ModelConfig) -> bool:
    """Returns True if the decoder's modules have their names inside a wrapper."""
    return (ALONE, WRAPPED) in features.names


def text_only_name(name: str) -> str:
    """Maps "model.language_model.layers.0.mlp" to "model.layers.0.mlp", its name in the text model alone."""
    return name.replace(f"{WRAPPED}.", f"{ALONE}.", 1) if name.startswith(f"{WRAPPED}.") else name


def _stated(config: Mapping[str, object], name: str = "config.json") -> Mapping[str, object]:
    wrapper, found = wrapper_of(config), config.get(TEXT_CONFIG)
    if found is None and wrapper is not None and wrapper.flat:
        return {key: value for key, value in config.items() if key not in OF_WRAPPER}
    if not isinstance(found, dict):
        raise MetadataError(
            f"{name}: {TEXT_CONFIG}: not an object (found {shorten(found)}, expected the config of the text half). "
            "Download it again."
        )
    return found
