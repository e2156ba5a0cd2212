"""Products with frozen 4-bit weights."""

from pallas_kernels.nf4_matmul.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_kernels.nf4_matmul.api import nf4_matmul as nf4_matmul
