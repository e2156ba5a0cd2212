"""nf4_matmul: a product with a frozen 4-bit weight, and the gradient of its input from the same packed codes.

Dimension key: M rows, N out, K in, L layers.
"""

import functools
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import reference

Layer = Int[Array, ""] | int | None


class Product(Protocol):
    """[M, K] x weight -> [M, N] (forward), or [M, N] x weight -> [M, K] (backward); one unstacked weight."""

    def __call__(self, rows: jax.Array, weights: QTensor, /) -> jax.Array: ...


class Implementation(NamedTuple):
    """One way to run the op. Raises NotImplementedError where it cannot do a call, and for nothing else."""

    forward: Product
    backward: Product


IMPLEMENTATIONS = {"reference": Implementation(reference.forward, reference.backward)}


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
      implementation: a key of IMPLEMENTATIONS to force; None takes the first that can do the call.

    Raises:
      ValueError: K differs between x and weights; a stack without a layer or the reverse; an unknown implementation.
      NotImplementedError: the implementation that was named, or every one, cannot do this call.
    """
    _check(x, weights, layer, implementation)
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = _nf4_matmul(x_MK, weights, layer, implementation)
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def _check(x: jax.Array, weights: QTensor, layer: Layer, implementation: str | None) -> None:
    problems = []
    if len(weights.shape) != 2:
        problems.append(f"weights of shape {weights.shape}: a matrix (N, K) is needed")
    elif x.shape[-1] != weights.shape[1]:
        problems.append(
            f"x has K={x.shape[-1]} as its last axis, the weight {weights.shape} (N, K) has K={weights.shape[1]}"
        )
    stacked = len(weights.stack_shape)
    if stacked != (layer is not None):
        wanted = "one leading axis of layers" if layer is not None else "no leading axes"
        problems.append(f"{layer=} goes with weights of {wanted}, found stack_shape={weights.stack_shape}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        problems.append(f"{implementation=}: known are {sorted(IMPLEMENTATIONS)}")
    if problems:
        raise ValueError("nf4_matmul: " + "; ".join(problems))


def _run(direction: str, rows: jax.Array, weights: QTensor, layer: Layer, implementation: str | None) -> jax.Array:
    names = [implementation] if implementation else list(IMPLEMENTATIONS)
    refusals = []
    one = weights if layer is None else weights.layer(layer)
    for name in names:
        try:
            return getattr(IMPLEMENTATIONS[name], direction)(rows, one)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
    raise NotImplementedError(f"nf4_matmul {direction}: " + "; ".join(refusals))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nf4_matmul(x_MK: jax.Array, weights: QTensor, layer: Layer, implementation: str | None) -> jax.Array:
    return _run("forward", x_MK, weights, layer, implementation)


def _forward(x_MK, weights, layer, implementation):
    return _run("forward", x_MK, weights, layer, implementation), (weights, layer)


def _backward(implementation, residuals, dy_MN):
    weights, layer = residuals
    return _run("backward", dy_MN, weights, layer, implementation), None, None


_nf4_matmul.defvjp(_forward, _backward)
