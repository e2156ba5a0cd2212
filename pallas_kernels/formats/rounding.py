"""Two-step rounding that compilers keep."""

from typing import Any


def rounded(product: Any) -> Any:
    """The product, rounded to its dtype before anything is added to it. NumPy or JAX; not finite becomes NaN.

    Compilers contract a * b + c into one fused multiply-add, whose last bit differs from bitsandbytes' two steps, and
    XLA on CPUs drops optimization barriers before LLVM sees them. A select between the two stops the contraction.
    """
    xp = product.__array_namespace__()
    return xp.where(xp.isfinite(product), product, xp.nan)
