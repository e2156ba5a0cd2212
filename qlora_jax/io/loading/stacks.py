"""Stacks of the weights of all layers, filled with one layer or expert at a time: on devices, or in host memory."""

import functools
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading.mesh_weights import MeshPlaces
from qlora_jax.io.tensor_map import Leaf, Slot
from qlora_jax.models.partition import host_sharding
from qlora_jax.nn.frozen_weight import Part, ops_of


def empty_stacks(slots: Sequence[Slot], places: MeshPlaces | None) -> Sequence[Leaf]:
    """Returns zeros for the stack of each slot, made by one compiled call.

    Args:
      places: where they lie on a mesh; None for the default device.
    """
    specs = [slot.leaf for slot in slots]
    shardings = None if places is None else [places.shardings(slot) for slot in slots]
    make = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), specs), out_shardings=shardings)
    return make()


def filled(slot: Slot, stack: Leaf, layers: Iterator[Part]) -> Leaf:
    """Returns the stack with all layers and experts of a slot written into it, in its own memory."""
    for index, layer in enumerate(layers):
        place = slot.place(index)
        ops = ops_of(stack)
        part, row = ops.part(stack, place[0])
        stack = ops.with_part(stack, place[0], set_layer(part, layer, tuple(map(np.int32, (row, *place[1:])))))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def set_layer[Stack: (jax.Array, QTensor, GgmlTensor)](
    stack: Stack, layer: Part, place: tuple[jax.Array | np.int32, ...]
) -> Stack:
    """Returns the stack with the layer or expert at one place set, in the memory of the donated stack."""
    if layout := ops_of(stack).layout(stack):
        layer = repack(cast(QTensor, layer), layout)

    def with_one(all_: jax.Array, one: jax.Array) -> jax.Array:
        start = (*place, *(0 for _ in one.shape))
        return jax.lax.dynamic_update_slice(all_, one.reshape((1,) * len(place) + one.shape), start)

    return jax.tree.map(with_one, stack, layer)


def filled_on_host(slot: Slot, layers: Iterator[Part]) -> Leaf:
    """Returns the stack in pinned host memory. Ordinary memory, where it is filled, holds one such stack at a time."""
    stack = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), slot.leaf)
    ops = ops_of(stack)
    layout = ops.layout(stack)
    for index, layer in enumerate(layers):
        ops.put(stack, layer if layout is None else _repacked(layer, layout), slot.place(index))
    return jax.device_put(stack, host_sharding())


_repacked = jax.jit(repack, static_argnums=1)
