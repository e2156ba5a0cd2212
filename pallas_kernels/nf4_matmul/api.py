"""nf4_matmul: a product with a frozen 4-bit weight, and the gradient of its input from the same packed codes.

Dimension key: M rows, N out, K in, L layers.
"""

import functools
import importlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.formats.layouts import LAYOUTS, layout_problem
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul import cpu, reference
from pallas_kernels.nf4_matmul.dispatch import (
    Abilities,
    Call,
    Choice,
    Direction,
    Implementation,
    Layer,
    choose,
)
from pallas_kernels.nf4_matmul.mosaic.capabilities import AMPERE, HOPPER, SKINNY
from pallas_kernels.nf4_matmul.mosaic.installation import problem as mosaic_problem

DTYPES = ("bfloat16", "float16", "float32")


def _kernel(module: str, direction: Direction) -> Callable[..., jax.Array]:
    """A Mosaic kernel's function, imported when it is called: Mosaic takes most of a second, which CPUs do without."""

    def product(rows, weights, layer):
        kernels = importlib.import_module(f"pallas_kernels.nf4_matmul.mosaic.{module}")
        return getattr(kernels, direction)(rows, weights, layer)

    return product


def _mosaic(module: str, abilities: Abilities) -> Implementation:
    ways = _kernel(module, "forward"), _kernel(module, "backward")
    return Implementation(*ways, abilities, fused=True, missing=mosaic_problem)


IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.forward, cpu.backward, cpu.ABILITIES, missing=native_problem),
    "ampere": _mosaic("ampere", AMPERE),
    "hopper": _mosaic("hopper", HOPPER),
    "skinny": _mosaic("skinny", SKINNY),
    "reference": Implementation(reference.forward, reference.backward, Abilities()),
}

# Name of a device (Device.names: a compute capability before its platform) -> implementations, the fastest there first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "sm_80": ("skinny", "ampere", "reference"),
    "sm_86": ("skinny", "ampere", "reference"),
    "sm_89": ("skinny", "ampere", "reference"),
    "sm_90": ("skinny", "hopper", "reference"),
    "any": ("reference",),
}


def nf4_matmul(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer = None, implementation: str | None = None
) -> Float[Array, "... N"]:
    """y[..., n] = sum_k x[..., k] w[n, k], accumulated in f32 and returned in x's dtype.

    Differentiable in `x` alone: dx = dy w, from the same codes. Between forward and backward only `weights` and `layer`
    are kept, exactly as they were given; so give the whole stack and the layer index, since a slice made outside is a
    second copy of every layer.

    Args:
      x: bf16, f16 or f32.
      weights: one weight (`layer` None), or a stack with one leading axis (`layer` its index, which may be traced).
      implementation: a key of IMPLEMENTATIONS to force; None takes the first in the device's order that can do the
        call (`chosen` tells which and why).

    Raises:
      ValueError: what no implementation could do: x's rank or dtype, another K in x and weights, a stack without a
        layer or the reverse, codes that are not what their layout says, an unknown implementation.
      NotImplementedError: the implementation that was named, or every one, cannot do this call on this device.
    """
    if problems := list(call_problems(x, weights, layer, implementation)):
        raise ValueError("nf4_matmul: " + "; ".join(problems))
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _nf4_matmul(x_MK, weights, layer, implementation)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def preference(device: Device) -> tuple[str, ...]:
    """The implementations that a device would rather have, the first the most."""
    return next(PREFERENCE[name] for name in (*device.names, "any") if name in PREFERENCE)


def chosen(device: Device, call: Call, implementation: str | None = None) -> Choice:
    """What runs a call on a device, and why not what comes before it in the device's order."""
    order = (implementation,) if implementation else preference(device)
    return choose(device, call, IMPLEMENTATIONS, order)


def call_problems(x: Any, weights: QTensor, layer: Any, implementation: str | None = None) -> Iterator[str]:
    """Everything that makes nf4_matmul raise ValueError."""
    if x.ndim == 0:
        yield "x is a scalar: at least one axis, of length K, is needed"
    if str(x.dtype) not in DTYPES:
        yield f"x has dtype {x.dtype}: one of {', '.join(DTYPES)} is needed"
    if len(weights.shape) != 2:
        yield f"weights of shape {weights.shape}: a matrix (N, K) is needed"
    elif x.ndim and x.shape[-1] != weights.shape[1]:
        yield f"x has K={x.shape[-1]} as its last axis, the weight {weights.shape} (N, K) has K={weights.shape[1]}"
    yield from _layer_problems(weights.stack_shape, layer)
    yield from _weights_problems(weights)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        yield f"{implementation=}: known are {sorted(IMPLEMENTATIONS)}"


def _layer_problems(stack_shape: tuple[int, ...], layer: Any) -> Iterator[str]:
    if len(stack_shape) != (layer is not None):
        wanted = "one leading axis of layers" if layer is not None else "no leading axes"
        yield f"{layer=} goes with weights of {wanted}, found {stack_shape=}"
    elif layer is not None and not isinstance(layer, jax.Array) and not 0 <= operator.index(layer) < stack_shape[0]:
        # An index out of range would be clamped: another layer's weight, without a word.
        yield f"{layer=} is none of the {stack_shape[0]} layers of the stack"


def _weights_problems(weights: QTensor) -> Iterator[str]:
    if weights.quant_type not in CODE_TABLES:
        yield f"quant_type {weights.quant_type!r}: known are {', '.join(CODE_TABLES)}"
    if weights.codes.dtype != "uint8":
        yield f"codes have dtype {weights.codes.dtype}: uint8 is needed"
    if problem := layout_problem(weights.layout, weights.shape, weights.block_size):
        yield problem
        return
    layout = LAYOUTS[weights.layout]
    for name, wanted in (
        ("codes", layout.codes_shape(weights.shape)),
        (
            "absmax_codes" if weights.double_quant else "absmax",
            layout.constants_shape(weights.shape, weights.block_size),
        ),
    ):
        found = tuple(getattr(weights, name).shape)
        if found != (*weights.stack_shape, *wanted):
            yield f"{name} {list(found)}: layout {weights.layout!r} of {weights.shape} (N, K) holds {list(wanted)}"


def product(
    direction: Direction, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None = None
) -> jax.Array:
    """One direction of the op, unchecked: [M, K] -> [M, N] forward, [M, N] -> [M, K] backward."""
    return _mappable(direction, implementation)(rows, weights, layer)


def _run(direction: Direction, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None):
    device = target_device()
    call = Call.of(direction, rows.shape[0], rows.dtype, weights)
    choice = chosen(device, call, implementation)
    if choice.name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in choice.refusals.items())
        raise NotImplementedError(f"nf4_matmul {direction} on {device}: {reasons}")
    return getattr(IMPLEMENTATIONS[choice.name], direction)(rows, weights, layer)


@functools.cache
def _mappable(direction: Direction, implementation: str | None) -> Any:
    """`_run` under vmap: an axis of the rows alone becomes rows; where weights have one, products are made in turn."""

    @jax.custom_batching.custom_vmap
    def mapped_product(rows, weights, layer):
        return _run(direction, rows, weights, layer, implementation)

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nf4_matmul(x_MK: jax.Array, weights: QTensor, layer: Layer, implementation: str | None) -> jax.Array:
    return product("forward", x_MK, weights, layer, implementation)


def _forward(x_MK, weights, layer, implementation):
    return product("forward", x_MK, weights, layer, implementation), (weights, layer)


def _backward(implementation, residuals, dy_MN):
    weights, layer = residuals
    return product("backward", dy_MN, weights, layer, implementation), None, None


_nf4_matmul.defvjp(_forward, _backward)
