"""The Variable of frozen arrays. Arrays that optax trains are `nnx.LoRAParam`s."""

from typing import Any, NamedTuple

import jax
from flax import nnx

StatePath = tuple[Any, ...]  # keys of a state; flax's protocol for them cannot be checked at run time


class Frozen(nnx.Variable):
    """A leaf of the base model, which is never differentiated and never given to an optimizer.

    Holds an array or a QTensor. Where layers are stacked, every leaf has a leading axis of layers.
    """


class TrainedLeaf(NamedTuple):
    """An array of a module that trains.

    Fields:
      name: of the attribute, an `nnx.LoRAParam`.
      vector: it stays in f32 when a model is prepared for decoding.
      trained: False: it has no gradient and no optimizer state, but checkpoints have it.
    """

    name: str
    vector: bool = False
    trained: bool = True


def select_layer(stack: jax.Array, layer: jax.Array | int | None) -> jax.Array:
    """Returns one layer of a stacked array, or the whole array if `layer` is None."""
    return stack if layer is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
