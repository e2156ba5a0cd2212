"""Random weights in the block formats of ggml, for tests."""

import gguf
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor


def random_codes(ggml_type: str, rows: tuple[int, ...], columns: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 [*rows, bytes per row]: every bit of the codes is random, and weights are about a tenth."""
    rng = np.random.default_rng(seed)
    block = BLOCK_FORMATS[ggml_type]
    blocks = rng.integers(0, 256, (*rows, columns // block.weights, block.nbytes), np.uint8)
    largest = {"Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 127 * 32, "Q8_0": 127}.get(ggml_type, 16)
    for offset in block.halves:
        scales = rng.normal(0, 0.3 / largest, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    if ggml_type == "MXFP4":
        blocks[..., 0] = rng.integers(119, 125, blocks.shape[:-1])
    return blocks.reshape(*rows, row_bytes(ggml_type, columns))


def random_ggml(ggml_type: str, stack: tuple[int, ...], shape: tuple[int, int], seed: int = 0) -> GgmlTensor:
    """Returns random weights, stacked."""
    codes = jnp.asarray(random_codes(ggml_type, (*stack, shape[0]), shape[1], seed))
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=shape, dtype="float32")


def dequantized(weight: GgmlTensor) -> np.ndarray:
    """Returns the weights that the gguf package computes, f32 [..., N, K]."""
    codes = np.asarray(weight.codes)
    rows = gguf.quants.dequantize(
        codes.reshape(-1, codes.shape[-1]), gguf.constants.GGMLQuantizationType[weight.ggml_type]
    )
    return rows.reshape(*codes.shape[:-1], -1)
