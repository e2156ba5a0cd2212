"""Two-step rounding that compilers do not fuse away."""

from typing import Any


def rounded(product: Any) -> Any:
    """Returns the product, rounded to its dtype before anything is added to it; non-finite values become NaN.

    Takes NumPy or JAX arrays and returns the same kind.

    Compilers contract a * b + c into one fused multiply-add, whose last bit differs from bitsandbytes' two steps, and
    XLA on CPUs drops optimization barriers before LLVM sees them. A select between the two stops the contraction.
    """
    xp = product.__array_namespace__()
    return xp.where(xp.isfinite(product), product, xp.nan)
