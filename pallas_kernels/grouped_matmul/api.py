"""grouped_matmul: products of grouped rows with the frozen weights of their experts, and the rows' gradient.

Dimension key: P slots, I tiles, C rows per tile, S layers, E experts, N out, K in.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels.frozen_product import DTYPES
from pallas_kernels.grouped_matmul import loop
from pallas_kernels.grouped_matmul.experts import ExpertWeights, Layer, kind_of
from pallas_kernels.grouped_matmul.groups import Groups


class Implementation(NamedTuple):
    """One way to run the op."""

    forward: Callable[[jax.Array, ExpertWeights, Groups, Layer], jax.Array]
    backward: Callable[[jax.Array, ExpertWeights, Groups, Layer], jax.Array]


IMPLEMENTATIONS = {"loop": Implementation(loop.forward, loop.backward)}


def grouped_matmul(
    x_PK: Float[Array, "P K"],
    weights: ExpertWeights,
    groups: Groups,
    layer: Layer,
    implementation: str | None = None,
) -> Float[Array, "P N"]:
    """Computes y[p, n] = sum_k x[p, k] w[layer, expert of slot p, n, k], accumulated in f32, in x's dtype.

    Differentiable in `x` only: dx = dy w, from the same codes. The residuals are the weights, groups and layer as
    given, so pass the whole stack: a slice made outside the op is a second copy of every layer.

    Args:
      x_PK: bf16, f16 or f32; zeros in padding (`gather_rows`).
      weights: a QTensor, a GgmlTensor or a dense array, with the leading axes [S, E].
      groups: from `group_rows`.
      layer: index in S, which may be traced.
      implementation: a key of IMPLEMENTATIONS to force; None: the fastest that supports the call.

    Raises:
      ValueError: shapes or dtypes do not match, or the implementation is unknown. Lists all problems.
    """
    if problems := list(_problems(x_PK, weights, groups, layer, implementation)):
        raise ValueError("grouped_matmul: " + "; ".join(problems))
    return _grouped_matmul(x_PK, weights, groups, layer, implementation)


def _problems(
    x_PK: jax.Array, weights: ExpertWeights, groups: Groups, layer: Layer, implementation: str | None
) -> Iterator[str]:
    kind = kind_of(weights)
    stack_shape, shape = kind.stack_shape(weights), kind.shape(weights)
    slots = len(groups.expert_of_tile_I) * groups.tile
    if x_PK.ndim != 2 or len(x_PK) != slots:
        yield f"x has shape {list(x_PK.shape)}, the groups have {slots} slots. Make x with gather_rows"
    if str(x_PK.dtype) not in DTYPES:
        yield f"x has dtype {x_PK.dtype}, expected one of {', '.join(DTYPES)}"
    if len(stack_shape) != 2 or len(shape) != 2:
        yield f"weights have leading axes {list(stack_shape)} and {shape=}, expected [layers, experts] and (N, K)"
    elif x_PK.shape[-1] != shape[1]:
        yield f"x has K={x_PK.shape[-1]} as its last axis, an expert {shape} (N, K) has K={shape[1]}"
    if stack_shape and not isinstance(layer, jax.Array) and not 0 <= operator.index(layer) < stack_shape[0]:
        # An index out of range would silently be clamped to another layer's weight.
        yield f"{layer=} is out of range for a stack of {stack_shape[0]} layers"
    yield from kind.problems(weights)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        yield f"{implementation=} is unknown (known: {', '.join(sorted(IMPLEMENTATIONS))})"


def _run(direction: str, rows: jax.Array, weights: ExpertWeights, groups: Groups, layer: Layer, name: str | None):
    return getattr(IMPLEMENTATIONS[name or "loop"], direction)(rows, weights, groups, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_matmul(
    x_PK: jax.Array, weights: ExpertWeights, groups: Groups, layer: Layer, implementation: str | None
) -> jax.Array:
    return _run("forward", x_PK, weights, groups, layer, implementation)


def _forward(x_PK, weights, groups, layer, implementation):
    y_PN = _run("forward", x_PK, weights, groups, layer, implementation)
    return y_PN, (weights, groups, layer)


def _backward(implementation, residuals, dy_PN):
    weights, groups, layer = residuals
    return _run("backward", dy_PN, weights, groups, layer, implementation), None, None, None


_grouped_matmul.defvjp(_forward, _backward)
