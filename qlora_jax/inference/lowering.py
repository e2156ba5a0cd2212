"""Programs of an evaluation lowered from shapes alone, before there is a weight: what memory they will want."""

from typing import Any, NamedTuple

import jax

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import ModelParts, combine


class Ahead(NamedTuple):
    """One program.

    Fields:
      shape: of its batch, in words.
      lowered: ready to compile.
      held: bytes that it is given, or that stay beside it, the model itself left out.
    """

    shape: str
    lowered: jax.stages.Lowered
    held: int


def lowered(
    shape: str, function: Any, model: ModelParts, inputs: tuple[Any, ...], beside: int = 0, **static: Any
) -> Ahead:
    """`function(model, *inputs, **static)`, a jitted function.

    Args:
      beside: bytes that stay on the device meanwhile and are no input.
    """
    return Ahead(shape, function.lower(model, *inputs, **static), bytes_of(inputs) + beside)


def config_of(parts: ModelParts) -> ModelConfig:
    """The model's features."""
    found: list[ModelConfig] = []
    jax.eval_shape(lambda parts: found.append(combine(parts).config), parts)
    return found[0]


def bytes_of(tree: Any) -> int:
    """Of arrays, or of ShapeDtypeStructs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
