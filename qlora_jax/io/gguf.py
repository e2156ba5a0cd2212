"""Reads a GGUF file: tensors dequantized one at a time, under Hugging Face's names and in its row order."""

import functools
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from qlora_jax.io.entries import ModelSource, TensorEntry, map_bytes
from qlora_jax.io.gguf_config import ROPE_FACTORS, architecture_of, check_types, config_from_metadata
from qlora_jax.io.gguf_header import TensorInfo, parse_header
from qlora_jax.io.gguf_tokenizer import tokenizer_from_metadata

# Types stored as plain numbers, and types whose blocks the gguf package dequantizes.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BLOCKED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)")

# Dequantizing makes several temporaries as large as its result, so it goes by slices of about this many weights.
SLICE_WEIGHTS = 1 << 20
ALIGNMENT = 64  # bytes


def open_gguf(path: Path) -> ModelSource:
    """The model in a GGUF file; its header is read and checked, tensors are not.

    Raises:
      ValueError: no GGUF file, truncated, corrupt, or with an architecture, attribute or tensor type not supported.
    """
    header = parse_header(path)
    check_types(path, header.metadata)
    architecture = architecture_of(path, header.metadata)
    _check_tensor_types(path, header.tensors)
    infos = {info.name: info for info in header.tensors}
    factors = _read(path, infos[ROPE_FACTORS], None) if ROPE_FACTORS in infos else None
    config = config_from_metadata(path, architecture, header.metadata, frozenset(infos), factors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    permuted_heads = heads if architecture.permutes_rotary_rows else {}
    entries = [_entry(path, info, permuted_heads) for info in header.tensors if info.name != ROPE_FACTORS]
    return ModelSource(
        path=path,
        config=config,
        tokenizer=tokenizer_from_metadata(path, header.metadata),
        tensors={entry.name: entry for entry in entries},
    )


def hugging_face_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; a name without counterpart stays as it is.

    The loader then refuses it by that name, with everything else that does not fit.
    """
    match = NAME.fullmatch(name)
    if match is None or match["part"] not in NAMES:
        return name
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{NAMES[match['part']]}.{match['leaf']}"


def _check_tensor_types(path: Path, tensors: list[TensorInfo]) -> None:
    odd = [info for info in tensors if info.type.name not in (*PLAIN, *BLOCKED)]
    if odd:
        kinds = sorted({info.type.name for info in odd})
        raise ValueError(
            f"{path}: {len(odd)} tensors have types that are not supported ({', '.join(kinds)}), the first is "
            f"{odd[0].name}; supported: {', '.join((*PLAIN, *BLOCKED))}. Get the model in another quantization, the "
            "best of these is BF16 or Q8_0."
        )


def _entry(path: Path, info: TensorInfo, permuted_heads: dict[str, int]) -> TensorEntry:
    part = NAME.fullmatch(info.name)
    heads = permuted_heads.get(part["part"]) if part else None
    if heads is not None and (info.shape[0] % (2 * heads) or info.nbytes % info.shape[0]):
        raise ValueError(
            f"{path}: tensor {info.name}, {info.type.name} {list(info.shape)}: its rows can't be put in the order of "
            f"Hugging Face, expected {heads} heads of an even number of rows"
        )
    return TensorEntry(
        name=hugging_face_name(info.name),
        shape=info.shape,
        file_type=info.type.name,
        nbytes=info.nbytes,
        read=functools.partial(_read, path, info, heads),
    )


def _read(path: Path, info: TensorInfo, heads: int | None) -> np.ndarray:
    raw = map_bytes(path, info.offset, info.nbytes)
    if heads is not None:
        raw = raw.reshape(info.shape[0], -1)[_rotary_order(info.shape[0], heads)]
    if info.type.name in PLAIN:
        return raw.reshape(-1).view(PLAIN[info.type.name]).reshape(info.shape)
    return _dequantize(raw, info.type, info.shape)


def _rotary_order(rows: int, heads: int) -> np.ndarray:
    """Where Hugging Face's rows lie in the file, which keeps the two rows of a rotary pair next to each other."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    out = _aligned_empty((math.prod(shape[:-1]), shape[-1]))
    rows = raw.reshape(len(out), -1)
    step = max(1, SLICE_WEIGHTS // shape[-1])
    for start in range(0, len(out), step):
        out[start : start + step] = dequantize(rows[start : start + step], kind)
    return out.reshape(shape)


def _aligned_empty(shape: tuple[int, int]) -> np.ndarray:
    """f32, not initialised, on an address that the CPU backend takes over as it is, where another would be copied."""
    buffer = np.empty(math.prod(shape) * 4 + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + math.prod(shape) * 4].view(np.float32).reshape(shape)
