"""Layers that a checkpoint holds in 4 bits already, beside layers that it leaves in 16."""

import dataclasses

from qlora_jax.io.entries import ModelSource
from qlora_jax.io.inventory import layer_name
from qlora_jax.models.config import ModelConfig, WeightFormat


def as_held(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """`weights`, and which layers stay dense, since the files leave them in 16 bit and quantize others.

    Where the files quantize none, every layer is quantized as `weights` says.
    """
    if weights.quant_type is None:
        return weights
    dense = {name: _dense_layers(name, source, config) for name in config.linear_shapes()}
    if all(len(layers) == config.num_layers for layers in dense.values()):
        return weights
    return dataclasses.replace(weights, dense=tuple((name, layers) for name, layers in dense.items() if layers))


def _dense_layers(name: str, source: ModelSource, config: ModelConfig) -> tuple[int, ...]:
    names = [
        config.hugging_face_name(layer_name(f"model.layers.{name}.weight", layer)) for layer in range(config.num_layers)
    ]
    entries = [source.tensors.get(each) for each in names]  # what is missing is told by the loader
    return tuple(layer for layer, entry in enumerate(entries) if entry is not None and entry.held is None)
