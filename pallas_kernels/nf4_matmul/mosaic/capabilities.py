"""The calls that each Mosaic kernel supports, and up to how many rows it is used; imports no kernel before its use."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.dispatch import Capabilities, Direction, Implementation
from pallas_kernels.mosaic.installation import problem


class MostRows(NamedTuple):
    """The most rows for which a kernel is used.

    Attributes:
      by: the evidence: `reasoning`, or the card that measured it.
    """

    rows: int
    by: str


# A fused kernel saves writing and reading a dequantized weight: 4.5 bytes per weight for every M. Its loss against
# cuBLAS grows with M. On an H100 it saves 1.34 ps per weight and loses a tenth of the 2 M / (0.75 x 989e12) s that
# cuBLAS takes, so they are equal at M = 5000. On an A100 (2.2 ps, 312e12) they are equal at M = 2600, on an A6000
# (5.9 ps, 155e12) at 3400. On sm_120 and sm_121 cuBLAS multiplies by mma.sync too. On sm_100 it uses tcgen05, at least
# twice as fast as mma.sync, whose rate NVIDIA does not publish: at half of 2.25e15, a B200 (0.52 ps) is at equal at
# M = 500, at a quarter at 150. `skinny` makes two products of eight rows per decoded weight; for more rows, the others
# are better.
MOST_ROWS = {
    "hopper": MostRows(4096, by="reasoning"),
    "ampere": MostRows(2048, by="reasoning"),
    "ampere on sm_100": MostRows(256, by="reasoning"),
    "skinny": MostRows(16, by="reasoning"),
}

# The table of a code is a parameter of a kernel, and whether 16, 32 or 64 columns share a scale; codes of files have 16
# or 32. Only weights with such a code can have the layout.
_EVERY_KERNEL = {
    "layouts": ("split_k",),
    "dtypes": ("bfloat16", "float16"),
    "block_sizes": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "multiples": (64, 64),
}

HOPPER = Capabilities(devices=("sm_90",), rows=(1, MOST_ROWS["hopper"].rows), **_EVERY_KERNEL)
MMA_DEVICES = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "sm_121")
AMPERE = Capabilities(
    devices=MMA_DEVICES,
    rows=(1, MOST_ROWS["ampere"].rows),
    most_rows_on={"sm_100": MOST_ROWS["ampere on sm_100"].rows},
    **_EVERY_KERNEL,
)
# Few rows occur in decoding, which has no backward.
SKINNY = Capabilities(
    devices=(*MMA_DEVICES, "sm_90"),
    rows=(1, MOST_ROWS["skinny"].rows),
    directions=("forward",),
    **_EVERY_KERNEL,
)


def _kernel(module: str, direction: Direction) -> Callable[..., jax.Array]:
    """Returns a Mosaic kernel's function, imported on its first call: importing Mosaic takes most of a second."""

    def product(rows, weights, layer):
        kernels = importlib.import_module(f"pallas_kernels.nf4_matmul.mosaic.{module}")
        return getattr(kernels, direction)(rows, weights, layer)

    return product


def mosaic_kernel(module: str, capabilities: Capabilities) -> Implementation:
    """Returns the implementation by a Mosaic kernel, for a QTensor or for blocks with codes of 4 bits."""
    ways = _kernel(module, "forward"), _kernel(module, "backward")
    return Implementation(*ways, capabilities, fused=True, missing=problem)
