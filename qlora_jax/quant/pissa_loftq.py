"""A weight as a product of low rank and a rest: the initialisations PiSSA and LoftQ.

The rest is computed again whenever a run's base is loaded, on any machine, and has to be the same to the bit. So A and
B lie on a grid on which their product is exact in f64, in whichever order it is summed.

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

GRID_BITS = 20  # of the largest element: products have 40, and sums of up to 2^12 of them fit the 53 of f64
ROWS = 1024  # of a weight that are in f64 at once
OVERSAMPLED = 8  # columns of a randomized decomposition beyond the rank

Weight = Float32[np.ndarray, "N K"]


class Factors(NamedTuple):
    """A and B, whose product times a scaling is (A B)^T like a weight."""

    lora_a: Float32[np.ndarray, "K R"]
    lora_b: Float32[np.ndarray, "R N"]


class Decomposition(NamedTuple):
    """How A and B are found.

    Fields:
      scaling: of the adapter: scaling (A B)^T is the weight's part of rank R.
      niter: power iterations of a randomized decomposition; 0: the whole one.
      dtype: what A and B are rounded to, and trained in.
      key: of the random numbers.
    """

    rank: int
    scaling: float
    niter: int
    dtype: DTypeLike
    key: jax.Array


class Split(NamedTuple):
    """A weight in two parts.

    Fields:
      rest: what is held, and quantized.
      initial: A and B to begin with.
      taken: A and B that the rest is short of; None where it is the whole weight.
    """

    rest: Weight
    initial: Factors
    taken: Factors | None


def pissa(weight_NK: Weight, how: Decomposition) -> Split:
    """PiSSA (Meng et al., 2024): A and B are the R largest singular parts of the weight, the rest is without them."""
    found = decomposed(weight_NK, how)
    return Split(without(weight_NK, found, how.scaling), found, found)


def loftq(weight_NK: Weight, how: Decomposition, iterations: int, held: Callable[[Weight], jax.Array]) -> Split:
    """LoftQ (Li et al., 2024): `iterations` times the rest is quantized, A and B are the largest singular parts of what
    then lacks, and the rest is the weight without them. The first rest is the weight.

    PEFT's loftq_init, but for the scaling: there A and B are not divided by it, so that they make up for what lacks
    where alpha is the rank, and else for a multiple of it.

    Args:
      held: what the quantizer makes of a weight, dequantized in f32.
    """
    rest_NK, taken = weight_NK, None
    for iteration in range(iterations):
        if iteration:
            taken = found
            rest_NK = without(weight_NK, taken, how.scaling)
        found = decomposed(weight_NK - np.asarray(held(rest_NK)), how)
    return Split(rest_NK, found, taken)


def decomposed(weight_NK: Weight, how: Decomposition) -> Factors:
    """A = (sqrt(S / scaling) V^T)^T and B = (U sqrt(S / scaling))^T of the R largest singular values, on the grid.

    Raises:
      ValueError: the weight has fewer singular values than that.
    """
    if how.rank > min(weight_NK.shape):
        raise ValueError(f"rank {how.rank} is more than a weight of shape {weight_NK.shape} has")
    u_NR, s_R, vt_RK = _largest(jnp.asarray(weight_NK), how.key, how.rank, how.niter)
    root_R = jnp.sqrt(s_R / how.scaling)
    a_KR, b_RN = (vt_RK * root_R[:, None]).T, (u_NR * root_R[None]).T
    a_KR, b_RN = (on_grid(np.asarray(x.astype(how.dtype).astype(jnp.float32))) for x in (a_KR, b_RN))
    return Factors(a_KR, b_RN)


@functools.partial(jax.jit, static_argnames=("rank", "niter"))
def _largest(w_NK: Float[Array, "N K"], key: jax.Array, rank: int, niter: int) -> tuple[jax.Array, ...]:
    """(U, S, V^T) of the largest singular values: of the whole decomposition, or of that within the range of W Q, for
    random Q on which W^T W was iterated (Halko et al., 2011, algorithm 4.4, as torch.svd_lowrank)."""
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
    """x rounded to whole multiples of one power of two, 2^GRID_BITS or fewer of them."""
    _, exponent = np.frexp(np.max(np.abs(x)))
    step = np.ldexp(1.0, int(exponent) - GRID_BITS)
    return (np.round(x / step) * step).astype(np.float32)


def without(weight_NK: Weight, taken: Factors, scaling: float) -> Weight:
    """weight - scaling (A B)^T of an A and a B on the grid: rounded three times, the same bits everywhere."""
    a_KR, b_RN = (x.astype(np.float64) for x in taken)
    rest_NK = np.empty_like(weight_NK)
    for start in range(0, len(rest_NK), ROWS):
        rows = slice(start, start + ROWS)
        rest_NK[rows] = weight_NK[rows] - scaling * (b_RN[:, rows].T @ a_KR.T)
    return rest_NK
