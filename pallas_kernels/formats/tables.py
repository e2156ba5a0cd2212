"""The constants of the 4-bit formats, and the 8-bit map that quantizes their block constants.

A weight is stored as the 4-bit code of the table value nearest to x = w * (1 / absmax). In a table sorted ascending,
the rank of the nearest value is a count: r = sum_j (x > midpoint_j), so x on a midpoint goes to the lower value.
`CODE_BY_RANK` maps r to the code, because some tables are not sorted by value.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


def _table(values: Sequence[float | np.floating] | np.ndarray, divisor: float = 1.0) -> np.ndarray:
    """Returns values / divisor in float32, read-only."""
    table = np.array(values, np.float32) / np.float32(divisor)
    table.flags.writeable = False
    return table


# QLoRA's NormalFloat (paper section 3), in the digits of bitsandbytes; the paper's equation 4 does not give them.
NF4_CODE = _table(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def _signed(magnitudes: list[float]) -> list[float]:
    """Adds the negative values in sign-magnitude order: bit 3 is the sign. Code 8 reads as +0.0, as in bitsandbytes."""
    return magnitudes + [0.0 - magnitude for magnitude in magnitudes]


# bitsandbytes' own FP4, which is not OCP E2M1: its subnormal is 0.0625 / 12 and its codes are not ordered by magnitude.
FP4_CODE = _table(_signed([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]), 12.0)

# bitsandbytes' "int4" table: 7 down to -7, two codes of zero.
INT4_CODE = _table(np.concatenate([np.arange(7, -1, -1), -np.arange(8)]), 7.0)

# OCP microscaling FP4 (E2M1), scaled so that its largest value is 1.
E2M1_CODE = _table(_signed([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), 6.0)

# The QLoRA paper's FP4 (E3M0): only powers of two.
E3M0_CODE = _table(_signed([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]), 64.0)

CODE_TABLES: dict[str, np.ndarray] = {
    "nf4": NF4_CODE,
    "fp4": FP4_CODE,
    "int4": INT4_CODE,
    "e2m1": E2M1_CODE,
    "e3m0": E3M0_CODE,
}

# The two codes of zero share a value, and the lower code comes first. So x <= 0 that rounds to zero takes the lower
# code (FP4: 0) and x > 0 the higher (FP4: 8), as in bitsandbytes on CPUs.
CODE_BY_RANK: dict[str, np.ndarray] = {
    quant_type: np.argsort(table, kind="stable").astype(np.uint8) for quant_type, table in CODE_TABLES.items()
}


def _midpoints(quant_type: str) -> np.ndarray:
    """Returns (v[r] + v[r+1]) / 2 in float32, where v is the sorted table."""
    ascending = CODE_TABLES[quant_type][CODE_BY_RANK[quant_type]]
    return _table((ascending[:-1] + ascending[1:]) / np.float32(2))


MIDPOINTS: dict[str, np.ndarray] = {quant_type: _midpoints(quant_type) for quant_type in CODE_TABLES}

ZERO_CODE: dict[str, int] = {
    quant_type: int(CODE_BY_RANK[quant_type][np.sum(midpoints < 0.0)]) for quant_type, midpoints in MIDPOINTS.items()
}


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """Returns the dynamic 8-bit map: 256 float32 values, ascending.

    They are the midpoints of linspace(0.1, 1, 2**i + 1) times 10**(i - 6) for i in 0..6, and 0 and 1. A signed map has
    each midpoint with both signs; an unsigned map has twice as many midpoints.

    torch.linspace differs between CPUs by up to 2 ulp here. These bits are those of torch's AVX2 and AVX-512 kernels,
    which almost all published checkpoints contain: each grid point by fused multiply-add from the nearer end, then a
    product in float32. Readers of checkpoints should check the stored map against this one.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = _linspace_fma(0.1, 1.0, 2**i + 1 if signed else 2 ** (i + 1) + 1)
        midpoints = (grid[:-1] + grid[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (i - 6)) * midpoints
        values += [*scaled, *(-scaled)] if signed else [*scaled]
    return _table(sorted(values))


def _linspace_fma(start: float, end: float, n: int) -> np.ndarray:
    """Computes torch.linspace in float32, each point rounded once: float64 holds the product of two float32 exactly."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(n - 1))
    k = np.arange(n)
    from_first = (np.float64(first) + step * k).astype(np.float32)
    from_last = (np.float64(last) - step * (n - 1 - k)).astype(np.float32)
    return np.where(k < n // 2, from_first, from_last)


def rounded(product: Any) -> Any:
    """Returns the product, rounded to its dtype before anything is added to it; non-finite values become NaN.

    Takes NumPy or JAX arrays and returns the same kind.

    Compilers contract a * b + c into one fused multiply-add, whose last bit differs from bitsandbytes' two steps, and
    XLA on CPUs drops optimization barriers before LLVM sees them. A select between the two stops the contraction.
    """
    xp = product.__array_namespace__()
    return xp.where(xp.isfinite(product), product, xp.nan)
