"""What each Mosaic kernel can do, known without importing Mosaic, and up to how many rows it is taken."""

from typing import NamedTuple

from pallas_kernels.nf4_matmul.dispatch import Abilities


class MostRows(NamedTuple):
    """Up to how many rows a kernel is taken.

    Fields:
      by: what says so: `reasoning`, or the card that measured it.
    """

    rows: int
    by: str


# A weight that is dequantized first is written to memory and read again: 4.5 bytes a weight that a fused kernel saves,
# whatever M; what a fused kernel loses beside cuBLAS grows with M. With 1.34 ps a weight saved on an H100, and a tenth
# lost of the 2 M / (0.75 x 989e12) s that cuBLAS takes, they meet at M = 5000; with 2.2 ps on an A100 of 312e12, at
# 2600; with 5.9 ps on an A6000 of 155e12, at 3400. `skinny` makes two products of eight rows for each weight that it
# decodes; with more, the others are better.
MOST_ROWS = {
    "hopper": MostRows(4096, by="reasoning"),
    "ampere": MostRows(2048, by="reasoning"),
    "skinny": MostRows(16, by="reasoning"),
}

_EVERY_KERNEL = {
    "layouts": ("split_k",),
    "dtypes": ("bfloat16", "float16"),
    "block_sizes": (64, 128, 256, 512, 1024, 2048, 4096),
    "multiples": (64, 64),
}

HOPPER = Abilities(devices=("sm_90",), rows=(1, MOST_ROWS["hopper"].rows), **_EVERY_KERNEL)
AMPERE = Abilities(devices=("sm_80", "sm_86", "sm_89"), rows=(1, MOST_ROWS["ampere"].rows), **_EVERY_KERNEL)
# Few rows: forward alone, for they are rows of decoding, which has no backward.
SKINNY = Abilities(
    devices=("sm_80", "sm_86", "sm_89", "sm_90"),
    rows=(1, MOST_ROWS["skinny"].rows),
    directions=("forward",),
    **_EVERY_KERNEL,
)
