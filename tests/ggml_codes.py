"""Random weights in the block formats of ggml and in groups of 4-bit integers, for tests."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.nn.frozen_weight import MixedStack, PaddedStack


def random_codes(ggml_type: str, rows: tuple[int, ...], columns: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 [*rows, bytes per row]: every bit of the codes is random, and weights are about a tenth."""
    rng = np.random.default_rng(seed)
    block = BLOCK_FORMATS[ggml_type]
    blocks = rng.integers(0, 256, (*rows, columns // block.weights, block.nbytes), np.uint8)
    largest = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 127 * 32, "Q8_0": 127}
    largest = largest.get(ggml_type, 16)
    for offset in block.halves:
        scales = rng.normal(0, 0.3 / largest, blocks.shape[:-1]).astype(block.half_type)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    if ggml_type == "MXFP4":
        blocks[..., 0] = rng.integers(119, 125, blocks.shape[:-1])
    if ggml_type.startswith("INT4"):
        blocks[..., 2] %= 17
    return blocks.reshape(*rows, row_bytes(ggml_type, columns))


def random_ggml(ggml_type: str, stack: tuple[int, ...], shape: tuple[int, int], seed: int = 0) -> GgmlTensor:
    """Returns random weights, stacked."""
    codes = jnp.asarray(random_codes(ggml_type, (*stack, shape[0]), shape[1], seed))
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=shape, dtype="float32")


def dequantized(weight: GgmlTensor) -> np.ndarray:
    """Returns the weights f32 [..., N, K], of INT4 by the formula, of other formats by the gguf package."""
    codes = np.asarray(weight.codes)
    if weight.ggml_type.startswith("INT4"):
        return int4_weights(codes, weight.ggml_type)
    rows = gguf.quants.dequantize(
        codes.reshape(-1, codes.shape[-1]), gguf.constants.GGMLQuantizationType[weight.ggml_type]
    )
    return rows.reshape(*codes.shape[:-1], -1)


def int4_weights(codes: np.ndarray, ggml_type: str) -> np.ndarray:
    """Returns scale (code - zero) for uint8 [..., bytes per row] of INT4 blocks: scale, zero, 32 codes in 16 bytes."""
    block = BLOCK_FORMATS[ggml_type]
    blocks = codes.reshape(*codes.shape[:-1], -1, block.nbytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view(block.half_type).astype(np.float32)
    packed = blocks[..., 3:].reshape(*blocks.shape[:-1], -1, 16)
    integers = np.concatenate([packed & 15, packed >> 4], -1).reshape(*blocks.shape[:-1], -1)
    return (scales * (integers.astype(np.float32) - blocks[..., 2:3])).reshape(*codes.shape[:-1], -1)


def padded_stack(mixed: MixedStack) -> PaddedStack:
    """Returns the blocks of a stack of experts, padded."""
    layers = [mixed.locate(layer) for layer in range(mixed.num_layers)]
    weights = [mixed.parts[part].layer(at) for part, at in layers]
    experts, shape = weights[0].codes.shape[0], (mixed.shape[0], mixed.shape[1])
    padded = PaddedStack.zeros(tuple(each.ggml_type for each in weights), experts, shape, mixed.dtype)
    codes = np.zeros(padded.codes.shape, np.uint8)
    for layer, weight in enumerate(weights):
        for expert in range(experts):
            codes[padded.place_of(layer, expert)] = np.asarray(weight.codes[expert]).reshape(-1)
    return dataclasses.replace(padded, codes=jnp.asarray(codes))
