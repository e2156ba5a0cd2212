"""The two kinds of array a model holds: frozen ones, and those that optax trains (`nnx.LoRAParam`)."""

from typing import Any

import jax
from flax import nnx


class Frozen(nnx.Variable):
    """A leaf of the base model: never differentiated, never given to an optimizer.

    Holds an array, or a QTensor; where layers are stacked every leaf has a leading axis of layers.
    """


def of_layer(variable: nnx.Variable, layer: jax.Array | int | None) -> Any:
    """The value of one layer of a stacked array Variable, or the whole value where `layer` is None."""
    value = variable.get_value()
    return value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
