"""Writes safetensors files from a stream of tensors: the header first, from shapes alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.atomic_files import staged_file
from qlora_jax.io.hf.reader import DTYPES, HEADER_LENGTH_BYTES, read_header
from qlora_jax.io.read_back import StoredTensor, check_read_back
from qlora_jax.metadata import JsonObject
from qlora_jax.model_source import map_bytes

FILE_TYPES = {dtype: file_type for file_type, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9  # per file, the limit of transformers


def split_into_shards(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Distributes tensors over files in order; a tensor above the limit of a file gets a separate one."""
    shards: list[list[TensorSpec]] = [[]]
    for tensor in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def shard_index(shards: Mapping[str, Sequence[TensorSpec]]) -> JsonObject:
    """The contents of model.safetensors.index.json: the file of each tensor."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    file_of = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def write_safetensors(path: Path, specs: Sequence[TensorSpec], values: Iterable[np.ndarray]) -> None:
    """Writes one file, and reads it back.

    Args:
      specs: its tensors.
      values: yields their arrays in the same order; one is in memory at a time.

    Raises:
      OSError: the file cannot be written, or its copy on the disk differs; names it.
    """
    header, written = _header(specs), dict[str, StoredTensor]()
    with staged_file(
        path,
        len(header) + sum(tensor.nbytes for tensor in specs),
        check=lambda stage: check_read_back(stage, header, written, _stored),
    ) as file:
        file.write(header)
        for tensor, value in zip(specs, values, strict=True):
            assert (value.dtype, value.size) == (tensor.dtype, math.prod(tensor.shape)), tensor
            stored = np.ascontiguousarray(value)
            file.write(stored.reshape(-1).view(np.uint8).data)
            written[tensor.name] = StoredTensor.of(FILE_TYPES[tensor.dtype], tensor.shape, stored)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Returns the bytes before the first tensor; their number is a multiple of 8."""
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in specs:
        offsets = (end, end := end + tensor.nbytes)
        entries[tensor.name] = {"dtype": FILE_TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of a file."""
    return {
        entry.name: StoredTensor.of(entry.file_type, entry.shape, map_bytes(*entry.ranges_of(0, entry.rows)[0]))
        for entry in read_header(path)
    }
