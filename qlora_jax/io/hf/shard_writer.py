"""Writes a safetensors file as its tensors come: the header first, from shapes alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.io.hf.reader import DTYPES

FILE_TYPES = {dtype: file_type for file_type, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor that is to come."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9  # of one file, as transformers cuts them


def split(planned: Sequence[Planned]) -> list[list[Planned]]:
    """The tensors of each file, in order; one that is larger than a file may be has its own."""
    shards: list[list[Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def index_of(shards: Mapping[str, Sequence[Planned]]) -> dict[str, Any]:
    """What model.safetensors.index.json holds: which file each tensor is in."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    placed = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": placed}


def write_safetensors(path: Path, planned: Sequence[Planned], values: Iterable[np.ndarray]) -> None:
    """A file of the tensors planned; `values` yields them in that order, and one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        offsets = (end, end := end + tensor.nbytes)
        header[tensor.name] = {"dtype": FILE_TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(planned, values, strict=True):
            assert (value.dtype, value.size) == (tensor.dtype, math.prod(tensor.shape)), tensor
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
