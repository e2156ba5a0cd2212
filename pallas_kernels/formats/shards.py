"""Sharding of a weight over a mesh axis: the specs of its arrays, and each shard as a weight.

Dimension key: N out, K in, G = K / block_size blocks per row, s shards; `...` stacked layers.

| layout       | along N, a shard's rows            | along K, a shard's columns            |
|--------------|------------------------------------|---------------------------------------|
| `bnb`        | any number                         | whole blocks                          |
| `row_planar` | no: a byte holds rows i, i + N/2   | whole blocks                          |
| `split_k`    | multiples of 64                    | whole groups of 128 and whole blocks  |
| `flat`       | that end where a block ends        | no: it has no columns                 |

A `split_k` weight with a tail (K % 128 == 64) can only be cut along N.

Nested constants are numbered over the flattened weight. A cut along N whose shards are whole nested blocks cuts them
too. Otherwise every device has all of them (4 bytes per `nested_block_size` blocks) and picks its own. A shard's blocks
are runs of neighbours: one run along N, N runs of G / s along K. A block size that divides both a run and the nested
blocks splits both evenly, and the same constants repeated for these smaller blocks are the same weight, bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels.formats.layouts import RUN
from pallas_kernels.formats.qtensor import QTensor

Cut = Literal["N", "K"]
AnyMesh = Mesh | AbstractMesh


class _Place(NamedTuple):
    """The array axes that a cut divides, counted from the end, and the unit of a shard's size."""

    codes: int
    constants: int
    unit: Callable[[QTensor], int]


def _any_number(weights: QTensor) -> int:
    return 1


def _block(weights: QTensor) -> int:
    return weights.block_size


def _rows_of_whole_blocks(weights: QTensor) -> int:
    return weights.block_size // math.gcd(weights.block_size, weights.shape[1])


_PLACES: dict[tuple[str, Cut], _Place] = {
    ("bnb", "N"): _Place(-2, -2, _any_number),
    ("bnb", "K"): _Place(-1, -1, _block),
    ("row_planar", "K"): _Place(-1, -1, _block),
    ("split_k", "N"): _Place(-2, -1, lambda weights: RUN),
    ("split_k", "K"): _Place(-1, -2, lambda weights: math.lcm(2 * RUN, weights.block_size)),
    ("flat", "N"): _Place(-1, -1, _rows_of_whole_blocks),
}
_UNCUT: dict[tuple[str, Cut], str] = {
    ("row_planar", "N"): "a byte holds rows i and i + N/2, which a cut would separate; repack to 'bnb'",
    ("flat", "K"): "it has no columns; repack to 'bnb'",
}


def specs(weights: QTensor, cut: Cut, mesh: AnyMesh, axis: str) -> QTensor:
    """Returns `weights` with a PartitionSpec for each leaf, cut along N or K over `axis` of the mesh.

    Raises:
      ValueError: the weights cannot be cut this way; lists all reasons.
    """
    if problems := list(cut_problems(weights, cut, mesh, axis)):
        raise ValueError("sharded weight: " + "; ".join(problems))
    place = _PLACES[weights.layout, cut]
    at = {"codes": place.codes, "absmax": place.constants, "absmax_codes": place.constants}
    if cut == "N" and _blocks(weights) // mesh.shape[axis] % weights.nested_block_size == 0:
        at["nested_absmax"] = -1
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(leaf.ndim, at.get(path[0].name), axis), weights)


def place(weights: QTensor, cut: Cut, mesh: Mesh, axis: str) -> QTensor:
    """Places the weights' leaves on the mesh by `specs`.

    Raises:
      ValueError: the weights cannot be cut this way; lists all reasons.
    """
    whole_specs = specs(weights, cut, mesh, axis)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), weights, whole_specs)


def cut_problems(weights: QTensor, cut: Cut, mesh: AnyMesh, axis: str) -> Iterator[str]:
    """Yields every reason why the weights cannot be cut this way."""
    if axis not in mesh.shape:
        yield f"the mesh has axes {', '.join(map(repr, mesh.axis_names))}, not {axis!r}"
    if len(weights.shape) != 2:
        yield f"weights have shape {weights.shape}, expected a matrix (N, K)"
    elif reason := _UNCUT.get((weights.layout, cut)):
        yield f"layout {weights.layout!r} cannot be cut along {cut}: {reason}"
    elif axis in mesh.shape:
        size, shards = weights.shape["NK".index(cut)], mesh.shape[axis]
        unit = _PLACES[weights.layout, cut].unit(weights)
        if size % (shards * unit):
            yield (
                f"{cut}={size} over {shards} devices is {size / shards:g} each: layout {weights.layout!r} with blocks "
                f"of {weights.block_size} requires multiples of {unit}"
            )


def shard(weights: QTensor, whole_specs: QTensor, cut: Cut, shards: int, index: Int[Array, ""]) -> QTensor:
    """Returns a device's shard as a weight; called inside shard_map.

    Args:
      weights: the device's leaves, with the static fields of the whole weight.
      whole_specs: the `specs` of the whole weight.
      index: the device's index along the mesh axis.
    """
    n, k = weights.shape
    own = dataclasses.replace(weights, shape=(n // shards, k) if cut == "N" else (n, k // shards))
    if not weights.double_quant or any(whole_specs.nested_absmax):
        return own
    size, nested_block = _own_nested_blocks(weights, cut, shards, index)
    return dataclasses.replace(own, nested_block_size=size, nested_absmax=weights.nested_absmax[..., nested_block])


def _own_nested_blocks(
    weights: QTensor, cut: Cut, shards: int, index: Int[Array, ""]
) -> tuple[int, Int[Array, "parts"]]:
    """(smaller nested block size, the whole weight's nested block of each smaller block of the shard)."""
    runs = 1 if cut == "N" else weights.shape[0]
    run = _blocks(weights) // runs // shards
    size = math.gcd(run, weights.nested_block_size)
    starts = (jnp.arange(runs) * shards + index) * run
    blocks = starts[:, None] + jnp.arange(0, run, size)[None, :]
    return size, blocks.reshape(-1) // weights.nested_block_size


def _blocks(weights: QTensor) -> int:
    return math.prod(weights.shape) // weights.block_size


def _spec(ndim: int, at: int | None, axis: str) -> PartitionSpec:
    return PartitionSpec(*[axis if at is not None and one == ndim + at else None for one in range(ndim)])
