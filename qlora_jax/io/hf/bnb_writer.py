"""The form of bitsandbytes' 4-bit weights in folders for transformers."""

import json
import math
from collections.abc import Iterator

import numpy as np

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map
from qlora_jax.io.hf.model_writer import CodesForm, TensorSpec
from qlora_jax.io.loading.loader import read_quantized
from qlora_jax.models.config import WeightFormat
from qlora_jax.untrusted_json import JsonObject

BYTES, F32 = np.dtype(np.uint8), np.dtype(np.float32)
STATE_BYTES = 512  # size of a quant_state: spaces pad its JSON, because the header is written first


def _specs(name: str, shape: tuple[int, ...], weights: WeightFormat) -> Iterator[TensorSpec]:
    blocks = -(-math.prod(shape) // weights.block_size)
    yield TensorSpec(name, BYTES, (-(-math.prod(shape) // 2), 1))
    yield TensorSpec(f"{name}.absmax", BYTES if weights.double_quant else F32, (blocks,))
    yield TensorSpec(f"{name}.quant_map", F32, (16,))
    if weights.double_quant:
        yield TensorSpec(f"{name}.nested_absmax", F32, (-(-blocks // weights.nested_block_size),))
        yield TensorSpec(f"{name}.nested_quant_map", F32, (256,))
    yield TensorSpec(f"{name}.quant_state.bitsandbytes__{weights.quant_type}", BYTES, (STATE_BYTES,))


def _values(weight: QTensor, dtype: str) -> Iterator[np.ndarray]:
    """Yields codes, constants, tables and quant_state of one weight."""
    state: JsonObject = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    yield np.asarray(weight.codes)
    yield np.asarray(weight.absmax_codes if weight.double_quant else weight.absmax)
    yield CODE_TABLES[weight.quant_type]
    if weight.double_quant:
        yield np.asarray(weight.nested_absmax)
        yield dynamic_map()
        nested = {"nested_blocksize": weight.nested_block_size, "nested_dtype": "float32"}
        state |= nested | {"nested_offset": float(np.asarray(weight.nested_offset))}
    text = json.dumps(state).encode()
    assert len(text) <= STATE_BYTES, text
    yield np.frombuffer(text.ljust(STATE_BYTES), np.uint8)


def _config(weights: WeightFormat, skipped: list[str]) -> JsonObject:
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": weights.quant_type,
        "bnb_4bit_use_double_quant": weights.double_quant,
        "bnb_4bit_compute_dtype": weights.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }


BITSANDBYTES = CodesForm(specs=_specs, quantize=read_quantized, values=_values, config=_config)
