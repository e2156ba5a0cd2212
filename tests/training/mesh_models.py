"""A small quantized model with adapters that do something, and batches, for tests on eight virtual devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.config import LoraArgs
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.quant import quantize
from tests.io.tiny_models import random_weights, tiny_config

WHOLE_VOCABULARY, CUT_VOCABULARY = 509, 512  # 509 is prime, so tables of so many rows are whole on every device


def mesh_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    """A config.json whose projections and adapters of rank 16 divide by eight."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    return tiny_config(vocab_size=vocabulary, **sizes | changes)


def mesh_parts(
    config: dict[str, Any], *, dtype: str = "float32", lora: LoraArgs | None = None, head: HeadSpec | None = None
) -> ModelParts:
    """The parts of a model of `config` with random weights on one device; no adapter is zero, no vector as drawn."""
    features, tensors = model_config(config), random_weights(config)
    model = CausalLM(features, WeightFormat(dtype=dtype))
    for slot in slots_of(model):
        layers = [_leaf(slot.leaf, tensors[name]) for name in slot.names]
        value = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if slot.stacked else layers[0]
        _variable(model, slot.path).set_value(value)
    attach_method(model, lora or LoraArgs(rank=16), jax.random.key(0))
    if head is not None:
        model.add_sequence_head(head, jax.random.key(1))
    parts, rng = partition(model), np.random.default_rng(7)

    def trained(leaf: jax.Array) -> jax.Array:
        noise = rng.normal(0, 0.02, leaf.shape)
        is_vector = leaf.ndim == 2
        return jnp.asarray(np.asarray(leaf) * (1 + noise) if is_vector else noise, leaf.dtype)

    return parts.with_lora(jax.tree.map(trained, parts.lora))


def mesh_batch(config: dict[str, Any], shape: tuple[int, int, int], seed: int = 1) -> dict[str, jax.Array]:
    """A batch [A, B, T] whose rows have very different numbers of supervised tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config["vocab_size"], (*shape[:2], shape[2] + 1), dtype=np.int32)
    starts = rng.integers(1, shape[2], shape[:2])
    weights = np.arange(shape[2])[None, None] >= starts[..., None]
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights.astype(np.float32)}
    return jax.tree.map(jnp.asarray, batch)


def _leaf(leaf: Any, tensor: np.ndarray) -> Any:
    if not isinstance(leaf, QTensor):
        return jnp.asarray(tensor, leaf.dtype)
    return dataclasses.replace(repack(quantize(tensor), leaf.layout), dtype=leaf.dtype)


def _variable(model: CausalLM, path: tuple[Any, ...]) -> Any:
    found: Any = model
    for name in path:
        found = getattr(found, str(name))
    return found
