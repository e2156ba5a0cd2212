"""Stacks of the weights of all layers, filled with one layer or expert at a time: on devices, or in host memory."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading.mesh_weights import MeshPlaces
from qlora_jax.io.tensor_map import Leaf, Slot
from qlora_jax.models.partition import host_sharding
from qlora_jax.nn.mixed_stack import MixedStack, Part
from qlora_jax.nn.padded_stack import PaddedStack


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
        if isinstance(stack, MixedStack):
            part, index_in_part = stack.locate(place[0])
            part_filled = set_layer(stack.parts[part], layer, _traced((index_in_part, *place[1:])))
            stack = stack.with_part(part, part_filled)
        else:
            stack = set_layer(stack, layer, _traced(place))
    return stack


def _traced(place: tuple[int, ...]) -> tuple[np.int32, ...]:
    return tuple(map(np.int32, place))


@functools.partial(jax.jit, donate_argnums=0)
def set_layer[Stack: (jax.Array, QTensor, GgmlTensor)](
    stack: Stack, layer: Part, place: tuple[jax.Array | np.int32, ...]
) -> Stack:
    """Returns the stack with the layer or expert at one place set, in the memory of the donated stack."""
    if isinstance(stack, QTensor):
        assert isinstance(layer, QTensor)
        layer = repack(layer, stack.layout)

    def with_one(all_: jax.Array, one: jax.Array) -> jax.Array:
        start = (*place, *(0 for _ in one.shape))
        return jax.lax.dynamic_update_slice(all_, one.reshape((1,) * len(place) + one.shape), start)

    return jax.tree.map(with_one, stack, layer)


def filled_on_host(slot: Slot, layers: Iterator[Part]) -> Leaf:
    """Returns the stack in pinned host memory. Ordinary memory, where it is filled, holds one such stack at a time."""
    stack = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), slot.leaf)
    for index, layer in enumerate(layers):
        _put_on_host(stack, layer, slot.place(index))
    return jax.device_put(stack, host_sharding())


def _put_on_host(stack: Leaf, layer: Part, place: tuple[int, ...]) -> None:
    """Writes the weight of one layer or expert into a stack of NumPy arrays."""
    if isinstance(stack, PaddedStack):
        assert isinstance(layer, GgmlTensor)
        stack.codes[stack.place_of(*place)] = np.asarray(layer.codes).reshape(-1)
        return
    one = _repacked(layer, stack.layout) if isinstance(stack, QTensor) else layer
    for all_, values in zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True):
        all_[place] = np.asarray(values)


_repacked = jax.jit(repack, static_argnums=1)
