"""Random weights in the block formats of ggml and of other files' codes, for tests."""

import dataclasses

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, row_bytes
from pallas_kernels.formats.ggml_tensor import SPLIT_K, GgmlTensor, to_blocks, to_split_k
from qlora_jax.nn.frozen_weight import MixedStack, PaddedStack

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random_codes(ggml_type: str, rows: tuple[int, ...], columns: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 [*rows, bytes per row]: every bit of the codes is random, and weights are about a tenth."""
    rng = np.random.default_rng(seed)
    block = BLOCK_FORMATS[ggml_type]
    blocks = rng.integers(0, 256, (*rows, columns // block.weights, block.nbytes), np.uint8)
    largest = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 127 * 32, "Q8_0": 127}
    largest |= {"IQ4_NL": 127, "IQ4_XS": 127 * 32}
    largest = 256 if ggml_type.startswith("INT8") else largest.get(ggml_type, 16)
    for offset in block.halves:
        scales = rng.normal(0, 0.3 / largest, blocks.shape[:-1]).astype(block.half_type)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    if ggml_type == "MXFP4":
        blocks[..., 0] = rng.integers(119, 125, blocks.shape[:-1])
    if ggml_type.startswith("INT4"):
        blocks[..., 2] %= 17
    if ggml_type.startswith(("NVFP4", "FP8")):
        scales = rng.uniform(1, 2, blocks.shape[:-1]).astype(np.float32) * 2.0 ** (
            9 if ggml_type.endswith("INV") else -9
        )
        blocks[..., :4] = scales[..., None].view(np.uint8)
        numbers = blocks[..., 4 : block.floats[1][2] + 4]  # e4m3, of which two bytes are not a number
        numbers[(numbers & 127) == 127] = 5
    return blocks.reshape(*rows, row_bytes(ggml_type, columns))


def random_ggml(ggml_type: str, stack: tuple[int, ...], shape: tuple[int, int], seed: int = 0) -> GgmlTensor:
    """Returns random weights, stacked."""
    codes = jnp.asarray(random_codes(ggml_type, (*stack, shape[0]), shape[1], seed))
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=shape, dtype="float32")


def in_split_k(weight: GgmlTensor) -> GgmlTensor:
    """Returns the weights in the layout of the GPU kernels."""
    return dataclasses.replace(weight, codes=to_split_k(weight.codes, weight.ggml_type), layout=SPLIT_K)


def dequantized(weight: GgmlTensor) -> np.ndarray:
    """Returns the weights f32 [..., N, K], by the gguf package, or else by the formula."""
    codes = np.asarray(weight.codes)
    codes = to_blocks(codes, weight.ggml_type, weight.shape[1]) if weight.layout == SPLIT_K else codes
    if weight.ggml_type not in gguf.constants.GGMLQuantizationType.__members__:
        return by_formula(codes, weight.ggml_type)
    rows = gguf.quants.dequantize(
        codes.reshape(-1, codes.shape[-1]), gguf.constants.GGMLQuantizationType[weight.ggml_type]
    )
    return rows.reshape(*codes.shape[:-1], -1)


def by_formula(codes: np.ndarray, ggml_type: str) -> np.ndarray:
    """Returns the weights of uint8 [..., bytes per row] in blocks of integers, NVFP4 or FP8."""
    block = BLOCK_FORMATS[ggml_type]
    blocks = codes.reshape(-1, block.nbytes)
    if ggml_type.startswith("FP8"):
        weights = _floats(blocks, 0, 4, np.float32) * _floats(blocks, 4, block.nbytes, ml_dtypes.float8_e4m3fn)
    elif ggml_type.startswith("NVFP4"):
        end = 4 + block.weights // 16
        of_tensor, of_groups = _floats(blocks, 0, 4, np.float32), _floats(blocks, 4, end, ml_dtypes.float8_e4m3fn)
        scales = of_groups / of_tensor if ggml_type.endswith("INV") else of_groups * of_tensor
        weights = np.repeat(scales, 16, axis=1) * E2M1[_nibbles(blocks[:, end:])]
    else:
        integers = blocks[:, 3:] if ggml_type.startswith("INT8") else _nibbles(blocks[:, 3:])
        weights = _floats(blocks, 0, 2, block.half_type) * (integers.astype(np.float32) - blocks[:, 2:3])
    return weights.reshape(*codes.shape[:-1], -1)


def _floats(blocks: np.ndarray, start: int, end: int, dtype: np.typing.DTypeLike) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start:end]).view(dtype).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Unpacks rows of bytes: every 16 bytes are 32 codes, the low nibbles first."""
    parts = packed.reshape(len(packed), -1, 16)
    return np.concatenate([parts & 15, parts >> 4], -1).reshape(len(packed), -1)


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
