"""4-bit quantization of weights in bitsandbytes' formats, bit for bit, in NumPy and under jit."""

import jax

from pallas_kernels.formats.dequantize import dequantize as _dequantize
from qlora_jax.quant.blockwise import double_quantize as double_quantize
from qlora_jax.quant.blockwise import quantize as quantize
from qlora_jax.quant.blockwise import quantize_traceable as quantize_traceable
from qlora_jax.quant.reference import quantize_numpy as quantize_numpy
from qlora_jax.quant.settings import QuantSettings as QuantSettings

dequantize = jax.jit(_dequantize, static_argnames="dtype")
