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
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.frozen_product import Direction, Layer, frozen_product, operand_problems
from pallas_kernels.ggml_matmul import cpu, reference
from pallas_kernels.native.library import problem as native_problem

IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


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
    try:
        wanted = rows, row_bytes(weights.ggml_type, columns)
    except ValueError as problem:
        yield str(problem)
        return
    if tuple(weights.codes.shape[-2:]) != wanted:
        yield f"codes {list(weights.codes.shape)}: {weights.ggml_type} of {weights.shape} has shape {list(wanted)}"


def choose_implementation(device: Device, dtype: str) -> str:
    """Returns the fastest implementation for rows of a dtype on a device."""
    return "cpu" if device.platform == "cpu" and dtype in cpu.DTYPES and native_problem() is None else "reference"


def dequantize_layer(weights: GgmlTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "N K"]:
    """Returns one weight (`layer` None) or one layer of a stack, as `dequantize_ggml` does, by the loops if they can.

    A stack may also have axes of layers and experts; then the result has all experts.
    """
    by_layer = len(weights.stack_shape) <= 1
    name = choose_implementation(target_device(), str(jnp.dtype(dtype))) if by_layer else "reference"
    return IMPLEMENTATIONS[name].dequantize_layer(weights, layer, dtype)


def _run(direction: Direction, rows: jax.Array, weights: GgmlTensor, layer: Layer, implementation: str | None):
    name = implementation or choose_implementation(target_device(), str(rows.dtype))
    return getattr(IMPLEMENTATIONS[name], direction)(rows, weights, layer)


_PRODUCT = frozen_product(_run)
product = _PRODUCT.one_way  # unchecked: (direction, rows, weights, layer)
