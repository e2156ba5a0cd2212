"""PiSSA and LoftQ: initialisations that split a weight into a low-rank product and a residual.

The residual is recomputed whenever a run's base is loaded, on any machine, and must be bit-identical. So A and B lie on
a grid on which their product is exact in f64, in any order of summation.

Dimension key: N out, K in, R rank, Q columns of a sketch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

GRID_BITS = 20  # bits of the largest element: products have 40, and sums of up to 2^12 products fit f64's 53
ROWS = 1024  # rows of a weight in f64 at once
OVERSAMPLED = 8  # columns of a randomized decomposition in excess of the rank

Weight = Float32[np.ndarray, "N K"]


class Factors(NamedTuple):
    """The factors A and B of a low-rank weight scaling (A B)^T."""

    lora_a: Float32[np.ndarray, "K R"]
    lora_b: Float32[np.ndarray, "R N"]


class Decomposition(NamedTuple):
    """Settings of a low-rank decomposition.

    Attributes:
      rank: R.
      scaling: the adapter's scaling: scaling (A B)^T approximates the weight.
      niter: power iterations of a randomized decomposition; 0 computes the full one.
      dtype: the dtype that A and B are rounded to and trained in.
      key: the key of the random numbers.
    """

    rank: int
    scaling: float
    niter: int
    dtype: DTypeLike
    key: jax.Array


class Split(NamedTuple):
    """A weight split into a residual and a low-rank product.

    Attributes:
      residual: the frozen part, which is quantized.
      initial: the initial A and B.
      subtracted: the A and B that were subtracted from the weight; None if the residual is the whole weight.
    """

    residual: Weight
    initial: Factors
    subtracted: Factors | None


def pissa(weight_NK: Weight, how: Decomposition) -> Split:
    """Splits by PiSSA (Meng et al., 2024): A and B are the weight's R largest singular components."""
    factors = low_rank_factors(weight_NK, how)
    return Split(residual(weight_NK, factors, how.scaling), factors, factors)


def loftq(weight_NK: Weight, how: Decomposition, iterations: int, round_trip: Callable[[Weight], jax.Array]) -> Split:
    """Splits by LoftQ (Li et al., 2024), starting with the weight as its residual.

    Each iteration quantizes the residual, takes A and B from the largest singular components of the quantization error
    weight - quantized, and subtracts them from the weight for the next residual.

    This is PEFT's loftq_init except for the scaling. PEFT does not divide A and B by it, so they correct the error only
    if alpha equals the rank, and otherwise a multiple of it.

    Args:
      round_trip: quantizes a weight and dequantizes it to f32.
    """
    residual_NK, subtracted = weight_NK, None
    for iteration in range(iterations):
        if iteration:
            subtracted = factors
            residual_NK = residual(weight_NK, subtracted, how.scaling)
        factors = low_rank_factors(weight_NK - np.asarray(round_trip(residual_NK)), how)
    return Split(residual_NK, factors, subtracted)


def low_rank_factors(weight_NK: Weight, how: Decomposition) -> Factors:
    """Returns A = (sqrt(S / scaling) V^T)^T, B = (U sqrt(S / scaling))^T of the R largest singular values, on the grid.

    Raises:
      ValueError: the weight has fewer than R singular values.
    """
    if how.rank > min(weight_NK.shape):
        raise ValueError(
            f"lora.rank: found {how.rank}, expected at most {min(weight_NK.shape)} for a weight of {weight_NK.shape}."
        )
    u_NR, s_R, vt_RK = _largest(jnp.asarray(weight_NK), how.key, how.rank, how.niter)
    root_R = jnp.sqrt(s_R / how.scaling)
    a_KR, b_RN = (vt_RK * root_R[:, None]).T, (u_NR * root_R[None]).T
    a_KR, b_RN = (on_grid(np.asarray(x.astype(how.dtype).astype(jnp.float32))) for x in (a_KR, b_RN))
    return Factors(a_KR, b_RN)


@functools.partial(jax.jit, static_argnames=("rank", "niter"))
def _largest(w_NK: Float[Array, "N K"], key: jax.Array, rank: int, niter: int) -> tuple[jax.Array, ...]:
    """Returns (U, S, V^T) of the `rank` largest singular values.

    With `niter` > 0 by a randomized decomposition within the range of W Q, for random Q refined by `niter` power
    iterations (Halko et al., 2011, algorithm 4.4; torch.svd_lowrank).
    """
    if not niter:
        u, s, vt = jnp.linalg.svd(w_NK, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    columns = min(rank + OVERSAMPLED, *w_NK.shape)
    basis_NQ, _ = jnp.linalg.qr(w_NK @ jax.random.normal(key, (w_NK.shape[1], columns), jnp.float32))
    for _ in range(niter):
        basis_KQ, _ = jnp.linalg.qr(w_NK.T @ basis_NQ)
        basis_NQ, _ = jnp.linalg.qr(w_NK @ basis_KQ)
    u_QQ, s, vt = jnp.linalg.svd(basis_NQ.T @ w_NK, full_matrices=False)
    return (basis_NQ @ u_QQ)[:, :rank], s[:rank], vt[:rank]


def on_grid(x: Float32[np.ndarray, "*S"]) -> Float32[np.ndarray, "*S"]:
    """Rounds x to multiples of one power of two, at most 2^GRID_BITS of them."""
    _, exponent = np.frexp(np.max(np.abs(x)))
    step = np.ldexp(1.0, int(exponent) - GRID_BITS)
    return (np.round(x / step) * step).astype(np.float32)


def residual(weight_NK: Weight, factors: Factors, scaling: float) -> Weight:
    """Returns weight - scaling (A B)^T for A and B on the grid, with the same bits on every machine."""
    a_KR, b_RN = (x.astype(np.float64) for x in factors)
    residual_NK = np.empty_like(weight_NK)
    for start in range(0, len(residual_NK), ROWS):
        rows = slice(start, start + ROWS)
        residual_NK[rows] = weight_NK[rows] - scaling * (b_RN[:, rows].T @ a_KR.T)
    return residual_NK
