"""Kinds of damaged model files: GGUF, safetensors, shards, configs, tokenizers, PEFT adapters, bitsandbytes folders."""

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import jax
import numpy as np
from flax import nnx

from qlora_jax.config import ModelArgs
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base, open_base, open_finetuned
from qlora_jax.untrusted_json import JsonObject
from scripts.campaign.file_kind import FileKind
from scripts.campaign.mutations import damage_bytes, damage_json, damage_value, to_json
from tests.data.tokenizer.hostile_tokenizers import PUBLISHED, REFUSED, TABLE, TRIED, precompiled, split
from tests.e2e.project import write_model
from tests.io.gguf_families import FAMILIES, random_tensors, write_family
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder

TEXT = "def f(x):\n    return x ** 12  # na\u00efve \U0001f469\u200d\U0001f52c <s>"
MODEL, BASE, ADAPTER, GGUF = "model", "base", "adapter", "model.gguf"


def read_opened(opened: OpenedModel) -> list[object]:
    """Returns what a command takes from a model: its features, its tokenizer's ids, and its quantized weights."""
    tokenizer = opened.tokenizer
    ids = tokenizer.encode(TEXT)
    model = load_base(opened, opened.args)
    parts = None if opened.run is None else apply_adapter(model, opened.run)
    arrays = jax.tree.leaves(nnx.state(model)) if parts is None else jax.tree.leaves((parts.lora, parts.base))
    named = [dict(tokenizer.special_tokens), tokenizer.add_bos_token, tokenizer.chat_template]
    stop = opened.source.tokenizer["stop_token_ids"]
    return [opened.features, ids, tokenizer.decode(ids), named, stop, *map(np.asarray, arrays)]


def read_model(path: Path) -> list[object]:
    """Opens and loads a model."""
    return read_opened(open_base(ModelArgs(path=str(path), compute_dtype="float32")))


# GGUF


LETTERS = [chr(code) for code in range(ord("a"), ord("z"))]  # with the special tokens and two joined ones: 32
SPECIAL = ["<unk>", "<s>", "</s>"]


def _write_gguf_files(folder: Path) -> None:
    for name, (architecture, config) in FAMILIES.items():
        path = variant(folder, name) / GGUF
        write_family(path, architecture, config, random_tensors(config))
        set_vocabulary(path, _sentencepiece() if architecture.startswith("gemma") else byte_level())


def variant(folder: Path, name: str) -> Path:
    """Returns a new folder for one of a kind's variants."""
    made = folder / name.replace(", ", "-")
    made.mkdir()
    return made


def set_vocabulary(path: Path, vocabulary: JsonObject) -> None:
    """Replaces the vocabulary of a GGUF file by one that encodes any text."""
    metadata, tensors, data = _parts(path)
    path.write_bytes(gguf_bytes({**metadata, **vocabulary}, tensors, data, 0))


def byte_level() -> JsonObject:
    """Returns a byte-level vocabulary of 32 tokens."""
    return {
        "tokenizer.ggml.tokens": [*SPECIAL, *LETTERS, "\u0120", "ab", "abc", "\u0120a"],
        "tokenizer.ggml.merges": ["a b", "ab c", "\u0120 a"],
    }


def _sentencepiece() -> JsonObject:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*SPECIAL, *LETTERS, "\u2581", "ab", "  ", "\u2581a"],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 27, 4, 1],
        "tokenizer.ggml.scores": [-float(number) for number in range(32)],
        "tokenizer.ggml.add_space_prefix": True,
    }


def damage_gguf_file(chance: random.Random, folder: Path) -> str:
    """Damages values of the header, or bytes."""
    target = folder / GGUF
    content = target.read_bytes()
    if chance.random() < 0.4:
        header = gguf.GGUFReader(target).data_offset
        content = damage_bytes(chance, content[:header]) + content[header:]
        how = "bytes of the header"
    elif chance.random() < 0.1:
        content, how = damage_bytes(chance, content), "any bytes"
    else:
        content, how = _damage_header(chance, target), "values of the header"
    target.write_bytes(content)
    return how


def _damage_header(chance: random.Random, path: Path) -> bytes:
    metadata, tensors, data = _parts(path)
    if chance.random() < 0.75:
        metadata = _object(damage_value(chance, metadata))
    else:
        tensors = damage_value(chance, tensors)
    more = chance.choice((*[0] * 9, 1, 2**40))
    return gguf_bytes(metadata, tensors if isinstance(tensors, list) else [], data, more)


def _parts(path: Path) -> tuple[JsonObject, list[object], bytes]:
    """Returns metadata, the tensor table and the data of a GGUF file, as another library reads them."""
    reader = gguf.GGUFReader(path)
    start = reader.data_offset
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors: list[object] = [
        {"name": one.name, "shape": one.shape.tolist(), "type": int(one.tensor_type), "offset": one.data_offset - start}
        for one in reader.tensors
    ]
    return metadata, tensors, path.read_bytes()[start:]


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {"general.architecture": value}


def gguf_bytes(metadata: JsonObject, tensors: list[object], data: bytes, more: int) -> bytes:
    """Returns a GGUF file with these values, however wrong.

    Args:
      more: is added to the number of metadata keys.
    """
    keys = b"".join(_text(name) + _typed(value) for name, value in metadata.items())
    rows = b"".join(_tensor_row(row) for row in tensors)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), (len(metadata) + more) % 2**64) + keys + rows
    return head + bytes(-len(head) % 32) + data


def _text(value: object) -> bytes:
    raw = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: object) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int() if value >= 0:
            return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value % 2**64)
        case int():
            return struct.pack("<Iq", 11, max(value, -(2**63)))
        case float():
            return struct.pack("<If", 6, value) if abs(value) < 1e38 else struct.pack("<Id", 12, value)
        case list() if value:
            items = [_typed(item) for item in value]  # items of other types than the first are wrong on purpose
            head = struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items))
            return head + b"".join(item[4:] for item in items)
        case list():
            return struct.pack("<IIQ", 9, 4, 0)
    return struct.pack("<I", 8) + _text(value)


def _tensor_row(row: object) -> bytes:
    row = row if isinstance(row, dict) else {"name": row}
    shape = row.get("shape")
    shape = [_unsigned(n) for n in shape][:100] if isinstance(shape, list) else [_unsigned(shape)]
    kind, offset = _unsigned(row.get("type")) % 2**32, _unsigned(row.get("offset"))
    return _text(row.get("name")) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _unsigned(value: object) -> int:
    return int(value) % 2**64 if isinstance(value, int) else 0


# Hugging Face folders


def _write_hugging_face(folder: Path) -> None:
    write_model(folder / MODEL)


def _write_shards(folder: Path) -> None:
    config = tiny_config()
    write_folder(folder / MODEL, config, random_weights(config), shards=3)
    add_tokenizer(folder / MODEL)


def add_tokenizer(folder: Path) -> None:
    """Writes the files of a tokenizer of whole words."""
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _damage_safetensors(chance: random.Random, folder: Path) -> str:
    return damage_tensors(chance, folder / MODEL / "model.safetensors")


def damage_tensors(chance: random.Random, path: Path) -> str:
    """Damages values of the header of a safetensors file, or its bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if chance.random() < 0.3:
        damaged, how = damage_bytes(chance, content[:end]) + content[end:], "bytes of the header"
    elif chance.random() < 0.1:
        damaged, how = damage_bytes(chance, content), "any bytes"
    else:
        header = damage_json(chance, content[8:end].decode())
        length = len(header) if chance.random() < 0.95 else chance.choice((0, 2**63, 2**64 - 1, len(header) + 1))
        damaged, how = length.to_bytes(8, "little") + header + content[end:], "values of the header"
    path.write_bytes(damaged)
    return f"{path.name}: {how}"


def damage_file(chance: random.Random, path: Path) -> str:
    """Damages a JSON file."""
    damaged = damage_json(chance, path.read_text(encoding="utf-8"))
    path.write_bytes(damaged)
    return f"{path.name}: {damaged[:200]!r}"


def _damage_index(chance: random.Random, folder: Path) -> str:
    return damage_file(chance, folder / MODEL / "model.safetensors.index.json")


def _write_families(folder: Path) -> None:
    for name, (_, config) in FAMILIES.items():
        target = variant(folder, name) / MODEL
        write_folder(target, config, random_tensors(config))
        add_tokenizer(target)


def _damage_config(chance: random.Random, folder: Path) -> str:
    """Damages config.json, at times after adding a key."""
    path = folder / MODEL / "config.json"
    if chance.random() < 0.2:
        added = chance.choice(
            ("rope_scaling", "quantization_config", "head_dim", "layer_types", "eos_token_id", "dtype")
        )
        value = {"rope_type": "llama3", "factor": 8.0, "quant_method": "bitsandbytes", "load_in_4bit": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | {added: value}))
    return damage_file(chance, path)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def _write_tokenizer(folder: Path) -> None:
    model = write_model(folder / MODEL)
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": token, "eos_token": "</s>"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [257], "bos_token_id": 256}))
    config = json.loads((model / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": config["chat_template"]}, {"name": "tools", "template": "{{ tools }}"}]
    config |= {"chat_template": templates, "add_bos_token": True, "model_max_length": 10**30}
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def _damage_tokenizer(chance: random.Random, folder: Path) -> str:
    return damage_file(chance, folder / MODEL / chance.choice(TOKENIZER_FILES))


def _damage_untrusted(chance: random.Random, folder: Path) -> str:
    """Gives a tokenizer hostile parts, published patterns or a damaged table, and damages these half of the time."""
    hostile = [parts for parts, _ in (*REFUSED.values(), *TRIED.values())]
    published = {"pre_tokenizer": split(chance.choice(PUBLISHED))}
    parts = chance.choice((chance.choice(hostile), published, {"normalizer": precompiled(damage_bytes(chance, TABLE))}))
    given = parts if chance.random() < 0.5 else _object(damage_value(chance, parts))
    path = folder / MODEL / "tokenizer.json"
    path.write_bytes(to_json(chance, json.loads(path.read_text()) | given).encode("utf-8", "surrogatepass"))
    return str(parts)[:200]


# PEFT and bitsandbytes


def _write_adapter(folder: Path) -> None:
    from qlora_jax.api.export import write_export
    from qlora_jax.config.exports import ExportOptions
    from tests.inference.small_run import write_run

    run = write_run(folder)
    opened = open_finetuned(run)
    write_export(opened, folder / ADAPTER, "peft", ExportOptions())
    config = json.loads((folder / ADAPTER / "adapter_config.json").read_text())
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": config["lora_alpha"]}}
    (folder / ADAPTER / "adapter_config.json").write_text(json.dumps(config | patterns))


def _damage_adapter(chance: random.Random, folder: Path) -> str:
    if chance.random() < 0.6:
        return damage_file(chance, folder / ADAPTER / "adapter_config.json")
    return damage_tensors(chance, folder / ADAPTER / "adapter_model.safetensors")


def _read_adapter(folder: Path) -> list[object]:
    return read_opened(open_finetuned(folder / ADAPTER, base=str(folder / MODEL)))


def _write_quantized(folder: Path) -> None:
    from qlora_jax.api.export import save_quantized

    save_quantized(str(write_model(folder / BASE)), folder / MODEL)


def _damage_quantized(chance: random.Random, folder: Path) -> str:
    """Damages a quant_state's JSON, the quantization_config, or the header."""
    place = chance.random()
    if place < 0.3:
        return damage_file(chance, folder / MODEL / "config.json")
    path = folder / MODEL / "model.safetensors"
    if place < 0.5:
        return damage_tensors(chance, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = chance.choice([name for name in header if ".quant_state." in name])
    begin, stop = (end + offset for offset in header[name]["data_offsets"])
    state = to_json(chance, damage_value(chance, json.loads(content[begin:stop])))
    raw = state.encode("utf-8", "surrogatepass")[: stop - begin].ljust(stop - begin)
    path.write_bytes(content[:begin] + raw + content[stop:])
    return f"{name}: {state[:200]}"


def _of_model(read: Callable[[Path], list[object]], name: str) -> Callable[[Path], list[object]]:
    return lambda folder: read(folder / name)


MODEL_KINDS: Mapping[str, FileKind] = {
    "gguf": FileKind(write=_write_gguf_files, variants=True, damage=damage_gguf_file, read=_of_model(read_model, GGUF)),
    "safetensors": FileKind(write=_write_hugging_face, damage=_damage_safetensors, read=_of_model(read_model, MODEL)),
    "index": FileKind(write=_write_shards, damage=_damage_index, read=_of_model(read_model, MODEL)),
    "config": FileKind(write=_write_families, variants=True, damage=_damage_config, read=_of_model(read_model, MODEL)),
    "tokenizer": FileKind(write=_write_tokenizer, damage=_damage_tokenizer, read=_of_model(read_model, MODEL)),
    "untrusted": FileKind(write=_write_tokenizer, damage=_damage_untrusted, read=_of_model(read_model, MODEL)),
    "peft": FileKind(write=_write_adapter, damage=_damage_adapter, read=_read_adapter),
    "bitsandbytes": FileKind(write=_write_quantized, damage=_damage_quantized, read=_of_model(read_model, MODEL)),
}
