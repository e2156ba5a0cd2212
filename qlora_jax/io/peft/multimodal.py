"""Adapters of text halves, in the names that PEFT finds in the whole multimodal model."""

import dataclasses
import re
from collections.abc import Sequence

from qlora_jax.io.hf.multimodal import module_name
from qlora_jax.methods.peft_form import PREFIX, PeftForm
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.multimodal import OTHER_MODULES, WRAPPED, is_text_half
from qlora_jax.untrusted_json import JsonObject


def text_half_only(config: JsonObject, form: PeftForm, model: ModelConfig) -> JsonObject:
    """Returns adapter settings that leave vision tower and projector alone, although their modules have like names.

    PEFT has `exclude_modules` for that. Where a form does not read it, target_modules names the text half.
    """
    if not is_text_half(model):
        return config
    if form.reads_exclude_modules:
        return config | {"exclude_modules": OTHER_MODULES}
    ends = "|".join(map(re.escape, config["target_modules"]))
    return config | {"target_modules": rf"{re.escape(WRAPPED)}\..*\.({ends})"}


def with_current_names(entries: Sequence[TensorEntry], model: ModelConfig) -> list[TensorEntry]:
    """Returns an adapter's tensors under the names of today's classes of multimodal models.

    Older versions of transformers had the text half at `language_model.model`.
    """
    if not is_text_half(model):
        return list(entries)
    return [dataclasses.replace(each, name=_current(each.name)) for each in entries]


def _current(name: str) -> str:
    return PREFIX + module_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name
