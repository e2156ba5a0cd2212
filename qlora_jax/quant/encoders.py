"""Quantizes weights inside jit as the export of each format does, to the bit, and returns what its codes stand for.

Dimension key: N out, K in; `...` stacked layers, or layers and experts.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.formats.block_encoders import BLOCK_ENCODERS, encode_blocks, encode_mxfp4, encode_nvfp4
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.quant.blockwise import quantize_traceable
from qlora_jax.quant.settings import QuantSettings

type Encoder = Callable[[Float32[Array, "... N K"]], GgmlTensor | QTensor]


def _block_encoder(name: str) -> Encoder:
    ggml_type = BLOCK_ENCODERS[name].ggml_type

    def encode(weight: Float32[Array, "... N K"]) -> GgmlTensor:
        row_bytes(ggml_type, weight.shape[-1])  # raises ValueError if a row is not whole blocks
        codes = encode_blocks(weight, name)
        return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=weight.shape[-2:], dtype="float32")

    return encode


def table_encoder(settings: QuantSettings) -> Encoder:
    """Returns the encoder of nf4 and the other formats with a table, with the settings of a run."""

    def encode(weight: Float32[Array, "... N K"]) -> QTensor:
        of_one: Callable[[Array], QTensor] = functools.partial(quantize_traceable, settings=settings)
        for _ in weight.shape[:-2]:
            of_one = jax.vmap(of_one)
        return of_one(weight)

    return encode


# By the names of GGUF's types and of groups of integers; nf4 with QLoRA's settings, nvfp4 and mxfp4 by their own.
ENCODERS: Mapping[str, Encoder] = {
    "nf4": table_encoder(QuantSettings()),
    "nvfp4": encode_nvfp4,
    "mxfp4": encode_mxfp4,
    **{name: _block_encoder(name) for name in BLOCK_ENCODERS},
}


def round_trip(weight: Float32[Array, "... N K"], encoder: Encoder) -> Float32[Array, "... N K"]:
    """Returns the weights that the codes stand for."""
    packed = jax.lax.optimization_barrier(encoder(weight))  # or XLA encodes a block for each weight that it decodes
    if isinstance(packed, GgmlTensor):
        return dequantize_ggml(packed, jnp.float32)
    return dequantize(packed, jnp.float32)
