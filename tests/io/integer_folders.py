"""Folders in integers of GPTQ, AWQ and compressed-tensors, packed one integer at a time from the formulas.

A weight is w[n, k] = scale[n, g] (code[n, k] - zero[n, g]), with g the group of column k.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.io.tiny_models import write_folder

AWQ_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


class Integers(NamedTuple):
    """A random weight: codes [N, K], zeros [N, G], scales [N, G], and the group of each column [K]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def dense(self) -> np.ndarray:
        """The weight, f32 [N, K]."""
        scales, zeros = (each.astype(np.float32)[:, self.groups] for each in (self.scales, self.zeros))
        return scales * (self.codes.astype(np.float32) - zeros)


def random_integers(
    shape: tuple[int, int],
    group_size: int = 32,
    dtype: Any = np.float16,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
    bits: int = 4,
) -> Integers:
    """Draws codes, zeros and scales; dense values are about those of a layer of K inputs.

    Scales have four significant bits, so that a product with an integer is exact in bfloat16, too.
    """
    rng, (n, k) = np.random.default_rng(seed), shape
    size = k if group_size == -1 else group_size
    zeros = np.full((n, k // size), 1 << (bits - 1), np.uint8) if symmetric else _zeros(rng, (n, k // size), bits)
    exponents = rng.integers(-1, 2, (n, k // size)) - int(np.log2(5 / 16 * 2**bits * k**0.5))
    scales = np.ldexp(rng.integers(8, 16, (n, k // size)) / 8, exponents).astype(dtype)
    groups = np.arange(k) // size
    return Integers(
        rng.integers(0, 2**bits, (n, k), np.uint8), zeros, scales, rng.permutation(groups) if act_order else groups
    )


def _zeros(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Draws zeros of 4 bits from 1 to 15, most near 8: far from it, all weights of a group would have one sign."""
    return (1 + rng.binomial(2**bits - 2, 0.5, shape)).astype(np.uint8)


def rounded(weight: np.ndarray, group_size: int) -> Integers:
    """Rounds a weight to the nearest of 16 values between the least and the most of each group, zero included."""
    values = weight.astype(np.float32).reshape(len(weight), -1, group_size)
    low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
    scales = np.maximum((high - low) / 15, 1e-6).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 0, 15)
    codes = np.clip(np.round(values / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, 15)
    groups = np.arange(weight.shape[1]) // group_size
    return Integers(codes.reshape(weight.shape).astype(np.uint8), zeros.astype(np.uint8), scales, groups)


def words(integers: np.ndarray, bits: int = 4) -> np.ndarray:
    """Packs [R, 8 C] of 4 bits into I32 [R, C], the first of eight integers in the lowest bits."""
    each = 32 // bits
    packed = np.zeros((len(integers), integers.shape[1] // each), np.uint32)
    for place in range(each):
        packed |= integers[:, place::each].astype(np.uint32) << np.uint32(bits * place)
    return packed.view(np.int32)


def gptq(weight: Integers, version: int = 1, with_order: bool = True, bits: int = 4) -> dict[str, np.ndarray]:
    """The tensors of a weight of GPTQ; the first version stores each zero less one."""
    stored = weight.zeros.T - (version == 1)
    tensors = {"qweight": words(weight.codes, bits).T, "qzeros": words(stored, bits), "scales": weight.scales.T}
    return tensors | ({"g_idx": weight.groups.astype(np.int32)} if with_order else {})


def awq(weight: Integers, bits: int = 4) -> dict[str, np.ndarray]:
    """The tensors of a weight of AWQ (gemm): place i of a word has output AWQ_ORDER[bits][i] of its outputs."""

    def interleaved(rows: np.ndarray) -> np.ndarray:
        moved = np.empty_like(rows)
        each = 32 // bits
        for place, output in enumerate(AWQ_ORDER[bits]):
            moved[:, place::each] = rows[:, output::each]
        return words(moved, bits)

    return {"qweight": interleaved(weight.codes.T), "qzeros": interleaved(weight.zeros.T), "scales": weight.scales.T}


def compressed(weight: Integers, symmetric: bool = True, bits: int = 4) -> dict[str, np.ndarray]:
    """The tensors of a weight of compressed-tensors (pack-quantized)."""
    shape = np.array(weight.codes.shape, np.int64)
    tensors = {"weight_packed": words(weight.codes, bits), "weight_scale": weight.scales, "weight_shape": shape}
    return tensors | ({} if symmetric else {"weight_zero_point": words(weight.zeros.T, bits).T})


def gptq_config(group_size: int = 32, **settings: Any) -> dict[str, Any]:
    """A quantization_config of GPTQ."""
    common = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": False, "desc_act": False}
    return common | {"checkpoint_format": "gptq"} | settings


def awq_config(group_size: int = 32, **settings: Any) -> dict[str, Any]:
    """A quantization_config of AWQ."""
    common = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return common | settings


def compressed_config(group_size: int = 32, symmetric: bool = True, bits: int = 4, **settings: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors; group_size -1 is one scale per output."""
    whole = group_size == -1
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None}
    weights |= {"strategy": "channel" if whole else "group", "group_size": None if whole else group_size}
    layers = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    common = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return common | {"config_groups": {"group_0": layers}, "ignore": ["lm_head"], "kv_cache_scheme": None} | settings


class Form(NamedTuple):
    """A form of weights in codes: how they are drawn, packed and described."""

    drawn: Mapping[str, Any]
    pack: Callable[[Any], dict[str, np.ndarray]]
    config: Mapping[str, Any]
    draw: Callable[..., Any] = random_integers


FORMS = {
    "gptq": Form({}, gptq, gptq_config()),
    "gptq, v2": Form({"group_size": 64}, lambda w: gptq(w, 2, False), gptq_config(64, checkpoint_format="gptq_v2")),
    "gptq, a group per row": Form({"group_size": -1, "symmetric": True}, gptq, gptq_config(-1, sym=True)),
    "awq": Form({}, awq, awq_config()),
    "awq, groups of 64": Form({"group_size": 64}, awq, awq_config(64)),
    "compressed": Form({"dtype": ml_dtypes.bfloat16, "symmetric": True}, compressed, compressed_config()),
    "compressed, asymmetric": Form(
        {"group_size": 64}, lambda w: compressed(w, symmetric=False), compressed_config(64, symmetric=False)
    ),
    "gptq, 8 bits": Form({"bits": 8, "group_size": 64}, lambda w: gptq(w, bits=8), gptq_config(64, bits=8)),
    "gptq, 2 bits": Form({"bits": 2}, lambda w: gptq(w, bits=2), gptq_config(bits=2)),
    "awq, 8 bits": Form({"bits": 8}, lambda w: awq(w, bits=8), awq_config(bits=8)),
    "compressed, 8 bits": Form(
        {"bits": 8, "dtype": ml_dtypes.bfloat16}, lambda w: compressed(w, False, 8), compressed_config(32, False, 8)
    ),
    "compressed, a group per row": Form({"group_size": -1, "symmetric": True}, compressed, compressed_config(-1)),
}


def write_integer_folder(
    folder: Path, form: Form, config: dict[str, Any], weights: Mapping[str, np.ndarray], **files: str
) -> dict[str, np.ndarray]:
    """Writes a folder whose linear layers within the layers are random codes; returns the dense weights."""
    dense, tensors = dict(weights), {}
    for seed, (name, values) in enumerate(weights.items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = values
            continue
        drawn = form.draw((values.shape[0], values.shape[1]), seed=seed, **form.drawn)
        dense[name] = drawn.dense()
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": np.ascontiguousarray(each) for part, each in form.pack(drawn).items()}
    write_folder(folder, config | {"quantization_config": dict(form.config)}, tensors, 1, **files)
    return dense
