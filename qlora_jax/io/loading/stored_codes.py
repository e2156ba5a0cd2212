"""Finds the format in which a model's files store each layer: codes that are kept as they are, or 16 bits."""

import dataclasses
from collections.abc import Iterable, Iterator

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from qlora_jax.io.tensor_map import check_number_of_experts
from qlora_jax.model_source import ACT_ORDER, ModelSource, TensorEntry
from qlora_jax.models.config import DENSE, STORED, ModelConfig, WeightFormat, count_by_type
from qlora_jax.models.tensor_names import expert_name, layer_name

Entries = list[TensorEntry]  # the tensors of one layer: one, or one per expert


def with_stored_codes(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """Returns the format of the files' own codes.

    For files in 4 bits of bitsandbytes that is the format of these, for others the block format of each layer. Layers
    in 16 or 32 bits stay dense.

    Raises:
      ValueError: no linear layer is stored in codes, GPTQ has reordered the columns of one, or the experts of a layer
        differ in their types; or the config gives rows that are not whole blocks.
    """
    layers = {
        name: [*layer_entries(name, source, config)] for name in (*config.linear_shapes(), *config.expert_shapes())
    }
    entries = [entry for each in layers.values() for layer in each for entry in layer]
    if reordered := [entry.name for entry in entries if entry.file_type == ACT_ORDER]:
        raise ValueError(
            f"model.quant_type: found 'stored', but {source.path} has {len(reordered)} layers whose groups are not "
            f"runs of columns, because calibration reordered them (act-order), such as {reordered[0]}. Set "
            "model.quant_type=nf4, which dequantizes and quantizes again, or give files made with desc_act=false"
        )
    stored = tuple((name, tuple(_format(each, source) for each in found)) for name, found in layers.items())
    if of_bnb := [entry.read_quantized for entry in entries if entry.read_quantized is not None]:
        first = of_bnb[0]()
        names = ("quant_type", "block_size", "double_quant", "nested_block_size")
        return dataclasses.replace(weights, **{name: getattr(first, name) for name in names})
    if not any(entry.read_stored for entry in entries):
        kinds = ", ".join(sorted({entry.file_type for entry in entries}))
        raise ValueError(
            f"model.quant_type: found 'stored', but {source.path} has no codes to keep (found linear layers in "
            f"{kinds}, expected a quantized GGUF file, MXFP4, NVFP4, FP8, or the codes of GPTQ, AWQ, "
            "compressed-tensors or bitsandbytes). Set model.quant_type=nf4, which quantizes while loading"
        )
    _check_whole_blocks(stored, source, config)
    return dataclasses.replace(weights, quant_type=STORED, stored=stored)


def _check_whole_blocks(
    stored: Iterable[tuple[str, tuple[str, ...]]], source: ModelSource, config: ModelConfig
) -> None:
    """Raises ValueError if the config gives rows that are not whole blocks of the files' codes."""
    columns = {name: inputs for name, ((_, inputs), _) in config.linear_shapes().items()}
    columns |= {name: inputs for name, (_, inputs) in config.expert_shapes().items()}
    wrong = [
        f"{name}: found {columns[name]} columns, expected a multiple of {BLOCK_FORMATS[form].weights} for {form}"
        for name, formats in stored
        for form in dict.fromkeys(formats)
        if form in BLOCK_FORMATS and columns[name] % BLOCK_FORMATS[form].weights
    ]
    if wrong:
        lines = "\n  ".join(["", *wrong])
        raise ValueError(f"{source.path}: its config and its codes contradict each other. Download it again:{lines}")


def stored_types(source: ModelSource, config: ModelConfig) -> str:
    """Returns the types of the codes that `stored` keeps of a source's linear layers; empty if there are none."""
    names = (*config.linear_shapes(), *config.expert_shapes())
    layers = [layer for name in names for layer in layer_entries(name, source, config)]
    counts = count_by_type(layer[0].file_type for layer in layers if layer and layer[0].read_stored)
    return f"{source.coded_by}, {counts}" if counts and source.coded_by else counts


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


def with_dense_layers(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """`weights` with the layers that stay dense because the files quantize only the others.

    If the files quantize no layer, every layer is quantized to `weights`. Routed experts always are, unless stored
    codes are kept: files of bitsandbytes leave them in 16 bits because it cannot quantize them, not for the sake of
    accuracy.

    Raises:
      ValueError: `weights` has dense layers that the files store in 4 bits, or keeps stored codes and there are
        none; or the files have fewer tensors than the config has experts.
    """
    check_number_of_experts(source, config)
    if keeps_codes := weights.quant_type == STORED:
        weights = with_stored_codes(weights, source, config)
    if weights.quant_type in (None, STORED):
        return weights
    names = (*config.linear_shapes(), *config.expert_shapes())
    dense = {name: _dense_layers(name, source, config) for name in names}
    if all(len(layers) == len(config.layers_with(name)) for name, layers in dense.items()):
        return weights
    lost = {name: sorted(set(rows) - set(dense.get(name, rows))) for name, rows in weights.dense}
    layers_of = {name: [config.layers_with(name)[row] for row in rows] for name, rows in lost.items()}
    if texts := [f"{name} of layers {', '.join(map(str, layers))}" for name, layers in layers_of.items() if layers]:
        raise ValueError(
            f"model.keep_16bit: {source.path} stores {'; '.join(texts)} in 4 bits, so their 16-bit weights are not "
            "known. Remove these names, or give the 16-bit model"
        )
    if not keeps_codes:
        kept = dict(weights.dense)
        dense |= {name: kept.get(name, ()) for name in config.expert_shapes()}
    return dataclasses.replace(weights, dense=tuple((name, rows) for name, rows in dense.items() if rows))


def _dense_layers(name: str, source: ModelSource, config: ModelConfig) -> tuple[int, ...]:
    """Returns the rows of a projection's stack that the files have in 16 bits."""
    layers = enumerate(layer_entries(name, source, config))
    return tuple(row for row, entries in layers if entries and not any(entry.read_quantized for entry in entries))
