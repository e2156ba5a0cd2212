"""Measures what 4 bits cost a model: the loss on rows with one layer of one projection quantized, all else in 16 bits.

The increase over the loss with everything in 16 bits is the layer's cost. Each layer takes one evaluation; all run the
same compiled programs, because only the values of one stack change. The experts of a layer are quantized together.
Memory holds the model in 16 bits, and one layer of one projection, with all its experts, once more.

Dimension key: R rows, C layers of projections.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from qlora_jax.measures.metrics import RowScores
from qlora_jax.measures.statistics import Weights, bootstrap_t, ratio
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.precision import full_names, layer_bytes, projections
from qlora_jax.nn.experts import ExpertLinear
from qlora_jax.nn.linear import QLinear
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import dequantize, quantize

Place = tuple[str, int]  # (projection's name within a layer, row of its stack)
Progress = Callable[[int, int, str], None]  # (evaluations done, evaluations in all, name of the layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The cost of one layer of one projection in 4 bits.

    Attributes:
      place: the projection's name within a layer, and the row of its stack.
      name: Hugging Face's full name.
      increase: of the loss, in nats per token.
      interval: 95 % interval of the increase, as `bootstrap_t` computes it.
      added_bytes: bytes that the layer takes in 16 bits beyond those in 4 bits.
    """

    place: Place
    name: str
    increase: float
    interval: tuple[float, float]
    added_bytes: int


def measure_layers(
    parts: ModelParts,
    score: Callable[[ModelParts], RowScores],
    weights: WeightFormat,
    progress: Progress = lambda done, total, name: None,
) -> tuple[RowScores, list[LayerCost]]:
    """Returns (scores of the model in 16 bits, the cost of each layer, the largest first).

    Args:
      parts: the model in 16 bits, without adapters; its arrays are used up.
      score: returns the scores of rows under a model.
      weights: the 4-bit format, and the dtype of layers in 16 bits.
    """
    config = combine(parts).config
    names = full_names(config)
    base = score(parts)
    scores: dict[Place, RowScores] = {}
    for place, quantized in quantized_one_by_one(parts, weights):
        scores[place] = score(quantized)
        progress(len(scores), len(names), names[place])
    return base, _costs(base, scores, config, weights)


def quantized_one_by_one(parts: ModelParts, weights: WeightFormat) -> Iterator[tuple[Place, ModelParts]]:
    """Yields (place, the model with this layer rounded to 4 bits and all others as they are).

    A layer is replaced within its stack and put back before the next one, so the arrays of `parts` and of the models
    that were yielded are used up.
    """
    model = combine(parts)
    for name, row in full_names(model.config):
        module = operator.attrgetter(f"model.layers.{name}")(model)
        original = module.weight.get_value()[row]
        _replace_layer(module, row, _rounded_layer(original, weights))
        yield (name, row), partition(model)
        _replace_layer(module, row, original)


def _replace_layer(module: QLinear | ExpertLinear, row: int, layer: jax.Array) -> None:
    module.weight = Frozen(_with_layer(module.weight.get_value(), np.int32(row), layer))


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(stack: jax.Array, row: jax.Array | np.int32, layer: jax.Array) -> jax.Array:
    return stack.at[row].set(layer)


def _rounded_layer(layer: jax.Array, weights: WeightFormat) -> jax.Array:
    """Returns one layer [N, K], or its experts [E, N, K], after quantization weight by weight."""
    if layer.ndim == 2:
        return round_trip(layer, weights)
    return jnp.stack([round_trip(expert, weights) for expert in layer])


def round_trip(weight: jax.Array, weights: WeightFormat) -> jax.Array:
    """Returns the weight after quantization to 4 bits, in its own dtype."""
    settings = {name: getattr(weights, name) for name in ("block_size", "double_quant", "nested_block_size")}
    return dequantize(quantize(weight, quant_type=str(weights.quant_type), **settings), weight.dtype)


def _costs(
    base: RowScores, scores: Mapping[Place, RowScores], config: ModelConfig, weights: WeightFormat
) -> list[LayerCost]:
    names = full_names(config)
    sizes = {name: layer_bytes(name, config, weights) for name in projections(config)}
    intervals = increase_intervals(base.nll, np.stack([each.nll for each in scores.values()], axis=1), base.tokens)
    costs = [
        LayerCost(
            place=place,
            name=names[place],
            increase=each.mean_nll - base.mean_nll,
            interval=(float(low), float(high)),
            added_bytes=sizes[place[0]][1] - sizes[place[0]][0],
        )
        for (place, each), (low, high) in zip(scores.items(), intervals.T, strict=True)
    ]
    return sorted(costs, key=lambda cost: -cost.increase)


def increase_intervals(
    base_R: Float64[np.ndarray, " R"], other_RC: Float64[np.ndarray, "R C"], tokens: Weights
) -> Float64[np.ndarray, "2 C"]:
    """Returns the ends of the 95 % interval of each column's increase, as `paired_bootstrap` of each pair does."""
    changes = [np.stack([other_R - base_R, tokens], axis=1) for other_R in other_RC.T]
    return np.array(bootstrap_t(changes, ratio)).T
