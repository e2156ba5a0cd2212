"""Settings of a quantization, and checks of settings and weights."""

import dataclasses
import math

import numpy as np

from pallas_kernels.formats.tables import CODE_TABLES

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSettings:
    """The settings of a quantization; hashable, so that jit takes them as a static argument.

    Raises:
      ValueError: a setting is invalid; lists all that are.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        problems = []
        if self.quant_type not in CODE_TABLES:
            problems.append(f"quant_type={self.quant_type!r} is not one of {', '.join(CODE_TABLES)}")
        for name in ("block_size", "nested_block_size"):
            if getattr(self, name) not in BLOCK_SIZES:
                problems.append(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if problems:
            raise ValueError("cannot quantize: " + "; ".join(problems))


def check_weight(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError if a weight of this shape and dtype cannot be quantized; lists all problems."""
    problems = []
    if dtype.name not in WEIGHT_DTYPES:
        problems.append(f"its dtype is {dtype.name}, expected one of {', '.join(WEIGHT_DTYPES)}; cast it first")
    if math.prod(shape) == 0:
        problems.append(f"its shape {shape} holds no elements")
    if problems:
        raise ValueError("cannot quantize the weight: " + "; ".join(problems))


def check_finite(weight: np.ndarray) -> None:
    """Raises ValueError if an element is NaN or infinite; names the first by flat index and counts them all."""
    bad = np.flatnonzero(~np.isfinite(weight.reshape(-1)))
    if not bad.size:
        return
    first = int(bad[0])
    place = ", ".join(str(int(i)) for i in np.unravel_index(first, weight.shape))
    raise ValueError(
        f"cannot quantize the weight: {bad.size} of {weight.size} elements are not finite, the first is "
        f"{weight.reshape(-1)[first]} at flat index {first} [{place}]; expected finite values. The file is damaged, or "
        f"was saved after a training run that diverged."
    )
