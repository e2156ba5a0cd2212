"""Writes safetensors files from a stream of tensors: the header first, from shapes alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.io.hf.reader import DTYPES
from qlora_jax.io.model_source import JsonObject

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
    """Writes one file.

    Args:
      specs: its tensors.
      values: yields their arrays in the same order; one is in memory at a time.
    """
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in specs:
        offsets = (end, end := end + tensor.nbytes)
        header[tensor.name] = {"dtype": FILE_TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(specs, values, strict=True):
            assert (value.dtype, value.size) == (tensor.dtype, math.prod(tensor.shape)), tensor
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
