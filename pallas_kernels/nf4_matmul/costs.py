"""The cost of a product with a 4-bit weight by arithmetic: operations, bytes, and the roofline.

Nothing here is measured. Dimension key: M rows, N out, K in.
"""

import dataclasses
import math

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import LAYOUTS, RUN
from pallas_kernels.formats.qtensor import QTensor

ACTIVATION_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """The stored bytes of one weight (N, K)."""

    codes: int
    constants: int


def weight_bytes(
    shape: tuple[int, ...],
    layout: str,
    *,
    block_size: int = 64,
    nested_block_size: int = 256,
    double_quant: bool = True,
) -> WeightBytes:
    """Returns the stored bytes of a weight.

    Codes take N K / 2 bytes and the layout's padding. G = ceil(N K / block_size) constants take 4 G bytes in f32.
    Double-quantized, they take G bytes of codes, 4 ceil(G / nested_block_size) of nested constants, and 4 of offset.
    """
    blocks = -(-math.prod(shape) // block_size)
    double = blocks + 4 * -(-blocks // nested_block_size) + 4
    return WeightBytes(
        codes=math.prod(LAYOUTS[layout].codes_shape(shape)), constants=double if double_quant else 4 * blocks
    )


def product_flops(rows: int, shape: tuple[int, ...]) -> int:
    """Returns 2 M N K, the FLOP of either direction."""
    return 2 * rows * math.prod(shape)


def dequantized_bytes(shape: tuple[int, ...]) -> int:
    """Returns 2 N K, the bytes of a whole weight dequantized to bfloat16."""
    return ACTIVATION_BYTES * math.prod(shape)


def scale_group(weight: QTensor | GgmlTensor) -> int:
    """Returns the number of columns that share a constant in the fused GPU kernels."""
    code = weight.code if isinstance(weight, GgmlTensor) else None
    return RUN if code is None else code.group


def expanded_bytes(shape: tuple[int, int], group: int = RUN) -> int:
    """Returns 2 N (128 / group) ceil(K / 128), the bytes of one layer's constants expanded for the fused GPU kernels.

    Args:
      group: columns that share a constant in the kernels.
    """
    return ACTIVATION_BYTES * shape[0] * (2 * RUN // group) * -(-shape[1] // (2 * RUN))


def traffic(rows: int, shape: tuple[int, int], layout: str, *, fused: bool) -> int:
    """Returns the bytes between memory and chip, each array once: codes + constants + 2 M (N + K) + intermediates.

    Intermediates are written and read: the expanded constants if the product is fused, else the dequantized weight.
    """
    stored = weight_bytes(shape, layout)
    through = 2 * (expanded_bytes(shape) if fused else dequantized_bytes(shape))
    return stored.codes + stored.constants + ACTIVATION_BYTES * rows * sum(shape) + through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """A product's place in a card's roofline model.

    Attributes:
      intensity: FLOP per byte.
      ridge: the FLOP per byte above which peak compute bounds a product, and below which bandwidth does.
      seconds: the lower bound of the product's time.
    """

    intensity: float
    ridge: float
    seconds: float

    @property
    def bound(self) -> str:
        """The limiting resource, `compute` or `memory`."""
        return "compute" if self.intensity >= self.ridge else "memory"

    @classmethod
    def of(cls, flops: int, moved: int, peak: float, bandwidth: float) -> "Roofline":
        """Computes the roofline of FLOP and moved bytes: max(FLOP / peak, bytes / bandwidth)."""
        seconds = max(flops / peak, moved / bandwidth)
        return cls(intensity=flops / moved, ridge=peak / bandwidth, seconds=seconds)


def roofline(rows: int, shape: tuple[int, int], layout: str, *, fused: bool, peak: float, bandwidth: float) -> Roofline:
    """Computes a product's roofline; peak in FLOP/s and bandwidth in bytes/s."""
    return Roofline.of(product_flops(rows, shape), traffic(rows, shape, layout, fused=fused), peak, bandwidth)
