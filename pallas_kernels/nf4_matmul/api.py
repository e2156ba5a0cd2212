"""nf4_matmul: a product with a frozen 4-bit weight, and its input's gradient from the same packed codes.

Dimension key: M rows, N out, K in, L layers.
"""

import functools
import importlib
import operator
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.formats.layouts import LAYOUTS, layout_problem
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul import cpu, reference
from pallas_kernels.nf4_matmul.dispatch import (
    Call,
    Capabilities,
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
    """Returns a Mosaic kernel's function, imported on its first call: importing Mosaic takes most of a second."""

    def product(rows, weights, layer):
        kernels = importlib.import_module(f"pallas_kernels.nf4_matmul.mosaic.{module}")
        return getattr(kernels, direction)(rows, weights, layer)

    return product


def _mosaic(module: str, capabilities: Capabilities) -> Implementation:
    ways = _kernel(module, "forward"), _kernel(module, "backward")
    return Implementation(*ways, capabilities, fused=True, missing=mosaic_problem)


IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.forward, cpu.backward, cpu.CAPABILITIES, missing=native_problem),
    "ampere": _mosaic("ampere", AMPERE),
    "hopper": _mosaic("hopper", HOPPER),
    "skinny": _mosaic("skinny", SKINNY),
    "reference": Implementation(reference.forward, reference.backward, Capabilities()),
}

# Name of a device (Device.names: a compute capability before its platform) -> implementations, the fastest first.
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
    """Computes y[..., n] = sum_k x[..., k] w[n, k], accumulated in f32 and returned in x's dtype.

    Differentiable in `x` only: dx = dy w, from the same codes. The residuals are `weights` and `layer` as given, so
    pass the whole stack and a layer index: a slice made outside the op is a second copy of every layer.

    Args:
      x: [..., K] in bf16, f16 or f32.
      weights: one weight (`layer` None), or a stack with one leading axis (`layer` its index, which may be traced).
      implementation: a key of IMPLEMENTATIONS to force; None uses the first in the device's order that supports the
        call (`choose_implementation` returns it, with reasons).

    Raises:
      ValueError: no implementation could run the call, because x's rank or dtype is unsupported, K differs between x
        and weights, a stack has no layer or the reverse, or codes do not match their layout; or the implementation is
        unknown. Lists all problems.
      NotImplementedError: the named implementation, or every one, does not support this call on this device.
    """
    if problems := list(call_problems(x, weights, layer, implementation)):
        raise ValueError("nf4_matmul: " + "; ".join(problems))
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _nf4_matmul(x_MK, weights, layer, implementation)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def preference(device: Device) -> tuple[str, ...]:
    """Returns a device's implementations, the most preferred first."""
    return next(PREFERENCE[name] for name in (*device.names, "any") if name in PREFERENCE)


def choose_implementation(device: Device, call: Call, implementation: str | None = None) -> Choice:
    """Returns the implementation that runs a call on a device, and why those before it in its order do not."""
    order = (implementation,) if implementation else preference(device)
    return choose(device, call, IMPLEMENTATIONS, order)


def call_problems(
    x: jax.Array | np.ndarray, weights: QTensor, layer: Layer, implementation: str | None = None
) -> Iterator[str]:
    """Yields every reason why nf4_matmul raises ValueError."""
    if x.ndim == 0:
        yield "x is a scalar, expected at least one axis, of length K"
    if str(x.dtype) not in DTYPES:
        yield f"x has dtype {x.dtype}, expected one of {', '.join(DTYPES)}"
    if len(weights.shape) != 2:
        yield f"weights have shape {weights.shape}, expected a matrix (N, K)"
    elif x.ndim and x.shape[-1] != weights.shape[1]:
        yield f"x has K={x.shape[-1]} as its last axis, the weight {weights.shape} (N, K) has K={weights.shape[1]}"
    yield from _layer_problems(weights.stack_shape, layer)
    yield from _weights_problems(weights)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        yield f"{implementation=} is unknown (known: {', '.join(sorted(IMPLEMENTATIONS))})"


def _layer_problems(stack_shape: tuple[int, ...], layer: Layer) -> Iterator[str]:
    if len(stack_shape) != (layer is not None):
        wanted = "one leading axis of layers" if layer is not None else "no leading axes"
        yield f"{layer=} requires weights with {wanted}, found {stack_shape=}"
    elif layer is not None and not isinstance(layer, jax.Array) and not 0 <= operator.index(layer) < stack_shape[0]:
        # An index out of range would silently be clamped to another layer's weight.
        yield f"{layer=} is out of range for a stack of {stack_shape[0]} layers"


def _weights_problems(weights: QTensor) -> Iterator[str]:
    if weights.quant_type not in CODE_TABLES:
        yield f"quant_type {weights.quant_type!r} is unknown (known: {', '.join(CODE_TABLES)})"
    if weights.codes.dtype != "uint8":
        yield f"codes have dtype {weights.codes.dtype}, expected uint8"
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
            yield f"{name} {list(found)}: layout {weights.layout!r} of {weights.shape} (N, K) has shape {list(wanted)}"


def product(
    direction: Direction, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None = None
) -> jax.Array:
    """Computes one direction of the op, unchecked: [M, K] -> [M, N] forward, [M, N] -> [M, K] backward."""
    return _mappable(direction, implementation)(rows, weights, layer)


def _run(direction: Direction, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None):
    device = target_device()
    call = Call.of(direction, rows.shape[0], rows.dtype, weights)
    choice = choose_implementation(device, call, implementation)
    if choice.name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in choice.refusals.items())
        raise NotImplementedError(f"nf4_matmul {direction} on {device}: {reasons}")
    return getattr(IMPLEMENTATIONS[choice.name], direction)(rows, weights, layer)


@functools.cache
def _mappable(direction: Direction, implementation: str | None) -> Callable[..., jax.Array]:
    """Returns `_run` with a rule for vmap: an axis of only the rows is folded into them; others run in sequence."""

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
