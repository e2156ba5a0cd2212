"""Products with a frozen weight in packed codes: their gradient, their rule for vmap, and checks of the operands.

Dimension key: M rows, N out, K in, L layers.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

DTYPES = ("bfloat16", "float16", "float32")

Layer = Int[Array, ""] | int | None
Direction = Literal["forward", "backward"]
FAST = "fast"  # in place of an implementation: the fastest, also one that rounds x to 8 bits
Weights = PyTree  # packed codes: QTensor or GgmlTensor


class FrozenProduct(NamedTuple):
    """A product x W^T with a frozen W.

    Attributes:
      apply: (x_MK, weights, layer, implementation) -> y_MN, differentiable in x. The residuals are `weights` and
        `layer` as given.
      one_way: (direction, rows, weights, layer, implementation) -> [M, N] forward, [M, K] backward.
    """

    apply: Callable[..., jax.Array]
    one_way: Callable[..., jax.Array]


def differentiable(
    one_way: Callable[[Direction, jax.Array, Weights, PyTree, str | None], jax.Array],
) -> Callable[..., jax.Array]:
    """Returns the function (x, weights, place, implementation) -> x W^T, differentiable in x only.

    Args:
      one_way: computes a direction: (direction, rows, weights, place, implementation). The residuals are `weights` and
        `place`, such as the index of a layer, as given.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def apply(x: jax.Array, weights: Weights, place: PyTree, implementation: str | None) -> jax.Array:
        return one_way("forward", x, weights, place, implementation)

    def forward(x, weights, place, implementation):
        return one_way("forward", x, weights, place, implementation), (weights, place)

    def backward(implementation, residuals, dy):
        weights, place = residuals
        return one_way("backward", dy, weights, place, implementation), None, None

    apply.defvjp(forward, backward)
    return apply


def frozen_product(run: Callable[[Direction, jax.Array, Weights, Layer, str | None], jax.Array]) -> FrozenProduct:
    """Returns the product whose directions `run` computes: (direction, rows, weights, layer, implementation)."""

    def one_way(
        direction: Direction, rows: jax.Array, weights: Weights, layer: Layer, implementation: str | None = None
    ) -> jax.Array:
        return _mappable(run, direction, implementation)(rows, weights, layer)

    return FrozenProduct(differentiable(one_way), one_way)


@functools.cache
def _mappable(
    run: Callable[..., jax.Array], direction: Direction, implementation: str | None
) -> Callable[..., jax.Array]:
    """Returns `run` with a rule for vmap: an axis of only the rows is folded into them; others run in sequence."""

    @jax.custom_batching.custom_vmap
    def mapped_product(rows, weights, layer):
        return run(direction, rows, weights, layer, implementation)

    @mapped_product.def_vmap
    def _(size, mapped, rows, weights, layer):
        if any(jax.tree.leaves(mapped[1:])):

            def one(at):
                return mapped_product(
                    *jax.tree.map(lambda leaf, is_mapped: leaf[at] if is_mapped else leaf, given, tuple(mapped))
                )

            given = (rows, weights, layer)
            return jax.lax.map(one, jax.numpy.arange(size)), True
        folded = mapped_product(rows.reshape(-1, rows.shape[-1]), weights, layer)
        return folded.reshape(*rows.shape[:-1], folded.shape[-1]), True

    return mapped_product


def operand_problems(
    x: jax.Array | np.ndarray, shape: tuple[int, ...], stack_shape: tuple[int, ...], layer: Layer
) -> Iterator[str]:
    """Yields every reason why x, a weight of this shape, and a layer of its stack do not fit."""
    if x.ndim == 0:
        yield "x is a scalar, expected at least one axis, of length K"
    if str(x.dtype) not in DTYPES:
        yield f"x has dtype {x.dtype}, expected one of {', '.join(DTYPES)}"
    if len(shape) != 2:
        yield f"weights have shape {shape}, expected a matrix (N, K)"
    elif x.ndim and x.shape[-1] != shape[1]:
        yield f"x has K={x.shape[-1]} as its last axis, the weight {shape} (N, K) has K={shape[1]}"
    yield from _layer_problems(stack_shape, layer)


def _layer_problems(stack_shape: tuple[int, ...], layer: Layer) -> Iterator[str]:
    if len(stack_shape) != (layer is not None):
        wanted = "one leading axis of layers" if layer is not None else "no leading axes"
        yield f"{layer=} requires weights with {wanted}, found {stack_shape=}"
    elif layer is not None and not isinstance(layer, jax.Array) and not 0 <= operator.index(layer) < stack_shape[0]:
        # An index out of range would silently be clamped to another layer's weight.
        yield f"{layer=} is out of range for a stack of {stack_shape[0]} layers"
