"""A model on disk in one form for every file format: its config, its tokenizer, and its tensors by name."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from pallas_kernels.formats.fsdp_parts import Rows
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.config.sizes import format_bytes
from qlora_jax.untrusted_json import JsonObject

PREFETCH_DEPTH = 4  # tensors
CHUNK = 1 << 20  # bytes per read
ALIGNMENT = 64  # bytes
ACT_ORDER = "integers in act-order"  # file_type of weights whose groups are not runs of neighbouring columns
NUMBERED = re.compile(r".*?\.\d+(?=\.)")  # a tensor's name up to the number of its layer


class ByteRange(NamedTuple):
    """A part of a file: `nbytes` bytes from byte `offset`."""

    path: Path
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor on disk: its name, shape and type are known, its weights are read on request.

    Attributes:
      name: Hugging Face's name, such as "model.layers.3.self_attn.q_proj.weight".
      shape: Hugging Face's shape, (N out, K in) for a linear layer.
      file_type: the type in the file, such as "F32", "BF16", "Q4_1".
      nbytes: bytes in the file.
      read_rows: (first, end) -> these rows as an f32, f16 or bf16 array, in Hugging Face's order; a row is an index of
        the first axis. Rows of an unquantized tensor are a read-only view of the mapped file, which is unmapped with
        the last reference to it; those of a quantized one are a new f32 array.
      ranges_of: (first, end) -> the parts of files that these rows are read from.
      read_quantized: returns the 4-bit codes and constants unchanged, if the file stores them in a format of QTensor;
        None for any other tensor. The codes are a view of the mapped file; only the rows in use are read.
      read_stored: (first, end) -> these rows in the file's own blocks, in Hugging Face's order; None for any other
        tensor. The codes may be a view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    file_type: str
    nbytes: int
    read_rows: Callable[[int, int], np.ndarray]
    ranges_of: Callable[[int, int], tuple[ByteRange, ...]]
    read_quantized: Callable[[], QTensor] | None = None
    read_stored: Callable[[int, int], GgmlTensor] | None = None

    @property
    def rows(self) -> int:
        """The length of the first axis; 1 of a scalar."""
        return math.prod(self.shape[:1])

    def read(self) -> np.ndarray:
        """Returns the whole tensor, as `read_rows` does."""
        return self.read_rows(0, self.rows).reshape(self.shape)


class GgufVocabulary(TypedDict):
    """The vocabulary of a GGUF file, by the last part of its tokenizer.ggml keys."""

    model: str
    pre: str
    tokens: list[str]
    token_type: list[int]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool


class TokenizerData(TypedDict):
    """The tokenizer's part of a model's files.

    Exactly one of `tokenizer_json`, `missing` and `gguf` is present.

    Attributes:
      chat_template: jinja text.
      template_name: the file that it is from, for messages.
      bos_token, eos_token, pad_token, unk_token: texts of special tokens, or None.
      add_bos_token: True if plain text begins with the bos token.
      stop_token_ids: ids that end a reply.
      tokenizer_json: the text of tokenizer.json.
      tokenizer_name: its path, for messages.
      missing: the reason for a missing tokenizer, and what to do.
      gguf: the vocabulary of a GGUF file.
    """

    chat_template: str | None
    template_name: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    add_bos_token: bool
    stop_token_ids: list[int]
    tokenizer_json: NotRequired[str]
    tokenizer_name: NotRequired[str]
    missing: NotRequired[str]
    gguf: NotRequired[GgufVocabulary]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MultimodalParts:
    """The checkpoint around a text half: everything that a full copy of it needs beside the text half's tensors.

    Attributes:
      names: name of each tensor of the text half in transformers' class -> its name in the files.
      others: tensors of vision tower and projector by their names in the files.
    """

    names: Mapping[str, str]
    others: Mapping[str, TensorEntry]

    def __str__(self) -> str:
        return _parts_text((name.removeprefix("model.").partition(".")[0], e.nbytes) for name, e in self.others.items())


def _parts_text(tensors: Iterable[tuple[str, int]]) -> str:
    """Returns the parts of tensors (name of its part, bytes) as text, each with its number of tensors and its size."""
    groups: dict[str, list[int]] = {}
    for part, nbytes in tensors:
        groups.setdefault(part, []).append(nbytes)
    return ", ".join(
        f"{part} ({len(sizes):,} tensor{'s' * (len(sizes) > 1)}, {format_bytes(sum(sizes))})"
        for part, sizes in groups.items()
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model on disk whose metadata was read, and whose tensors were not.

    Attributes:
      path: the folder or file that the user named, or its place in the Hub's cache.
      config: the model in the form of a Hugging Face config.json.
      tokenizer: the tokenizer's part of the files.
      tensors: the tensors by Hugging Face name.
      hub_name: "org/name@commit" for a model from the Hub, which identifies these files for good.
      multimodal: the rest of a multimodal checkpoint, if the model is the text half of one.
      drafts: bytes of the tensors of layers that predict further tokens, by their names in the files; not loaded.
      coded_by: the method that made codes which no GGUF file holds, such as GPTQ; otherwise empty.
    """

    path: Path
    config: JsonObject
    tokenizer: TokenizerData
    tensors: Mapping[str, TensorEntry]
    hub_name: str | None = None
    multimodal: MultimodalParts | None = None
    drafts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    coded_by: str = ""

    @property
    def draft_text(self) -> str:
        """The layers that predict further tokens, with their sizes; empty if the files have none."""
        return _parts_text((NUMBERED.findall(name)[0], nbytes) for name, nbytes in self.drafts.items())

    @property
    def not_loaded(self) -> str:
        """The parts of the files that are left out, with their sizes and the reason; empty if there are none."""
        others = f"{self.multimodal}; text does not pass through them" if self.multimodal else ""
        drafts = f"{self.draft_text}; predicts further tokens" if self.drafts else ""
        return "; ".join(filter(None, (others, drafts)))

    @property
    def config_name(self) -> str:
        """The file that the config was read from, for messages."""
        return str(self.path / "config.json" if self.path.is_dir() else self.path)


def prefetch(entries: Sequence[TensorEntry], rows: Sequence[Rows] | None = None) -> Iterator[TensorEntry]:
    """Yields the entries in order, while a thread reads the next PREFETCH_DEPTH tensors into the page cache.

    Args:
      rows: the rows of each tensor that are read; None for all.
    """
    wanted = [((0, entry.rows),) for entry in entries] if rows is None else rows
    reads = list(zip(entries, wanted, strict=True))
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(_read_into_page_cache, *each) for each in reads[:PREFETCH_DEPTH]]
        try:
            for index, entry in enumerate(entries):
                later = reads[index + PREFETCH_DEPTH : index + PREFETCH_DEPTH + 1]
                pending += [reader.submit(_read_into_page_cache, *each) for each in later]
                yield entry
        finally:
            for each in pending:
                each.cancel()


def _read_into_page_cache(entry: TensorEntry, rows: Rows) -> None:
    # It reads, because advice (madvise) about a large range loads only one small window of it.
    buffer = bytearray(CHUNK)
    for path, offset, nbytes in (each for first, end in rows for each in entry.ranges_of(first, end)):
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            for start in range(0, nbytes, CHUNK):
                file.readinto(memoryview(buffer)[: min(CHUNK, nbytes - start)])


def aligned_empty(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An uninitialized array at an aligned address, which the CPU backend uses without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def map_bytes(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """A read-only view uint8 [nbytes] of the file from byte `offset`; the mapping lives as long as the view."""
    if nbytes == 0:
        return np.empty(0, np.uint8)  # the operating system cannot map zero bytes
    return np.asarray(np.memmap(path, np.uint8, mode="r", offset=offset, shape=(nbytes,)))
