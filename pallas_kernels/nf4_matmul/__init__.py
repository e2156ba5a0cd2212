"""Products with frozen 4-bit weights: y = x w^T, and dx = dy w from the same packed codes.

`nf4_matmul` is the op. `api` holds the implementations, and chooses among them by `pallas_kernels.dispatch`,
`sharded` runs the op on several devices, `costs` counts FLOPs and bytes, and `mosaic` holds the Pallas kernels.
"""

from pallas_kernels.nf4_matmul.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.nf4_matmul.api import nf4_matmul as nf4_matmul
from pallas_kernels.nf4_matmul.preferred_layout import preferred_layout as preferred_layout
