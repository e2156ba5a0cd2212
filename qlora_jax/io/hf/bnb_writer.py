"""Writes a model as a folder for transformers, one tensor at a time: in 4 bits of bitsandbytes, NVFP4, or 16 bits."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from pallas_kernels.formats.ggml_blocks import NVFP4_GROUP
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map
from qlora_jax.io.hf.fused_experts import name_in_files
from qlora_jax.io.hf.model_writer import (
    TensorSpec,
    in_file_order,
    joined_specs,
    joined_values,
    other_tensors,
    write_config,
    write_safetensors,
    written_dtype,
)
from qlora_jax.io.hf.reader import SINGLE
from qlora_jax.io.loading.loader import Progress, check_stored_quantization, read_finite, read_quantized
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.rounding import rounded
from qlora_jax.io.tensor_map import Slot, check_tensors, slots_of
from qlora_jax.metadata import JsonObject
from qlora_jax.model_source import ModelSource, prefetch
from qlora_jax.models.config import NVFP4, ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import ALONE, OTHER_PARTS
from qlora_jax.models.precision import check_whole_blocks
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.nn.frozen_weight import ops_of
from qlora_jax.quant.nvfp4 import E4M3, quantize_nvfp4

BYTES, F32 = np.dtype(np.uint8), np.dtype(np.float32)
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": F32}
STATE_BYTES = 512  # size of a quant_state: spaces pad its JSON, because the header is written first
# (slot, index of a name) -> the tensor: codes, or dense values
Tensors = Callable[[Slot, int], object]
_NVFP4_WEIGHTS: JsonObject = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": NVFP4_GROUP,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_NVFP4_CONFIG: JsonObject = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _NVFP4_WEIGHTS, "input_activations": None}},
}


def write_quantized_folder(
    folder: Path, source: ModelSource, weights: WeightFormat, progress: Progress, tensors: Tensors | None = None
) -> None:
    """Writes config.json and model.safetensors with linear layers quantized to `weights`.

    All other tensors, and linear layers that stay dense, are written in `weights.dtype`. So are routed experts, which
    bitsandbytes cannot read in 4 bits; they are quantized when this package loads the folder. A multimodal checkpoint
    keeps its tensors' names, and the tensors of its other parts unchanged.

    Args:
      tensors: returns the model's tensors, with all projections in codes; None: those of the source.

    Raises:
      ValueError: as `load_model`, or the files are in NVFP4 already.
    """
    features = model_config(source.config, source.config_name)
    check_whole_blocks(weights, features)
    if weights.quant_type == NVFP4 and any(each.file_type.startswith("NVFP4") for each in source.tensors.values()):
        raise ValueError(
            f"{source.path}: already in NVFP4, and weights are never quantized twice. Use this folder, or the model in "
            "16 bits"
        )
    if tensors is None:
        weights = with_dense_layers(weights, source, features)
    slots = slots_of(nnx.eval_shape(lambda: CausalLM(features, weights)))
    check_tensors(source, {name: slot.shape for slot in slots for name in slot.names}, features)
    if tensors is None:
        check_stored_quantization(source, slots)
    names = in_file_order(slots, source.config)
    names_in_file = {} if source.multimodal is None else source.multimodal.names
    text = [
        spec
        for slot, index in names
        for spec in _tensor_specs(slot, index, weights, _name(slot.names[index], source.config, names_in_file))
    ]
    others, unchanged = other_tensors(source.multimodal, DTYPES[weights.dtype])
    written = joined_values(text, _values(source, names, weights, progress, tensors), source.config)
    values = itertools.chain(written, unchanged)
    write_safetensors(folder / SINGLE, [*joined_specs(text, source.config), *others], values)
    skipped = _modules_in_16_bits(weights, features, source.config)
    skipped += [f"{ALONE}.{part}" for part in OTHER_PARTS if source.multimodal is not None]
    quantization = _quantization_config(weights, skipped)
    write_config(folder, source.config, {"torch_dtype": weights.dtype, **quantization})


def _modules_in_16_bits(weights: WeightFormat, features: ModelConfig, config: JsonObject) -> list[str]:
    """Returns transformers' full names of linear layers that the folder has in 16 bits.

    Routers and experts are included: transformers 4 has them as linear layers, some under the names in files, and
    would expect them in 4 bits.
    """
    experts = features.experts
    dense = [(name, features.layers_with(name)[row]) for name, rows in weights.dense for row in rows]
    if experts is not None:
        sparse = ("mlp.gate", "mlp.experts", *(["mlp.shared_expert_gate"] if experts.shared_gate else []))
        dense = [each for each in dense if each[0] not in features.expert_shapes()]
        dense += [(name, layer) for layer in experts.layers for name in sparse]
    in_class = [features.hugging_face_name(layer_name(f"model.layers.{name}", layer)) for name, layer in dense]
    in_files = [name_in_files(config, f"{name}.").removesuffix(".") for name in in_class]
    return list(dict.fromkeys([features.hugging_face_name("lm_head"), *in_class, *in_files]))


def _name(name: str, config: JsonObject, names_in_file: Mapping[str, str]) -> str:
    return name_in_files(config, names_in_file.get(name, name))


def _quantization_of(slot: Slot, index: int, weights: WeightFormat) -> QTensor | GgmlTensor | None:
    """Returns the leaf that describes a weight's codes; None if the folder gets it dense."""
    spec = slot.quantization_of(index)
    is_kept = ops_of(spec).of_file and weights.quant_type != NVFP4
    return None if is_kept or len(slot.stack) != 1 else spec


def _tensor_specs(slot: Slot, index: int, weights: WeightFormat, name: str) -> Iterator[TensorSpec]:
    """The tensors of one weight, in the order of `_parts`; `name` is the weight's name in the file."""
    spec = _quantization_of(slot, index, weights)
    if spec is None:
        yield TensorSpec(name, written_dtype(slot, DTYPES[weights.dtype]), slot.shape)
        return
    if isinstance(spec, GgmlTensor):
        stem, (rows, columns) = name.removesuffix(".weight"), slot.shape
        yield TensorSpec(f"{stem}.weight_packed", BYTES, (rows, columns // 2))
        yield TensorSpec(f"{stem}.weight_scale", E4M3, (rows, columns // NVFP4_GROUP))
        yield TensorSpec(f"{stem}.weight_global_scale", F32, (1,))
        return
    blocks = -(-math.prod(slot.shape) // weights.block_size)
    yield TensorSpec(name, BYTES, (-(-math.prod(slot.shape) // 2), 1))
    yield TensorSpec(f"{name}.absmax", BYTES if weights.double_quant else F32, (blocks,))
    yield TensorSpec(f"{name}.quant_map", F32, (16,))
    if weights.double_quant:
        yield TensorSpec(f"{name}.nested_absmax", F32, (-(-blocks // weights.nested_block_size),))
        yield TensorSpec(f"{name}.nested_quant_map", F32, (256,))
    yield TensorSpec(f"{name}.quant_state.bitsandbytes__{weights.quant_type}", BYTES, (STATE_BYTES,))


def _values(
    source: ModelSource,
    names: list[tuple[Slot, int]],
    weights: WeightFormat,
    progress: Progress,
    tensors: Tensors | None,
) -> Iterator[np.ndarray]:
    total, done = sum(source.tensors[slot.names[index]].nbytes for slot, index in names), 0
    entries = prefetch([source.tensors[slot.names[index]] for slot, index in names])
    for (slot, index), entry in zip(names, entries, strict=True):
        spec = _quantization_of(slot, index, weights)
        if isinstance(spec, GgmlTensor):
            made = quantize_nvfp4(read_finite(source, entry))
            yield made.codes[:, ::2] | made.codes[:, 1::2] << 4
            yield made.scales
            yield made.of_tensor[None]
        elif spec is not None:
            code = read_quantized(source, entry, spec) if tensors is None else tensors(slot, index)
            assert isinstance(code, QTensor), "all projections are in codes"
            yield from _parts(code, weights.dtype)
        else:
            dense = entry.read() if tensors is None else np.asarray(tensors(slot, index))
            yield rounded(entry.name, dense, written_dtype(slot, DTYPES[weights.dtype]))
        done += entry.nbytes
        progress(done, total, entry.name)


def _parts(weight: QTensor, dtype: str) -> Iterator[np.ndarray]:
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


def _quantization_config(weights: WeightFormat, skipped: list[str]) -> JsonObject:
    if weights.quant_type is None:
        return {}
    if weights.quant_type == NVFP4:
        return {"quantization_config": _NVFP4_CONFIG | {"ignore": skipped}}
    config = {
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
    return {"quantization_config": config}
