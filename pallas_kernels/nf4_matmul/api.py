"""nf4_matmul: a product with a frozen 4-bit weight, and its input's gradient from the same packed codes.

Dimension key: M rows, N out, K in, L layers.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.dispatch import (
    Call,
    Capabilities,
    Choice,
    Direction,
    Implementation,
    Layer,
    choose,
    preference,
)
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.layouts import LAYOUTS, layout_problem
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.frozen_product import FAST, frozen_product, operand_problems
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul import cpu, reference
from pallas_kernels.nf4_matmul.mosaic.capabilities import AMPERE, HOPPER, SKINNY, mosaic_kernel

INTEGER = "integer"
IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.forward, cpu.backward, cpu.CAPABILITIES, missing=native_problem),
    INTEGER: Implementation(cpu.integer_forward, cpu.backward, cpu.INTEGER_CAPABILITIES, missing=native_problem),
    "ampere": mosaic_kernel("ampere", AMPERE),
    "hopper": mosaic_kernel("hopper", HOPPER),
    "skinny": mosaic_kernel("skinny", SKINNY),
    "reference": Implementation(reference.forward, reference.backward, Capabilities()),
}


def nf4_matmul(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer = None, implementation: str | None = None
) -> Float[Array, "... N"]:
    """Computes y[..., n] = sum_k x[..., k] w[n, k], accumulated in f32 and returned in x's dtype.

    >>> weight = q.quantize_array(np.ones((2, 64), np.float32), double_quant=False)
    >>> q.nf4_matmul(jnp.ones((3, 64)), weight).tolist()
    [[64.0, 64.0], [64.0, 64.0], [64.0, 64.0]]

    Differentiable in `x` only: dx = dy w, from the same codes. The residuals are `weights` and `layer` as given, so
    pass the whole stack and a layer index: a slice made outside the op is a second copy of every layer.

    Args:
      x: [..., K] in bf16, f16 or f32.
      weights: one weight (`layer` None), or a stack with one leading axis (`layer` its index, which may be traced).
      implementation: a key of IMPLEMENTATIONS to force; None uses the first in the device's order that supports the
        call (`choose_implementation` returns it, with reasons). FAST tries `integer` before them, which rounds x.

    Raises:
      ValueError: no implementation could run the call, because x's rank or dtype is unsupported, K differs between x
        and weights, a stack has no layer or the reverse, or codes do not match their layout; or the implementation is
        unknown. Lists all problems.
      NotImplementedError: the named implementation, or every one, does not support this call on this device.
    """
    if problems := list(call_problems(x, weights, layer, implementation)):
        raise ValueError("nf4_matmul: " + "; ".join(problems))
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _PRODUCT.apply(x_MK, weights, layer, implementation)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def choose_implementation(device: Device, call: Call, implementation: str | None = None) -> Choice:
    """Returns the implementation that runs a call on a device, and why those before it in its order do not."""
    order = (implementation,) if implementation not in (None, FAST) else preference(device)
    order = (INTEGER, *order) if implementation == FAST else order
    return choose(device, call, IMPLEMENTATIONS, order)


def call_problems(
    x: jax.Array | np.ndarray, weights: QTensor, layer: Layer, implementation: str | None = None
) -> Iterator[str]:
    """Yields every reason why nf4_matmul raises ValueError."""
    yield from operand_problems(x, weights.shape, weights.stack_shape, layer)
    yield from weights_problems(weights)
    if implementation not in (None, FAST, *IMPLEMENTATIONS):
        yield f"{implementation=} is unknown (known: {', '.join(sorted([FAST, *IMPLEMENTATIONS]))})"


def weights_problems(weights: QTensor) -> Iterator[str]:
    """Yields every reason why a QTensor is malformed."""
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


def dequantize_layer(weights: QTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "N K"]:
    """Returns one weight (`layer` None) or one layer of a stack, as `dequantize` does, by the loops if they can.

    A stack may also have axes of layers and experts; then the result has all experts.
    """
    choice = choose_implementation(target_device(), Call.of("backward", 1, jnp.dtype(dtype), weights))
    if choice.name == "cpu" and len(weights.stack_shape) <= 1:
        return cpu.dequantize_layer(weights, layer, dtype)
    return dequantize(weights if layer is None else weights.layer(layer), dtype)


def _run(direction: Direction, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None):
    device = target_device()
    call = Call.of(direction, rows.shape[0], rows.dtype, weights)
    choice = choose_implementation(device, call, implementation)
    if choice.name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in choice.refusals.items())
        raise NotImplementedError(f"nf4_matmul {direction} on {device}: {reasons}")
    return getattr(IMPLEMENTATIONS[choice.name], direction)(rows, weights, layer)


_PRODUCT = frozen_product(_run)
product = _PRODUCT.one_way  # unchecked: (direction, rows, weights, layer)
