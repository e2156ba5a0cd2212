"""The adapters of several runs on one base, of which each request has one or none."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition, prepare_for_decoding
from qlora_jax.nn.frozen_weight import MixedStack, Weight
from qlora_jax.nn.linear import BatchedAdapter, LinearAdapter, QLinear
from qlora_jax.nn.request_adapters import RequestAdapters

type ByProjection = Mapping[str, LinearAdapter]


def adapters_of(name: str, parts: ModelParts) -> ByProjection:
    """Returns the adapters of a run's model by projection, prepared for decoding.

    Raises:
      ValueError: the run trained something that requests with different runs cannot share a batch with.
    """
    model = combine(prepare_for_decoding(parts))
    found = {path: linear.adapter for path, linear in _linears(model) if linear.adapter is not None}
    alone = sorted({name for name in parts.lora if name not in found})
    alone += [path for path, adapter in found.items() if type(adapter).for_batch is None]
    if alone:
        shown = f"{alone[0]}" + (f" and {len(alone) - 1} more" if len(alone) > 1 else "")
        raise ValueError(
            f"{name}: cannot share a batch with other runs (found what it trained on {shown}, expected adapters of "
            "projections whose method has for_batch). Serve it alone, or export it merged"
        )
    return {path: adapter for path, adapter in found.items() if adapter is not None}


def with_adapters(parts: ModelParts, runs: Mapping[int, ByProjection], count: int) -> ModelParts:
    """Returns the model with adapters of runs by their numbers, which are above 0 and below `count`.

    Raises:
      ValueError: the model has an adapter itself.
    """
    model = combine(parts)
    if parts.lora:
        raise ValueError(
            "adapters: the model has an adapter itself. Open its base, and name this run as an adapter too"
        )
    for path, linear in _linears(model):
        own = {number: adapters[path] for number, adapters in runs.items() if path in adapters}
        if own:
            layers = _layers(linear.weight.get_value())
            linear.adapter = RequestAdapters(_batched(own, count, layers), jnp.zeros(1, jnp.int32))
    return partition(model)


def _layers(stack: Weight) -> int:
    """Returns the number of layers of a stack of any format; a quantized one has the shape of a single layer."""
    return stack.num_layers if isinstance(stack, MixedStack) else jax.tree.leaves(stack)[0].shape[0]


def _batched(own: Mapping[int, LinearAdapter], count: int, layers: int) -> list[BatchedAdapter]:
    """Returns the adapters of a projection, those of each method together."""
    batched = []
    for kind in dict.fromkeys(map(type, own.values())):
        assert kind.for_batch is not None, "`adapters_of` refuses other methods"
        adapters = [own.get(number) if type(own.get(number)) is kind else None for number in range(count)]
        batched.append(kind.for_batch(adapters, layers))
    return batched


def _linears(model: CausalLM) -> Iterator[tuple[str, QLinear]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QLinear):
            yield ".".join(map(str, path)), node
