"""grouped_matmul: products of grouped rows with the frozen weights of their experts, and the rows' gradient.

Dimension key: P slots, I tiles, C rows per tile, S layers, E experts, N out, K in.
"""

import dataclasses
import functools
import importlib
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.dispatch import Capabilities, Choice, Implementation, choose, preference
from pallas_kernels.frozen_product import DTYPES, Direction, differentiable
from pallas_kernels.grouped_matmul.experts import ExpertWeights, Layer, kind_of, loop_backward, loop_forward
from pallas_kernels.grouped_matmul.groups import Groups
from pallas_kernels.mosaic.installation import problem as mosaic_problem
from pallas_kernels.nf4_matmul.mosaic.capabilities import AMPERE, HOPPER, SKINNY


def _fused(kernel: str, capabilities: Capabilities) -> Implementation:
    """Returns an implementation by Mosaic kernels, imported on the first call: importing Mosaic takes long."""

    def product(direction: Direction, rows, weights, groups, layer):
        module = importlib.import_module("pallas_kernels.grouped_matmul.mosaic")
        return getattr(module, kernel)(direction, rows, weights, groups, layer)

    ways = functools.partial(product, "forward"), functools.partial(product, "backward")
    return Implementation(*ways, capabilities, fused=True, missing=mosaic_problem)


MOST_TILE = 1024  # rows
# A call's rows are those of a tile. Fused implementations take only 4-bit weights.
IMPLEMENTATIONS = {
    "loop": Implementation(loop_forward, loop_backward, Capabilities()),
    "hopper": _fused("hopper", dataclasses.replace(HOPPER, rows=(64, MOST_TILE), row_multiple=64)),
    "ampere": _fused("ampere", dataclasses.replace(AMPERE, rows=(64, MOST_TILE), row_multiple=64)),
    "skinny": _fused("skinny", dataclasses.replace(SKINNY, rows=(8, 8), least=(1, 448))),
}

# Name of a device (Device.names) -> implementations, the fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "sm_75": ("skinny", "ampere", "loop"),  # neither runs there: the choice says why
    "sm_80": ("skinny", "ampere", "loop"),
    "sm_86": ("skinny", "ampere", "loop"),
    "sm_89": ("skinny", "ampere", "loop"),
    "sm_90": ("skinny", "hopper", "loop"),
    "sm_100": ("skinny", "ampere", "loop"),
    "sm_120": ("skinny", "ampere", "loop"),
    "sm_121": ("skinny", "ampere", "loop"),
    "any": ("loop",),
}


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
      NotImplementedError: the named implementation does not support this call on this device.
    """
    if problems := list(_problems(x_PK, weights, groups, layer, implementation)):
        raise ValueError("grouped_matmul: " + "; ".join(problems))
    return _grouped_matmul(x_PK, weights, (groups, layer), implementation)


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


def choose_implementation(
    device: Device,
    direction: Direction,
    dtype: DTypeLike,
    weights: ExpertWeights,
    tile: int,
    implementation: str | None = None,
) -> Choice:
    """Returns the implementation for this many rows per tile, and why those before it in its order do not fit."""
    order = (implementation,) if implementation else preference(device, PREFERENCE)
    call = kind_of(weights).call
    if call is not None:
        return choose(device, call(direction, tile, jnp.dtype(dtype), weights), IMPLEMENTATIONS, order)
    refusals = {name: "takes only 4-bit weights" for name in order if IMPLEMENTATIONS[name].fused}
    return Choice(next((name for name in order if name not in refusals), None), refusals)


def product(
    direction: Direction,
    rows: jax.Array,
    weights: ExpertWeights,
    groups: Groups,
    layer: Layer,
    name: str | None = None,
) -> jax.Array:
    """Computes one direction of the op, unchecked: [P, K] -> [P, N] forward, [P, N] -> [P, K] backward."""
    device = target_device()
    choice = choose_implementation(device, direction, rows.dtype, weights, groups.tile, name)
    if choice.name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in choice.refusals.items())
        raise NotImplementedError(f"grouped_matmul {direction} on {device}: {reasons}")
    return getattr(IMPLEMENTATIONS[choice.name], direction)(rows, weights, groups, layer)


def _at(
    direction: Direction,
    rows: jax.Array,
    weights: ExpertWeights,
    place: tuple[Groups, Layer],
    implementation: str | None,
) -> jax.Array:
    return product(direction, rows, weights, *place, implementation)


_grouped_matmul = differentiable(_at)
