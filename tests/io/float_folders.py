"""Folders in NVFP4 and FP8 of compressed-tensors, ModelOpt and DeepSeek, drawn at random, for tests."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.ggml_codes import E2M1
from tests.io.integer_folders import Form

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


class Nvfp4(NamedTuple):
    """A random weight: codes of E2M1 [N, K], scales of 16 of them, and the scale of the tensor."""

    codes: np.ndarray
    scales: np.ndarray
    of_tensor: np.float32
    inverse: bool

    def dense(self) -> np.ndarray:
        """The weight, f32 [N, K]."""
        scales = self.scales.astype(np.float32)
        scales = scales / self.of_tensor if self.inverse else scales * self.of_tensor
        return np.repeat(scales, 16, axis=1) * E2M1[self.codes]


class Mxfp4(NamedTuple):
    """A random weight: codes of E2M1 [N, K], and the exponents plus 127 of powers of two for 32 of them."""

    codes: np.ndarray
    exponents: np.ndarray

    def dense(self) -> np.ndarray:
        """The weight, f32 [N, K]."""
        scales = np.ldexp(np.float32(1), self.exponents.astype(np.int32) - 127)
        return np.repeat(scales, 32, axis=1) * E2M1[self.codes]


class Fp8(NamedTuple):
    """A random weight: numbers of e4m3 [N, K], and scales [R, C] of rectangles."""

    codes: np.ndarray
    scales: np.ndarray
    rectangle: tuple[int, int]

    def dense(self) -> np.ndarray:
        """The weight, f32 [N, K]."""
        rows, columns = (np.arange(size) // each for size, each in zip(self.codes.shape, self.rectangle, strict=True))
        return self.codes.astype(np.float32) * self.scales.astype(np.float32)[rows][:, columns]


def random_nvfp4(shape: tuple[int, int], inverse: bool = True, seed: int = 0) -> Nvfp4:
    """Draws codes and scales; dense values are about those of a layer of K inputs."""
    rng, (n, k) = np.random.default_rng(seed), shape
    scales = rng.uniform(1, 448, (n, k // 16)).astype(E4M3)
    of_tensor = np.float32(rng.uniform(1, 2) * 500 * k**0.5)
    return Nvfp4(rng.integers(0, 16, shape, np.uint8), scales, of_tensor if inverse else 1 / of_tensor, inverse)


def random_mxfp4(shape: tuple[int, int], seed: int = 0) -> Mxfp4:
    """Draws codes and powers of two; dense values are about those of a layer of K inputs."""
    rng, (n, k) = np.random.default_rng(seed), shape
    return Mxfp4(rng.integers(0, 16, shape, np.uint8), rng.integers(117, 122, (n, k // 32), np.uint8))


def random_fp8(
    shape: tuple[int, int], rectangle: tuple[int | None, int | None] = (32, 64), dtype: Any = np.float32, seed: int = 0
) -> Fp8:
    """Draws numbers and scales; dense values are about those of a layer of K inputs."""
    rng, (height, width) = (
        np.random.default_rng(seed),
        (each or size for each, size in zip(rectangle, shape, strict=True)),
    )
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 127) == 127] = 9  # two bytes are not a number
    grid = -(-shape[0] // height), -(-shape[1] // width)
    scales = (rng.uniform(1, 2, grid) / (100 * shape[1] ** 0.5)).astype(dtype)
    return Fp8(codes.view(E4M3), scales, (height, width))


def compressed_nvfp4(weight: Nvfp4) -> dict[str, np.ndarray]:
    """The tensors of a weight in `nvfp4-pack-quantized`."""
    of_tensor = np.array([weight.of_tensor])
    return {"weight_packed": pairs(weight.codes), "weight_scale": weight.scales, "weight_global_scale": of_tensor}


def compressed_mxfp4(weight: Mxfp4) -> dict[str, np.ndarray]:
    """The tensors of a weight in `mxfp4-pack-quantized`."""
    return {"weight_packed": pairs(weight.codes), "weight_scale": weight.exponents}


def modelopt_nvfp4(weight: Nvfp4) -> dict[str, np.ndarray]:
    """The tensors of a weight in NVFP4 of ModelOpt, with scales of an activation and of a cache."""
    numbers = {"weight_scale_2": weight.of_tensor, "input_scale": np.float32(0.1), "k_scale": np.float32(1)}
    return {"weight": pairs(weight.codes), "weight_scale": weight.scales} | {k: np.array(v) for k, v in numbers.items()}


def pairs(codes: np.ndarray) -> np.ndarray:
    """Packs two codes of 4 bits in a byte, the first in the low bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def fp8(weight: Fp8, scale: str = "weight_scale", axes: int = 2) -> dict[str, np.ndarray]:
    """The tensors of a weight in FP8; the scales have 0 to 2 axes."""
    scales = weight.scales.reshape([weight.scales.shape, (), (weight.scales.size,)][(axes + 1) % 3])
    return {"weight": weight.codes, scale: scales}


def deepseek_config(block: tuple[int, int] | None = (32, 64)) -> dict[str, Any]:
    """A quantization_config of DeepSeek's FP8."""
    common = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return common | {"weight_block_size": None if block is None else list(block)}


def compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with weights of floating-point numbers."""
    common = {"type": "float", "symmetric": True, "dynamic": False, "actorder": None}
    layers = {"targets": ["Linear"], "weights": common | weights, "output_activations": None}
    layers |= {"input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}
    described = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return described | {"config_groups": {"group_0": layers}, "kv_cache_scheme": None}


def modelopt_config(algorithm: str) -> dict[str, Any]:
    """A quantization_config of ModelOpt."""
    return {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_scheme": {"num_bits": 8}, "ignore": []}


NVFP4_CONFIG = compressed_config("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)
MXFP4_CONFIG = compressed_config("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)
FLOAT_FORMS = {
    "compressed, nvfp4": Form({}, compressed_nvfp4, NVFP4_CONFIG, random_nvfp4),
    "compressed, mxfp4": Form({}, compressed_mxfp4, MXFP4_CONFIG, random_mxfp4),
    "compressed, fp8 of rows": Form(
        {"rectangle": (1, None), "dtype": ml_dtypes.bfloat16},
        fp8,
        compressed_config("float-quantized", num_bits=8, strategy="channel"),
        random_fp8,
    ),
    "compressed, fp8 of the tensor": Form(
        {"rectangle": (None, None)},
        lambda weight: fp8(weight, axes=1),
        compressed_config("naive-quantized", num_bits=8, strategy="tensor"),
        random_fp8,
    ),
    "compressed, fp8 in blocks": Form(
        {},
        fp8,
        compressed_config("float-quantized", num_bits=8, strategy="block", block_structure=[32, 64]),
        random_fp8,
    ),
    "modelopt, nvfp4": Form({"inverse": False}, modelopt_nvfp4, modelopt_config("NVFP4"), random_nvfp4),
    "modelopt, fp8": Form(
        {"rectangle": (None, None)}, lambda weight: fp8(weight, axes=0), modelopt_config("FP8"), random_fp8
    ),
    "deepseek": Form(
        {"dtype": ml_dtypes.bfloat16}, lambda weight: fp8(weight, "weight_scale_inv"), deepseek_config(), random_fp8
    ),
    "deepseek, with partial blocks": Form(
        {"rectangle": (48, 96)}, lambda weight: fp8(weight, "weight_scale_inv"), deepseek_config((48, 96)), random_fp8
    ),
}
