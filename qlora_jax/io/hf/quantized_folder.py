"""Writes a model as a folder for transformers, one tensor at a time, quantized in a form of FORMS or in 16 bits."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from qlora_jax.io.hf.bnb_writer import BITSANDBYTES
from qlora_jax.io.hf.compressed_tensors_writer import COMPRESSED_INTEGERS, COMPRESSED_MXFP4, COMPRESSED_NVFP4
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
from qlora_jax.io.loading.loader import Progress, check_stored_quantization
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.rounding import rounded
from qlora_jax.io.tensor_map import Slot, check_tensors, slots_of
from qlora_jax.model_source import ModelSource, prefetch
from qlora_jax.models.config import INT4, MXFP4, NVFP4, ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import ALONE, OTHER_PARTS
from qlora_jax.models.precision import check_whole_blocks
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.untrusted_json import JsonObject

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
FORMS = dict.fromkeys(CODE_TABLES, BITSANDBYTES) | {  # by WeightFormat.quant_type
    NVFP4: COMPRESSED_NVFP4,
    INT4: COMPRESSED_INTEGERS,
    MXFP4: COMPRESSED_MXFP4,
}
# (slot, index of a name) -> the tensor: codes, or dense values
Tensors = Callable[[Slot, int], object]


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
    stored = any(each.file_type.startswith("NVFP4") for each in source.tensors.values())
    if tensors is None and weights.quant_type == NVFP4 and stored:
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
    form = FORMS.get(weights.quant_type or "")
    quantization = {} if form is None else {"quantization_config": form.config(weights, skipped)}
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
    return spec if weights.quant_type in FORMS and len(slot.stack) == 1 else None


def _tensor_specs(slot: Slot, index: int, weights: WeightFormat, name: str) -> Iterator[TensorSpec]:
    """The tensors of one weight, in the order of `CodesForm.values`; `name` is the weight's name in the file."""
    spec = _quantization_of(slot, index, weights)
    if spec is None:
        yield TensorSpec(name, written_dtype(slot, DTYPES[weights.dtype]), slot.shape)
        return
    yield from FORMS[weights.quant_type or ""].specs(name, slot.shape, weights)


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
        if spec is not None:
            form = FORMS[weights.quant_type or ""]
            if tensors is None:
                assert form.quantize is not None, "`quantize` does not offer this form"
                code = form.quantize(source, entry, spec)
            else:
                code = tensors(slot, index)
            yield from form.values(code, weights.dtype)
        else:
            dense = entry.read() if tensors is None else np.asarray(tensors(slot, index))
            yield rounded(entry.name, dense, written_dtype(slot, DTYPES[weights.dtype]))
        done += entry.nbytes
        progress(done, total, entry.name)
