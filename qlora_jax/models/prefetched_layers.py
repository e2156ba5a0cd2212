"""A scan over layers that fetches the weights of each layer while the layer before it runs, forward and backward.

Two layers of these weights are on the device at a time. They are never saved: the backward pass fetches them again,
last layer first. JAX's gradient of such a scan would save them, because each step takes them from the step before it.

Copies start at a position that depends only on the loop's counter, so that XLA for GPUs can compile them to transfers
by the copy engine. A position that is read from an array would make each copy a kernel.
"""

import functools
from collections.abc import Callable
from typing import Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Int, PyTree

from qlora_jax.nn.frozen_weight import is_packed
from qlora_jax.nn.linear import OneLayer, in_host_memory

Position = Int[Array, ""] | int
Step = Callable[[PyTree, PyTree, Position, PyTree, PyTree], tuple[PyTree, PyTree]]
Fetch = Callable[[PyTree, Position], PyTree]
# With these options of XLA the copies of the next layer start before the products of this one, on every card: XLA takes
# the latency below instead of its estimates, and starts up to 64 copies at a time instead of 2. It does not wait for
# the last use of this layer's weights, which would save their memory.
COPIES_AT_ONCE = {
    "xla_gpu_enable_latency_hiding_scheduler": "True",
    "xla_gpu_enable_analytical_sol_latency_estimator": "False",
    "xla_gpu_experimental_parallel_async_compute_limit": "64",
    "xla_disable_hlo_passes": "loop-schedule-linearizer",
}
LONG = str(10**12)  # ns, XLA's estimate of a copy: longer than a layer, so that copies start before it
SAVED = True, True, False, False, False  # arguments of a step that have a gradient, and that it may save


class _Gradient(Protocol):
    """The function that `jax.vjp` returns; `args_res` has what it saved of each argument."""

    args_res: list[PyTree]

    def __call__(self, cotangents: PyTree, /) -> tuple[PyTree, ...]:
        """Returns the cotangent of each argument."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def prefetching_scan(
    step: Step, fetch: Fetch, length: int, carry: PyTree, per_layer: PyTree, stacks: PyTree, frozen: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns (carry, stacked outputs) of `length` steps, differentiable in `carry` and `per_layer`.

    Args:
      step: (carry, the layer's part of `per_layer`, position, fetched weights, `frozen`) -> (carry, outputs).
      fetch: (`stacks`, position) -> weights on the device. Positions are -1 to `length`; the weights of both ends are
        not used.
      per_layer: pytree with a leading axis of layers.
      stacks: pytree of the weights of all layers in host memory.
      frozen: pytree of the other arrays that `step` reads; it has no gradient.
    """

    def body(state, part):
        position, carry, fetched = state
        ahead = fetch(stacks, position + 1)
        carry, outputs = step(carry, part, position, fetched, frozen)
        return (position + 1, *_waiting(carry, ahead)), outputs

    (_, carry, _), outputs = jax.lax.scan(body, (jnp.int32(0), carry, fetch(stacks, 0)), per_layer, length)
    return carry, outputs


def _waiting(carry: PyTree, ahead: PyTree) -> tuple[PyTree, PyTree]:
    """Returns both. XLA waits for the fetched weights once the carry is computed, not before."""
    return jax.lax.optimization_barrier((carry, ahead))


def _forward(step, fetch, length, carry, per_layer, stacks, frozen):
    def body(state, part):
        position, carry, fetched = state
        ahead = fetch(stacks, position + 1)
        args = carry, part, position, fetched, frozen
        (carry, outputs), gradient = jax.vjp(step, *args, saveable_args=SAVED, in_nzs=SAVED)
        return (position + 1, *_waiting(carry, ahead)), (outputs, gradient)

    state = jnp.int32(0), carry, fetch(stacks, 0)
    (_, carry, _), (outputs, gradients) = jax.lax.scan(body, state, per_layer, length)
    return (carry, outputs), (gradients, stacks, frozen)


def _backward(step, fetch, length, residuals, cotangents):
    gradients, stacks, frozen = residuals
    d_carry, d_outputs = cotangents

    def body(state, given):
        done, d_carry, fetched = state
        gradient, d_outputs = given
        position = length - 1 - done
        ahead = fetch(stacks, position - 1)
        gradient = cast(_Gradient, gradient)
        gradient.args_res[2:] = position, fetched, frozen
        d_carry, d_part, *_ = gradient((d_carry, d_outputs))
        return (done + 1, *_waiting(d_carry, ahead)), d_part

    state = jnp.int32(0), d_carry, fetch(stacks, length - 1)
    (_, d_carry, _), d_per_layer = jax.lax.scan(body, state, (gradients, d_outputs), length, reverse=True)
    return d_carry, d_per_layer, None, None


prefetching_scan.defvjp(_forward, _backward)


def split_host(base: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns (leaves in host memory, other leaves) of frozen leaves; the first is empty if none is there."""
    flat = nnx.to_flat_state(base)
    here = [one for one in flat if not in_host_memory(one[1])]
    if len(here) == len(flat):
        return nnx.State({}), base
    return nnx.from_flat_state([one for one in flat if in_host_memory(one[1])]), nnx.from_flat_state(here)


def fetch_layer(stacks: PyTree, position: Position, *, first: int) -> PyTree:
    """Copies one layer of stacks in host memory to the device.

    Args:
      position: counted from row `first` of the stacks. Outside of the stacks, the nearest layer is copied.
    """

    def one(stack: jax.Array) -> jax.Array:
        at = (first + position, *[0] * (stack.ndim - 1))
        with set_xla_metadata(latency_metadata=LONG):
            layer = jax.lax.dynamic_slice(stack, at, (1, *stack.shape[1:]), allow_negative_indices=False)
        return jax.device_put(layer.reshape(stack.shape[1:]), jax.memory.Space.Device)

    def weight_of_layer(weight: PyTree) -> OneLayer:
        return OneLayer(jax.tree.map(one, weight))

    return jax.tree.map(weight_of_layer, stacks, is_leaf=is_packed)
