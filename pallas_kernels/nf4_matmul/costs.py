"""What a product with a 4-bit weight costs by arithmetic: operations, bytes, and which roof it stands under.

Nothing here is measured. Dimension key: M rows, N out, K in.
"""

import dataclasses
import math

from pallas_kernels.formats.layouts import LAYOUTS

ACTIVATION_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one weight (N, K) as it is held between uses."""

    codes: int
    constants: int


def held(
    shape: tuple[int, ...],
    layout: str,
    *,
    block_size: int = 64,
    nested_block_size: int = 256,
    double_quant: bool = True,
) -> Held:
    """codes N K / 2 and what the layout adds to fill its last bytes. Constants: 4 G for G = ceil(N K / block_size)
    blocks in f32; double-quantized, G bytes of codes, 4 ceil(G / nested_block_size) of their own constants, and 4 of
    the offset."""
    blocks = -(-math.prod(shape) // block_size)
    double = blocks + 4 * -(-blocks // nested_block_size) + 4
    return Held(codes=math.prod(LAYOUTS[layout].codes_shape(shape)), constants=double if double_quant else 4 * blocks)


def product_flops(rows: int, shape: tuple[int, ...]) -> int:
    """2 M N K, forward as backward."""
    return 2 * rows * math.prod(shape)


def dequantized_bytes(shape: tuple[int, ...]) -> int:
    """2 N K: the buffer of an implementation that dequantizes a whole weight to bfloat16."""
    return ACTIVATION_BYTES * math.prod(shape)


def expanded_bytes(shape: tuple[int, int]) -> int:
    """2 N 2 ceil(K / 128): one layer's constants as fused kernels on GPUs read them, expanded before the product."""
    return ACTIVATION_BYTES * shape[0] * 2 * -(-shape[1] // 128)


def traffic(rows: int, shape: tuple[int, int], layout: str, *, fused: bool) -> int:
    """Bytes between memory and chip, each array once: codes + constants + 2 M (N + K), and what is written and read
    again: 2 N K where the weight is not dequantized inside the product, else its expanded constants."""
    kept = held(shape, layout)
    through = 2 * (expanded_bytes(shape) if fused else dequantized_bytes(shape))
    return kept.codes + kept.constants + ACTIVATION_BYTES * rows * sum(shape) + through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """Where a product stands under a card's two roofs.

    Attributes:
      intensity: FLOP a byte.
      ridge: FLOP a byte above which the card's peak bounds it, below which its bandwidth does.
      seconds: of the roof that bounds it; a product can not be faster.
    """

    intensity: float
    ridge: float
    seconds: float

    @property
    def bound(self) -> str:
        """`compute` or `memory`."""
        return "compute" if self.intensity >= self.ridge else "memory"


def roof(rows: int, shape: tuple[int, int], layout: str, *, fused: bool, peak: float, bandwidth: float) -> Roof:
    """max(FLOP / peak, bytes / bandwidth), peak in FLOP/s and bandwidth in bytes/s."""
    flops, moved = product_flops(rows, shape), traffic(rows, shape, layout, fused=fused)
    return Roof(intensity=flops / moved, ridge=peak / bandwidth, seconds=max(flops / peak, moved / bandwidth))
