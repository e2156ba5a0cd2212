"""Programs of an evaluation lowered from shapes alone, before there is a weight: what memory they will want."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import combine

AnyParts = tuple[nnx.GraphDef, Any, Any]  # a model's, their leaves arrays or ShapeDtypeStructs


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
    shape: str, function: Any, model: AnyParts, inputs: tuple[Any, ...], beside: int = 0, **static: Any
) -> Ahead:
    """`function(*model, *inputs, **static)`, a jitted function.

    Args:
      beside: bytes that stay on the device meanwhile and are no input.
    """
    return Ahead(shape, function.lower(*model, *inputs, **static), bytes_of(inputs) + beside)


def config_of(parts: AnyParts) -> ModelConfig:
    """The model's features."""
    graphdef, lora, base = parts
    found: list[ModelConfig] = []
    jax.eval_shape(lambda lora, base: found.append(combine(graphdef, lora, base).config), lora, base)
    return found[0]


def bytes_of(tree: Any) -> int:
    """Of arrays, or of ShapeDtypeStructs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
