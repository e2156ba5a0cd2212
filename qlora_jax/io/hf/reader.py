"""Reads a Hugging Face folder: config.json, safetensors files in one or many shards, the tokenizer's files."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.io.hf.bnb_reader import gathered, is_four_bit
from qlora_jax.io.hf.tokenizer import read_json, read_tokenizer
from qlora_jax.io.model_source import ModelSource, TensorEntry, map_bytes

FRACTIONS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = FRACTIONS | {"U8": np.dtype(np.uint8)}  # bytes: the codes of weights that are quantized already
HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Tables that old checkpoints save although they follow from the config: rotations, and masks of attention.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_folder(folder: Path) -> ModelSource:
    """The model in a Hugging Face folder; headers are read and checked, tensors are not.

    Raises:
      ValueError: names the file, the byte offset where there is one, and the way out.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is no Hugging Face model folder. {_held(folder)}")
    config = read_json(config_path)
    quantization = config.get("quantization_config")
    if quantization is not None and not is_four_bit(quantization):
        raise ValueError(
            f"{config_path}: quantization_config = {quantization}: of weights that are already quantized, those of "
            "bitsandbytes in 4 bits alone are supported. Give the folder of the 16-bit model they were made from: "
            "loading quantizes it."
        )
    tensors = {entry.name: entry for path in _weight_files(folder) for entry in read_header(path)}
    tensors = gathered(folder, tensors) if quantization else _refuse_bytes(folder, tensors)
    return ModelSource(path=folder, config=config, tokenizer=read_tokenizer(folder), tensors=tensors)


def _refuse_bytes(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Plain weights are numbers with a fraction."""
    odd = [name for name, entry in tensors.items() if entry.file_type not in FRACTIONS]
    if odd:
        raise ValueError(
            f"{folder}: tensor {odd[0]} has type {tensors[odd[0]].file_type} ({len(odd)} such); supported: "
            f"{', '.join(FRACTIONS)}. Convert the model to one of them first."
        )
    return tensors


def read_header(path: Path) -> Iterator[TensorEntry]:
    """The tensors of one safetensors file, in the order of its header, every length and offset checked.

    Those that follow from the config are left out.
    """
    header, data_start = _parse_header(path)
    data_bytes = path.stat().st_size - data_start
    for name, info in header.items():
        if name == "__metadata__" or DERIVED.fullmatch(name):
            continue
        file_type, shape, begin, end = _checked_info(path, name, info)
        if end > data_bytes:
            raise ValueError(
                f"{path}: truncated: tensor {name} lies in bytes {data_start + begin} to {data_start + end}, "
                f"but the file ends at byte {data_start + data_bytes}. Download it again."
            )
        read = functools.partial(_read_tensor, path, data_start + begin, shape, DTYPES[file_type])
        place = (path, data_start + begin, end - begin)
        yield TensorEntry(name=name, shape=shape, file_type=file_type, nbytes=end - begin, read=read, places=(place,))


def _read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return map_bytes(path, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if size < HEADER_LENGTH_BYTES or HEADER_LENGTH_BYTES + length > size or length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: truncated or no safetensors file: byte 0 announces a header of {length} bytes, the file has "
                f"{size}. Download it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise ValueError(f"{path}: corrupt: the header from byte {HEADER_LENGTH_BYTES} is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: corrupt: the header from byte {HEADER_LENGTH_BYTES} is no JSON object")
    return header, HEADER_LENGTH_BYTES + length


def _checked_info(path: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, begin, end) of one header entry; begin and end count from the end of the header."""
    corrupt = ValueError(f"{path}: corrupt: the header says {info!r} of tensor {name}")
    try:
        file_type, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise corrupt from None
    if type(file_type) is not str or not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise corrupt
    if file_type not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name} has type {file_type}; supported: {', '.join(DTYPES)}. "
            "Convert the model to one of them first."
        )
    expected = math.prod(shape) * DTYPES[file_type].itemsize
    if end - begin != expected:
        raise ValueError(
            f"{path}: corrupt: tensor {name}, {file_type} {list(shape)}, takes {expected} bytes, but the header gives "
            f"it bytes {begin} to {end} of the data, which are {end - begin}"
        )
    return file_type, shape, begin, end


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or every shard that the index names and that holds what the index says."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}. {_held(folder)}")
    shard_of = read_index(folder / INDEX)
    shards = sorted(set(shard_of.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {INDEX} names {len(shards)} shards, {len(absent)} of them missing: {', '.join(absent)}. "
            "Download the missing files into the folder."
        )
    _check_index(folder, shard_of, shards)
    return [folder / shard for shard in shards]


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name of an index of shards; ValueError where it is none, or leads out of its folder."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{path}: expected an object 'weight_map' of tensor name to file name")
    outside = sorted({shard for shard in shard_of.values() if Path(shard).name != shard})
    if outside:
        raise ValueError(f"{path}: shards must lie in the folder itself, found {', '.join(outside)}")
    return {name: shard for name, shard in shard_of.items() if not DERIVED.fullmatch(name)}


def _check_index(folder: Path, shard_of: dict[str, str], shards: list[str]) -> None:
    held = {(entry.name, shard) for shard in shards for entry in read_header(folder / shard)}
    wrong = sorted(set(shard_of.items()) ^ held)
    if wrong:
        lines = "\n".join(
            f"  {name}: {f'named, but not in {shard}' if (name, shard) not in held else f'in {shard}, but not named'}"
            for name, shard in wrong
        )
        raise ValueError(f"{folder / INDEX} does not fit its shards, {len(wrong)} tensors:\n{lines}")


def _held(folder: Path) -> str:
    """What the folder holds instead, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"It holds {pickles[0]}, a pickle: reading such a file can run any code, so it is refused. Convert it, if "
            "you trust it, with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"It holds {ggufs[0]}: give the path of that file."
    return f"It holds: {', '.join(names[:10]) or 'nothing'}."
