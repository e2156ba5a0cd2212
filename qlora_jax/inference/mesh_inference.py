"""Runs a program of a model and rows on the devices that hold the model.

On a mesh each device has its part of the model and its own rows, as in training. The arrays say which mesh that is, so
callers of decoding and scoring do not.

Dimension key: L layers, B rows.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.attention import KVPages
from qlora_jax.models.partition import ModelParts, parts_specs
from qlora_jax.sharding import ROWS, AnyMesh, axis_size, placed_shapes, shards_of

# Each device has its own pages; numbers of pages are those of its part.
CACHE = KVPages(k=P(ROWS), v=P(ROWS), k_scale=P(ROWS), v_scale=P(ROWS), pages_LRI=P(None, ROWS))


def row_shards(mesh: AnyMesh | None) -> int:
    """Returns the number of devices that have their own rows; a batch has a multiple of it."""
    return axis_size(mesh, *ROWS)


def row_specs(inputs: PyTree) -> PyTree:
    """Returns the PartitionSpecs of a program's inputs: arrays are cut over their rows, and numbers are whole.

    Rows, or the pages of a device, are axis 0 of arrays. `CACHE` says which axis of a cache they are.
    """

    def spec(leaf):
        if isinstance(leaf, KVPages):
            return cache_specs(leaf)
        return P(ROWS) if leaf.ndim else P()

    return jax.tree.map(spec, inputs, is_leaf=lambda leaf: isinstance(leaf, KVPages))


def cache_specs(cache: KVPages) -> KVPages:
    """Returns the PartitionSpecs of a cache, which has scales if its pages are int8."""
    return CACHE if cache.k_scale is not None else dataclasses.replace(CACHE, k_scale=None, v_scale=None)


def row_shapes(inputs: PyTree, mesh: AnyMesh | None) -> PyTree:
    """Returns the shapes of a program's inputs, on a mesh with the shardings of `row_specs`."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    return shapes if mesh is None else placed_shapes(shapes, row_specs(shapes), mesh)


def run_on_mesh(
    program: Callable[..., PyTree], parts: PyTree, inputs: tuple[PyTree, ...], mesh: AnyMesh | None, results: PyTree
) -> PyTree:
    """Returns `program(parts, *inputs)`, which each device of a mesh runs on its own rows; called inside jit.

    Args:
      program: on a mesh it gets Shards, and only this device's rows.
      parts: the ModelParts of a model, or of several.
      inputs: cut by `row_specs`.
      results: PartitionSpecs of the result on a mesh.
    """
    if mesh is None:
        return program(parts, *inputs)
    specs = jax.tree.map(lambda one: parts_specs(one, mesh), parts, is_leaf=lambda one: isinstance(one, ModelParts))

    def on_device(parts: PyTree, *inputs: PyTree) -> PyTree:
        return program(shards_of(parts, specs, mesh), *inputs)

    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, *row_specs(inputs)),
        out_specs=results,
        check_vma=False,  # kernels' results carry no such types
    )
    return run(parts, *inputs)
