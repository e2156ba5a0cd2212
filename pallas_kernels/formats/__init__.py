"""The definition of a 4-bit weight: code tables, byte layouts, the `QTensor` pytree, dequantization, and shards."""

from pallas_kernels.formats.dequantize import dequantize as dequantize
from pallas_kernels.formats.dequantize import dequantize_numpy as dequantize_numpy
from pallas_kernels.formats.layouts import LAYOUTS as LAYOUTS
from pallas_kernels.formats.layouts import repack as repack
from pallas_kernels.formats.qtensor import QTensor as QTensor
from pallas_kernels.formats.tables import CODE_TABLES as CODE_TABLES
