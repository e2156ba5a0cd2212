"""Finds the codes that a model's files store, for `model.quant_type=stored`, which keeps them as they are."""

import dataclasses
from collections.abc import Iterator

from qlora_jax.io.model_source import ModelSource, TensorEntry
from qlora_jax.io.tensor_map import expert_name, layer_name
from qlora_jax.models.config import DENSE, STORED, ModelConfig, WeightFormat

Entries = list[TensorEntry]  # of one layer: one tensor, or one per expert


def with_stored_codes(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """Returns the format of the files' own codes.

    For files in 4 bits of bitsandbytes that is the format of these, for others the ggml type of each layer. Layers in
    16 or 32 bits stay dense.

    Raises:
      ValueError: no linear layer is stored in codes, or the experts of a layer differ in their types.
    """
    layers = {
        name: [*layer_entries(name, source, config)] for name in (*config.linear_shapes(), *config.expert_shapes())
    }
    entries = [entry for each in layers.values() for layer in each for entry in layer]
    stored = tuple((name, tuple(_format(each, source) for each in found)) for name, found in layers.items())
    if of_bnb := [entry.read_quantized for entry in entries if entry.read_quantized is not None]:
        first = of_bnb[0]()
        names = ("quant_type", "block_size", "double_quant", "nested_block_size")
        return dataclasses.replace(weights, **{name: getattr(first, name) for name in names})
    if not any(entry.read_stored for entry in entries):
        kinds = ", ".join(sorted({entry.file_type for entry in entries}))
        raise ValueError(
            f"model.quant_type: found 'stored', but {source.path} has no codes to keep (found linear layers in "
            f"{kinds}, expected a quantized GGUF file, MXFP4, or 4 bits of bitsandbytes). Set model.quant_type=nf4, "
            "which quantizes while loading"
        )
    return dataclasses.replace(weights, quant_type=STORED, stored=stored)


def layer_entries(name: str, source: ModelSource, config: ModelConfig) -> Iterator[Entries]:
    """Yields the tensors of each layer of a projection; `check_tensors` reports missing ones."""
    count = 0 if config.experts is None or name not in config.expert_shapes() else config.experts.count
    for layer in config.layers_with(name):
        stacked = layer_name(f"model.layers.{name}.weight", layer)
        names = [expert_name(stacked, expert) for expert in range(count)] if count else [stacked]
        found = [source.tensors.get(config.hugging_face_name(each)) for each in names]
        yield [entry for entry in found if entry is not None]


def _format(layer: Entries, source: ModelSource) -> str:
    found = {entry.file_type if entry.read_stored or entry.read_quantized else DENSE for entry in layer}
    if len(found) > 1:
        raise ValueError(
            f"{source.path}: the experts of a layer must have one type, such as those of {layer[0].name} (found "
            f"{', '.join(sorted(found))}). Quantize while loading: set model.quant_type=nf4"
        )
    return found.pop() if found else DENSE
