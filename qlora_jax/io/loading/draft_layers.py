"""Layers after a model's last one that predict further tokens, as in GLM-4.5; they are not loaded.

transformers leaves them out, too.
"""

import re
from collections.abc import Mapping

from qlora_jax.untrusted_json import JsonObject

ANNOUNCED = "num_nextn_predict_layers"  # the attribute of a config that has their number
MODEL_TYPES = ("glm4_moe",)
LAYER = re.compile(r"(?:model\.layers|blk)\.(\d{1,9})\.")  # in safetensors and GGUF files


def draft_layers(config: JsonObject) -> range:
    """Returns the numbers of these layers, which a config announces."""
    layers, more = config.get("num_hidden_layers"), config.get(ANNOUNCED)
    if config.get("model_type") not in MODEL_TYPES or not isinstance(layers, int) or not isinstance(more, int):
        return range(0)
    return range(layers, layers + more)


def split_drafts[T](tensors: Mapping[str, T], layers: range) -> tuple[dict[str, T], dict[str, T]]:
    """Returns (the other tensors, those of `layers`), by their names in files."""
    drafts = {name: each for name, each in tensors.items() if (match := LAYER.match(name)) and int(match[1]) in layers}
    return {name: each for name, each in tensors.items() if name not in drafts}, drafts


def without_drafts(config: JsonObject) -> JsonObject:
    """Returns the config of the model without these layers."""
    return {**config, ANNOUNCED: 0} if draft_layers(config) else config
