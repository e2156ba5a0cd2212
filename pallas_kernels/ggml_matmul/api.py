"""ggml_matmul: a product with a frozen weight in ggml's blocks, and its input's gradient from the same bytes.

Dimension key: M rows, N out, K in.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import Device, target_device
from pallas_kernels.dispatch import Call, Capabilities, Choice, Implementation, choose, preference
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS
from pallas_kernels.formats.ggml_tensor import BLOCKS, SPLIT_K, GgmlTensor, held_bytes, split_problem
from pallas_kernels.frozen_product import Direction, Layer, frozen_product, operand_problems
from pallas_kernels.ggml_matmul import cpu, reference
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul.mosaic.capabilities import AMPERE, HOPPER, SKINNY, mosaic_kernel

# A device's order of preference is that of nf4_matmul.
IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.forward, cpu.backward, cpu.CAPABILITIES, missing=native_problem),
    "ampere": mosaic_kernel("ampere", AMPERE),
    "hopper": mosaic_kernel("hopper", HOPPER),
    "skinny": mosaic_kernel("skinny", SKINNY),
    "reference": Implementation(reference.forward, reference.backward, Capabilities()),
}


def ggml_matmul(
    x: Float[Array, "... K"], weights: GgmlTensor, layer: Layer = None, implementation: str | None = None
) -> Float[Array, "... N"]:
    """Computes y[..., n] = sum_k x[..., k] w[n, k], accumulated in f32 and returned in x's dtype.

    Differentiable in `x` only: dx = dy w, from the same bytes. The residuals are `weights` and `layer` as given, so
    pass the whole stack and a layer index: a slice made outside the op is a second copy of every layer.

    Args:
      x: [..., K] in bf16, f16 or f32.
      weights: one weight (`layer` None), or a stack with one leading axis (`layer` its index, which may be traced).
      implementation: a key of IMPLEMENTATIONS to force; None uses the fastest that supports the call.

    Raises:
      ValueError: the operands do not fit, or the implementation is unknown. Lists all problems.
      NotImplementedError: the named implementation does not support this call on this device.
    """
    if problems := list(call_problems(x, weights, layer, implementation)):
        raise ValueError("ggml_matmul: " + "; ".join(problems))
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _PRODUCT.apply(x_MK, weights, layer, implementation)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def call_problems(
    x: jax.Array | np.ndarray, weights: GgmlTensor, layer: Layer, implementation: str | None = None
) -> Iterator[str]:
    """Yields every reason why ggml_matmul raises ValueError."""
    yield from operand_problems(x, weights.shape, weights.stack_shape, layer)
    yield from weights_problems(weights)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        yield f"{implementation=} is unknown (known: {', '.join(sorted(IMPLEMENTATIONS))})"


def weights_problems(weights: GgmlTensor) -> Iterator[str]:
    """Yields every reason why a GgmlTensor is malformed."""
    if weights.ggml_type not in BLOCK_FORMATS:
        yield f"ggml_type {weights.ggml_type!r} is unknown (known: {', '.join(BLOCK_FORMATS)})"
        return
    if weights.codes.dtype != "uint8":
        yield f"codes have dtype {weights.codes.dtype}, expected uint8"
    rows, columns = weights.shape
    if weights.layout not in (BLOCKS, SPLIT_K):
        yield f"layout {weights.layout!r} is unknown (known: {BLOCKS}, {SPLIT_K})"
        return
    if weights.layout == SPLIT_K and (problem := split_problem(weights.ggml_type, weights.shape)):
        yield problem
        return
    try:
        wanted = rows, held_bytes(weights.layout, weights.ggml_type, columns)
    except ValueError as problem:
        yield str(problem)
        return
    if tuple(weights.codes.shape[-2:]) != wanted:
        yield f"codes {list(weights.codes.shape)}: {weights.ggml_type} of {weights.shape} has shape {list(wanted)}"


def call_of(direction: Direction, rows: int, dtype: DTypeLike, weights: GgmlTensor) -> Call:
    """Describes a product of `rows` rows with a weight, or with one layer of a stack."""
    block = BLOCK_FORMATS[weights.ggml_type]
    return Call(
        direction=direction,
        rows=rows,
        dtype=str(jnp.dtype(dtype)),
        shape=weights.shape,
        layout=weights.layout,
        quant_type=weights.ggml_type,
        block_size=block.weights if block.code is None else block.code.group,
        double_quant=False,
    )


def choose_implementation(device: Device, call: Call, implementation: str | None = None) -> Choice:
    """Returns the implementation that runs a call on a device, and why those before it in its order do not."""
    order = [name for name in preference(device) if name in IMPLEMENTATIONS]
    return choose(device, call, IMPLEMENTATIONS, (implementation,) if implementation else order)


def dequantize_layer(weights: GgmlTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "N K"]:
    """Returns one weight (`layer` None) or one layer of a stack, as `dequantize_ggml` does, by the loops if they can.

    A stack may also have axes of layers and experts; then the result has all experts.
    """
    chosen = choose_implementation(target_device(), call_of("backward", 1, dtype, weights)).name
    by_loops = chosen == "cpu" and len(weights.stack_shape) <= 1
    return (cpu if by_loops else reference).dequantize_layer(weights, layer, dtype)


def _run(direction: Direction, rows: jax.Array, weights: GgmlTensor, layer: Layer, implementation: str | None):
    device = target_device()
    choice = choose_implementation(device, call_of(direction, rows.shape[0], rows.dtype, weights), implementation)
    if choice.name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in choice.refusals.items())
        raise NotImplementedError(f"ggml_matmul {direction} on {device}: {reasons}")
    return getattr(IMPLEMENTATIONS[choice.name], direction)(rows, weights, layer)


_PRODUCT = frozen_product(_run)
product = _PRODUCT.one_way  # unchecked: (direction, rows, weights, layer)
