"""Splits the tensors of a multimodal checkpoint into the text half and the rest, which is not loaded.

The text half gets the names that it has in transformers' class. Files name it in one of three ways, with the same
result: `language_model.model.layers.0` and `language_model.lm_head`, `model.language_model.layers.0` and `lm_head`, or
`model.layers.0` and `lm_head`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.model_source import MultimodalParts, TensorEntry
from qlora_jax.models.families.multimodal import (
    ALONE,
    HEAD,
    OTHER_PARTS,
    TIED,
    WRAPPED,
    ties_embeddings,
    ties_without_head,
    wrapper_of,
)
from qlora_jax.untrusted_json import JsonObject

# (beginning of a name in files, the same in transformers' class).
OLDER_NAMES = (
    (f"language_model.{HEAD}.", f"{HEAD}."),
    ("language_model.model.", f"{WRAPPED}."),
    *((f"{ALONE}.{part}.", f"{WRAPPED}.{part}.") for part in ("embed_tokens", "layers", "norm")),
)
HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{HEAD}.weight", f"{WRAPPED}.embed_tokens.weight"
COMPARED_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextHalf:
    """The text half of a multimodal checkpoint.

    Attributes:
      config: config.json, which says whether the head is the embedding as the files show it.
      tensors: the text half's, and those of unknown parts, by their names in transformers' class.
      rest: the rest of the checkpoint.
    """

    config: JsonObject
    tensors: dict[str, TensorEntry]
    rest: MultimodalParts


def split_multimodal(folder: Path, config: JsonObject, tensors: Mapping[str, TensorEntry]) -> TextHalf | None:
    """Splits the tensors in a folder; returns None for a text-only model.

    Raises:
      ValueError: the files have tensors of the text half under both of their names.
    """
    if wrapper_of(config) is None:
        return None
    others = {name: entry for name, entry in tensors.items() if _is_other(name)}
    found = {name: module_name(name) for name in tensors if name not in others}
    if twice := len(found) - len({*found.values()}):
        first = next(name for name, theirs in found.items() if name != theirs)
        raise ValueError(
            f"{folder}: {twice} tensors are stored twice, under their older and their newer names (such as {first}). "
            "Use an undamaged checkpoint."
        )
    text = {theirs: dataclasses.replace(tensors[name], name=theirs) for name, theirs in found.items()}
    tied = _is_tied(config, text)
    rest = MultimodalParts(names={theirs: name for name, theirs in found.items()}, others=others)
    return TextHalf(config={**config, TIED: tied}, tensors=text, rest=rest)


def module_name(name: str) -> str:
    """Returns the name in transformers' class of a tensor of the text half."""
    renamed = (new + name.removeprefix(old) for old, new in OLDER_NAMES if name.startswith(old))
    return next(renamed, name)


def _is_other(name: str) -> bool:
    return name.removeprefix(f"{ALONE}.").partition(".")[0] in OTHER_PARTS


def _is_tied(config: JsonObject, tensors: Mapping[str, TensorEntry]) -> object:
    """Returns what transformers does: it ties the head as the config says, unless the files have another head."""
    if HEAD_WEIGHT not in tensors:
        return ties_without_head(config)
    said = ties_embeddings(config)
    return said if said is not True else _are_equal(tensors[HEAD_WEIGHT], tensors.get(EMBEDDING_WEIGHT))


def _are_equal(head: TensorEntry, embedding: TensorEntry | None) -> bool:
    """Compares some rows at a time, because heads that differ do so in the first rows."""
    if embedding is None or head.shape != embedding.shape:
        return False
    starts = range(0, head.rows, COMPARED_ROWS)
    parts = ((start, min(start + COMPARED_ROWS, head.rows)) for start in starts)
    return all(np.array_equal(head.read_rows(*part), embedding.read_rows(*part)) for part in parts)
