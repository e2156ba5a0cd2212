"""Reads a Hugging Face folder: config.json, one or many safetensors files, and the tokenizer's files."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
from pydantic import Field

from qlora_jax.io.hf.awq_reader import AWQ
from qlora_jax.io.hf.bnb_reader import QuantizationConfig, group_quantized, is_bnb_4bit
from qlora_jax.io.hf.coded_weights import GIVE_16_BITS, check_settings, group_codes
from qlora_jax.io.hf.compressed_tensors_reader import COMPRESSED_TENSORS
from qlora_jax.io.hf.fp8_reader import FP8
from qlora_jax.io.hf.fused_experts import expert_by_expert
from qlora_jax.io.hf.gpt_oss_experts import is_mxfp4
from qlora_jax.io.hf.gptq_reader import GPTQ
from qlora_jax.io.hf.modelopt_reader import MODELOPT
from qlora_jax.io.hf.multimodal import split_multimodal
from qlora_jax.io.hf.tokenizer import read_tokenizer
from qlora_jax.io.loading.draft_layers import draft_layers, split_drafts, without_drafts
from qlora_jax.model_source import ByteRange, ModelSource, TensorEntry, map_bytes
from qlora_jax.models.families import model_config
from qlora_jax.untrusted_json import JsonObject, MetadataError, Offset, check_value, decode_json, read_json, shorten

FLOAT_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = FLOAT_TYPES | {"U8": np.dtype(np.uint8)}  # U8: codes of quantized weights
INTEGER_TYPES = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # words of codes, and shapes
CODE_TYPES = INTEGER_TYPES | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
HEADER_LENGTH_BYTES = 8
# Bytes of a header that is read: of any file (60,000 tensors); per byte of a larger file, whose decoded header then
# takes less memory than the file has bytes; and of the format.
SMALL_HEADER, HEADER_SHARE, LARGEST_HEADER = 8 << 20, 1 / 64, 100_000_000
MAX_INDEX_BYTES = 32 << 20  # enough for 250,000 tensors; mixtures of experts have one per expert
MAX_AXES = 8
MAX_FILE_NAME = 255  # characters; the limit of file systems
# Rotary frequencies and attention masks, which old checkpoints store although the config determines them.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)")
CODED_METHODS = {  # by quant_method
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "modelopt": MODELOPT,
}
DESCRIBE = (
    "If it belongs to codes of GPTQ, AWQ or another method, add quantization_config to config.json: quant_method, and "
    "the settings in quantize_config.json or hf_quant_config.json. Convert other models to one of these types"
)
CONVERT = "Convert the model to one of these types"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Types = Mapping[str, np.dtype]  # by their names in safetensors


class FolderConfig(TypedDict, total=False):
    """The keys of config.json that files of weights depend on; models/families reads the others."""

    model_type: str | None
    quantization_config: QuantizationConfig | None


class ShardIndex(TypedDict):
    """The key of model.safetensors.index.json that is used: tensor name -> file name."""

    weight_map: dict[str, Annotated[str, Field(max_length=MAX_FILE_NAME)]]


class TensorHeader(TypedDict):
    """A tensor in a safetensors header; offsets are relative to the end of the header."""

    dtype: str
    shape: Annotated[list[Offset], Field(max_length=MAX_AXES)]
    data_offsets: Annotated[list[Offset], Field(min_length=2, max_length=2)]


def open_folder(folder: Path, before_weights: Callable[[], object]) -> ModelSource:
    """Opens the model in a Hugging Face folder; headers are read and checked, tensors are not read.

    Args:
      before_weights: called after config.json is checked, before files of weights are looked for.

    Raises:
      ValueError: a file is missing, damaged or not supported; names the file, the byte offset, and what to do.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(
            f"{folder}: not a Hugging Face model folder (config.json is missing). {_found_instead(folder)}"
        )
    config = read_config(config_path)
    model_config(without_drafts(config), str(config_path))
    before_weights()
    form = _quantized_form(config_path, config)
    types = form.types
    entries = {entry.name: entry for path in _weight_files(folder, types) for entry in read_header(path, types)}
    kept, drafts = split_drafts(entries, draft_layers(config))
    tensors = _check_types(folder, expert_by_expert(folder, config, form.grouped(folder, kept)))
    source = ModelSource(
        path=folder,
        config=without_drafts(config),
        tokenizer=read_tokenizer(folder),
        tensors=tensors,
        drafts={name: entry.nbytes for name, entry in drafts.items()},
        coded_by=form.coded_by,
    )
    if (half := split_multimodal(folder, config, tensors)) is None:
        return source
    return dataclasses.replace(source, config=half.config, tensors=half.tensors, multimodal=half.rest)


class _Form(NamedTuple):
    """The form in which files store weights.

    Attributes:
      types: those that tensors may have.
      grouped: (folder, tensors) -> one entry for the tensors of each quantized weight; other entries unchanged.
      coded_by: the method that made codes which no GGUF file holds, or empty.
    """

    types: Types
    grouped: Callable[[Path, Mapping[str, TensorEntry]], Mapping[str, TensorEntry]]
    coded_by: str = ""


def _quantized_form(path: Path, config: JsonObject) -> _Form:
    """Returns the form that a config describes.

    Raises:
      ValueError: the quantization_config is not supported.
    """
    quantization = config.get("quantization_config")
    if quantization is None or is_mxfp4(config, quantization):
        return _Form(DTYPES, lambda _, tensors: tensors)
    if is_bnb_4bit(quantization):
        return _Form(DTYPES, group_quantized)
    if (method := CODED_METHODS.get(quantization.get("quant_method", ""))) is None:
        titles = ", ".join(each.title for each in CODED_METHODS.values())
        raise ValueError(
            f"{path}: quantization_config is not supported (found {shorten(quantization)}, expected {titles}, "
            f"4 bits of bitsandbytes, or mxfp4 of gpt_oss). {GIVE_16_BITS}"
        )
    settings = check_settings(path, quantization, method)
    grouped = functools.partial(group_codes, method=method, settings=settings)
    return _Form(DTYPES | CODE_TYPES, grouped, method.title)


def read_config(path: Path) -> JsonObject:
    """Reads config.json; raises ValueError if it is not a JSON object, or has values of other types."""
    config = read_json(path, JsonObject)
    check_value(config, FolderConfig, path)
    return config


def _check_types(folder: Path, tensors: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """Checks that all tensors are floating point, or codes that were recognized; returns them.

    Raises:
      ValueError: names a tensor that is not.
    """
    types = DTYPES.keys() - FLOAT_TYPES.keys() | CODE_TYPES.keys()
    if odd := [name for name, entry in tensors.items() if entry.file_type in types]:
        raise ValueError(
            f"{folder}: {len(odd)} tensors have types that are not supported, such as {odd[0]} (found "
            f"{tensors[odd[0]].file_type}, expected {', '.join(FLOAT_TYPES)}). Convert the model to one of these types"
        )
    return tensors


def read_header(path: Path, types: Types = DTYPES) -> Iterator[TensorEntry]:
    """Yields the tensors of one safetensors file in the order of its header; every length and offset is checked.

    Tensors that the config determines (DERIVED) are skipped.

    Args:
      types: those that a tensor may have.

    Raises:
      ValueError: the file is truncated, corrupt or has an unsupported type; names the byte offset.
    """
    header, data_start = _parse_header(path)
    _check_layout(path, header, path.stat().st_size - data_start, data_start)
    for name, info in header.items():
        if DERIVED.fullmatch(name):
            continue
        shape, (begin, end) = tuple(info["shape"]), info["data_offsets"]
        _check_type(path, name, info, types)
        place, dtype = (path, data_start + begin, shape), types[info["dtype"]]
        yield TensorEntry(
            name=name,
            shape=shape,
            file_type=info["dtype"],
            nbytes=end - begin,
            read_rows=functools.partial(_read_rows, *place, dtype),
            ranges_of=functools.partial(_ranges_of, *place, dtype),
        )


def _read_rows(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, first: int, end: int) -> np.ndarray:
    (stored,) = _ranges_of(path, offset, shape, dtype, first, end)
    return map_bytes(*stored).view(dtype).reshape(end - first, *shape[1:])


def _ranges_of(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, first: int, end: int
) -> tuple[ByteRange]:
    row = math.prod(shape[1:]) * dtype.itemsize
    return (ByteRange(path, offset + first * row, (end - first) * row),)


def _parse_header(path: Path) -> tuple[dict[str, TensorHeader], int]:
    """(the header without __metadata__, the position of the data)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        longest = min(LARGEST_HEADER, max(SMALL_HEADER, int(HEADER_SHARE * size)))
        if size < HEADER_LENGTH_BYTES or HEADER_LENGTH_BYTES + length > size or length > longest:
            raise MetadataError(
                f"{path}: truncated or not a safetensors file: byte 0 announces a header of {length} bytes (at most "
                f"{longest} are read), the file has {size} bytes. Download it again."
            )
        text = file.read(length)
    name = f"{path}, header from byte {HEADER_LENGTH_BYTES}"
    header = decode_json(text, JsonObject, name)
    header.pop("__metadata__", None)
    return check_value(header, dict[str, TensorHeader], name), HEADER_LENGTH_BYTES + length


def _check_layout(path: Path, header: dict[str, TensorHeader], data_bytes: int, data_start: int) -> None:
    """Checks that the tensors fill the data without a gap, in the order of their offsets, as the format requires."""
    spans = sorted((*info["data_offsets"], name) for name, info in header.items())
    for begin, end, name in spans:
        if end > data_bytes:
            raise MetadataError(
                f"{path}: truncated: tensor {name} is stored in bytes {data_start + begin} to {data_start + end}, "
                f"but the file ends at byte {data_start + data_bytes}. Download it again."
            )
    ends = [0, *(end for _, end, _ in spans)]
    for last, (begin, end, name) in zip(ends, spans, strict=False):
        if begin != last or end < begin:
            raise MetadataError(
                f"{path}: corrupt: tensor {name} is stored in bytes {begin} to {end} of the data, expected it to begin "
                f"at byte {last}, where the tensor before it ends. Download it again."
            )
    if ends[-1] != data_bytes:
        raise MetadataError(
            f"{path}: corrupt: the tensors end at byte {data_start + ends[-1]}, but the file ends at byte "
            f"{data_start + data_bytes}. Download it again."
        )


def _check_type(path: Path, name: str, info: TensorHeader, types: Types) -> None:
    if info["dtype"] not in types:
        raise MetadataError(
            f"{path}: tensor {name} has a type that is not supported (found {shorten(info['dtype'])}, expected "
            f"{', '.join(types)}). {DESCRIBE if info['dtype'] in CODE_TYPES else CONVERT}"
        )
    begin, end = info["data_offsets"]
    expected = math.prod(info["shape"]) * types[info["dtype"]].itemsize
    if end - begin != expected:
        raise MetadataError(
            f"{path}: corrupt: tensor {name}, {info['dtype']} {info['shape']}, requires {expected} bytes, but the "
            f"header gives it bytes {begin} to {end} of the data, which are {end - begin}. Download it again."
        )


def _weight_files(folder: Path, types: Types) -> list[Path]:
    """Finds model.safetensors, or the shards that the index names, whose tensors are checked against it."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: {SINGLE} and {INDEX} are both missing. {_found_instead(folder)}")
    shard_of = read_index(folder / INDEX)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of the {len(shards)} shards in {INDEX} are missing: {', '.join(missing[:20])}. "
            "Download these files into the folder"
        )
    stored = {(entry.name, shard) for shard in shards for entry in read_header(folder / shard, types)}
    wrong = sorted(set(shard_of.items()) ^ stored)
    if wrong:
        lines = "\n".join(
            f"  {name}: {f'named, but not in {shard}' if (name, shard) not in stored else f'in {shard}, but not named'}"
            for name, shard in wrong
        )
        raise ValueError(f"{folder / INDEX}: {len(wrong)} tensors do not match the shards. Download it again:\n{lines}")
    return [folder / shard for shard in shards]


def read_index(path: Path) -> dict[str, str]:
    """Reads an index of shards: tensor name -> file name.

    Raises:
      MetadataError: it is not an index, or names a file outside its folder.
    """
    shard_of = read_json(path, ShardIndex, MAX_INDEX_BYTES)["weight_map"]
    outside = sorted({shard for shard in shard_of.values() if Path(shard).name != shard})
    if outside:
        raise MetadataError(
            f"{path}: names shards outside its folder (found {', '.join(map(shorten, outside[:5]))}). Use file names "
            "without a path"
        )
    return {name: shard for name, shard in shard_of.items() if not DERIVED.fullmatch(name)}


def _found_instead(folder: Path) -> str:
    """Says what the folder contains instead of a model, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"It contains {pickles[0]}, a pickle, which is not read because it can run any code. If you trust it, "
            "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"It contains {ggufs[0]}: give the path of that file"
    if "adapter_config.json" in names:
        return "It is a PEFT adapter: give its base model here, and the adapter as lora.start"
    if "checkpoints" in names and "config.yaml" in names:
        return (
            "It is a training run. Resume it with --config RUN/config.yaml --resume. To train its adapter with other "
            "settings, export it with --format peft, and give it as lora.start and its base model here"
        )
    return f"It contains: {', '.join(names[:10]) or 'nothing'}"
