"""Tensors of mixtures of experts in Hugging Face's files.

A file names the tensors of Mixtral's experts otherwise than transformers' class does. It has each expert's matrices, or
all experts fused in one tensor, gate and up one above the other. Here every expert has separate matrices, by the names
that the class would give them.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.io.hf import gpt_oss_experts
from qlora_jax.io.model_source import ByteRange, JsonObject, TensorEntry

# model_type -> (part of a name in files, the same part in transformers' class).
RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (".block_sparse_moe.experts.{}.w1.", ".mlp.experts.{}.gate_proj."),
        (".block_sparse_moe.experts.{}.w3.", ".mlp.experts.{}.up_proj."),
        (".block_sparse_moe.experts.{}.w2.", ".mlp.experts.{}.down_proj."),
        (".block_sparse_moe.gate.", ".mlp.gate."),
    )
}
# Model types whose experts may be fused, with the rows of gate above those of up: their fused matrices, by name.
FUSED = frozenset(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"))
FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FUSED_NAME = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)")
MAX_EXPERTS = 1 << 12  # per layer; a multiple of the largest published models'
# Layers at the end of GLM-4.5's files that predict further tokens; transformers leaves them out, too.
DRAFT_LAYERS = "num_nextn_predict_layers"
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def expert_by_expert(folder: Path, config: JsonObject, tensors: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """Returns the tensors of a model by their names in transformers' class, those of experts one by one.

    Layers that predict further tokens are left out. The tensors of a dense model are returned unchanged.

    Raises:
      ValueError: a matrix is stored twice.
    """
    if config.get("model_type") == gpt_oss_experts.MODEL_TYPE:
        return gpt_oss_experts.expert_by_expert(folder, tensors)
    if config.get("model_type") not in FUSED:
        return tensors
    kept = [entry for name, entry in tensors.items() if not _is_draft_layer(name, config)]
    found = [part for entry in kept for part in _parts(entry)]
    named = {name_in_class(config, entry.name): entry for entry in found}
    if len(named) < len(found):
        counts = collections.Counter(name_in_class(config, entry.name) for entry in found)
        twice = [name for name, count in counts.items() if count > 1]
        raise ValueError(
            f"{folder}: {len(twice)} matrices are stored twice, under two names or alone and fused, such as "
            f"{twice[0]}. Remove one of the two"
        )
    return {name: dataclasses.replace(entry, name=name) for name, entry in named.items()}


def name_in_class(config: JsonObject, name: str) -> str:
    """Returns the name in transformers' class of a tensor in a file."""
    return _renamed(name, [(theirs, ours) for theirs, ours in RENAMED.get(str(config.get("model_type")), ())])


def name_in_files(config: JsonObject, name: str) -> str:
    """Returns the name that a file gives to a tensor of transformers' class."""
    return _renamed(name, [(ours, theirs) for theirs, ours in RENAMED.get(str(config.get("model_type")), ())])


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        pattern = re.escape(old).replace(re.escape("{}"), r"(?P<expert>\d+)")
        if match := re.search(pattern, name):
            expert = match.groupdict().get("expert", "")
            return name[: match.start()] + new.format(expert) + name[match.end() :]
    return name


def _is_draft_layer(name: str, config: JsonObject) -> bool:
    layers, match = config.get("num_hidden_layers"), LAYER.match(name)
    return bool(config.get(DRAFT_LAYERS)) and match is not None and isinstance(layers, int) and int(match[1]) >= layers


def _parts(entry: TensorEntry) -> Iterator[TensorEntry]:
    """Yields the matrices of a tensor that holds all experts; any other tensor itself."""
    match = FUSED_NAME.fullmatch(entry.name)
    parts = () if match is None else FUSED_PARTS[match["part"]]
    if match is None or len(entry.shape) != 3 or entry.shape[0] > MAX_EXPERTS or entry.shape[1] % len(parts):
        yield entry
        return
    rows = entry.shape[1] // len(parts)
    for number, part in enumerate(parts):
        for expert in range(entry.shape[0]):
            yield _matrix(entry, f"{match['experts']}.{expert}.{part}.weight", expert, number * rows, rows)


def _matrix(entry: TensorEntry, name: str, expert: int, start: int, rows: int) -> TensorEntry:
    """Returns `rows` rows, from row `start`, of one expert of a fused tensor."""
    return TensorEntry(
        name=name,
        shape=(rows, *entry.shape[2:]),
        file_type=entry.file_type,
        nbytes=entry.nbytes // (entry.shape[0] * entry.shape[1]) * rows,
        read_rows=functools.partial(_read_rows, entry, expert, start),
        ranges_of=functools.partial(_ranges_of, entry, expert, start),
    )


def _read_rows(entry: TensorEntry, expert: int, start: int, first: int, end: int) -> np.ndarray:
    return entry.read_rows(expert, expert + 1)[0, start + first : start + end]


def _ranges_of(entry: TensorEntry, expert: int, start: int, first: int, end: int) -> tuple[ByteRange, ...]:
    (stored,) = entry.ranges_of(expert, expert + 1)
    row = stored.nbytes // entry.shape[1]
    return (ByteRange(stored.path, stored.offset + (start + first) * row, (end - first) * row),)
