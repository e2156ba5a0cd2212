"""What a model on disk looks like to the rest of the program, whichever format its files have."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels.formats.qtensor import QTensor

AHEAD = 4  # tensors
CHUNK = 1 << 20  # bytes read in one go


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor on disk: `read()` yields the weights, `shape` and `file_type` are known before.

    Attributes:
      name: Hugging Face's name, such as "model.layers.3.self_attn.q_proj.weight".
      shape: Hugging Face's shape, (N out, K in) for a linear layer.
      file_type: the type in the file, such as "F32", "BF16", "Q4_1".
      nbytes: bytes in the file.
      read: f32, f16 or bf16 array of `shape`, rows in the order of Hugging Face. An unquantized tensor is a read-only
        view of the mapped file, which is unmapped with the last reference to it; a quantized one is a new f32 array.
      held: where the file holds 4-bit codes of our own kinds: them and their constants, unchanged.
      places: (file, offset, bytes) of what is read.
    """

    name: str
    shape: tuple[int, ...]
    file_type: str
    nbytes: int
    read: Callable[[], np.ndarray]
    held: Callable[[], QTensor] | None = None
    places: tuple[tuple[Path, int, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model on disk: metadata read, tensors not yet.

    Attributes:
      path: the folder or file that the user named, or where the cache holds it.
      config: the model in the form of a Hugging Face config.json.
      tokenizer: "chat_template", "bos_token", "eos_token", "pad_token", "unk_token" (str or None), "add_bos_token"
        (bool), "stop_token_ids" (ids that end a reply), and either "tokenizer_json" (its text), "missing" (why
        there is none, in words) or "gguf" (the vocabulary of a GGUF file: "model", "pre", "tokens", "token_type",
        "merges", "add_space_prefix").
      tensors: by Hugging Face name.
      hub_name: of a model from the Hub: "org/name@commit", which names these files for good.
    """

    path: Path
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    hub_name: str | None = None


def reading_ahead(entries: Sequence[TensorEntry]) -> Iterator[TensorEntry]:
    """The entries in order, while a thread reads the bytes of the next AHEAD, so that the system's cache has them."""
    with ThreadPoolExecutor(1) as reader:
        asked = [reader.submit(_warm, entry) for entry in entries[:AHEAD]]
        try:
            for index, entry in enumerate(entries):
                asked += [reader.submit(_warm, later) for later in entries[index + AHEAD : index + AHEAD + 1]]
                yield entry
        finally:
            for each in asked:
                each.cancel()


def _warm(entry: TensorEntry) -> None:
    # By reading: the system takes advice of so many bytes for one of its own small windows.
    buffer = bytearray(CHUNK)
    for path, offset, nbytes in entry.places:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            for start in range(0, nbytes, CHUNK):
                file.readinto(memoryview(buffer)[: min(CHUNK, nbytes - start)])


def map_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """uint8 [nbytes], a read-only view of the file from `offset`; the mapping lives as long as the view."""
    if nbytes == 0:
        return np.empty(0, np.uint8)  # an empty mapping is an error of the system
    return np.asarray(np.memmap(path, np.uint8, mode="r", offset=offset, shape=(nbytes,)))
