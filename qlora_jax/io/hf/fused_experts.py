"""Tensors of mixtures of experts in Hugging Face's files.

A file names the tensors of Mixtral's experts otherwise than transformers' class does. It has each expert's matrices, or
all experts fused in one tensor, gate and up one above the other or, transposed, next to each other. Here every expert
has separate matrices, by the names that the class would give them.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.io.hf import gpt_oss_experts
from qlora_jax.io.hf.gpt_oss_experts import ExpertRows, transposed_matrix
from qlora_jax.model_source import ByteRange, TensorEntry
from qlora_jax.models.config import FUSED_PROJECTIONS
from qlora_jax.models.families.attributes import expert_count
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.untrusted_json import JsonObject

# model_type -> (part of a name in files, the same part in transformers' class).
RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (".block_sparse_moe.experts.{}.w1.", ".mlp.experts.{}.gate_proj."),
        (".block_sparse_moe.experts.{}.w3.", ".mlp.experts.{}.up_proj."),
        (".block_sparse_moe.experts.{}.w2.", ".mlp.experts.{}.down_proj."),
        (".block_sparse_moe.experts.", ".mlp.experts."),
        (".block_sparse_moe.gate.", ".mlp.gate."),
    )
}
# Model types whose experts may be fused, with the rows of gate above those of up: their fused matrices, by name.
FUSED = frozenset(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "glm4v_moe_text", "qwen3_vl_moe_text"))
TRANSPOSED = ("qwen3_vl_moe_text",)  # model types whose published files transpose the fused matrices
FUSED_NAME = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)")


def expert_by_expert(folder: Path, config: JsonObject, tensors: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """Returns the tensors of a model by their names in transformers' class, those of experts one by one.

    The tensors of a dense model are returned unchanged.

    Raises:
      ValueError: a matrix is stored twice.
    """
    config = dict(text_config(config))
    if config.get("model_type") == gpt_oss_experts.MODEL_TYPE:
        return gpt_oss_experts.expert_by_expert(folder, tensors, expert_count(config))
    if config.get("model_type") not in FUSED:
        return tensors
    found = [part for entry in tensors.values() for part in _parts(entry, config)]
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
    return _renamed(name, [(theirs, ours) for theirs, ours in _renamed_parts(config)])


def name_in_files(config: JsonObject, name: str) -> str:
    """Returns the name that a file gives to a tensor of transformers' class."""
    return _renamed(name, [(ours, theirs) for theirs, ours in _renamed_parts(config)])


def _renamed_parts(config: JsonObject) -> tuple[tuple[str, str], ...]:
    return RENAMED.get(str(text_config(config).get("model_type")), ())


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        pattern = re.escape(old).replace(re.escape("{}"), r"(?P<expert>\d+)")
        if match := re.search(pattern, name):
            expert = match.groupdict().get("expert", "")
            return name[: match.start()] + new.format(expert) + name[match.end() :]
    return name


def _parts(entry: TensorEntry, config: JsonObject) -> Iterator[TensorEntry]:
    """Yields the matrices of a tensor that holds all experts; any other tensor itself."""
    match = FUSED_NAME.fullmatch(entry.name)
    parts = () if match is None else FUSED_PROJECTIONS[match["part"]]
    is_fused = len(entry.shape) == 3 and entry.shape[0] == expert_count(config) and 0 not in entry.shape
    transposed = is_fused and is_transposed(entry.shape[1:], match["part"] if match else "", config)
    if match is None or not is_fused or entry.shape[1 + transposed] % len(parts):
        yield entry
        return
    rows = entry.shape[1 + transposed] // len(parts)
    for number, part in enumerate(parts):
        for expert in range(entry.shape[0]):
            name = f"{match['experts']}.{expert}.{part}.weight"
            if transposed:
                matrix = transposed_matrix(entry, ExpertRows(expert, number * rows, 1, rows))
                yield dataclasses.replace(matrix, name=name)
            else:
                yield _matrix(entry, name, expert, number * rows, rows)


def is_transposed(shape: tuple[int, ...], part: str, config: JsonObject) -> bool:
    """Returns True if the fused matrix of one expert is transposed in a file.

    As transformers does it, a matrix that has the right shape as it is stays so.
    """
    width = config.get("hidden_size")
    wide, narrow = (0, 1) if part == "gate_up_proj" else (1, 0)
    return config.get("model_type") in TRANSPOSED and shape[wide] == width != shape[narrow]


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
