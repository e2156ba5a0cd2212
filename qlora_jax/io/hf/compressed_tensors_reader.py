"""Reads integers, NVFP4, MXFP4 and FP8 of compressed-tensors, as llm-compressor writes them.

In `pack-quantized`, a weight of N x K in 4 bits is `weight_packed` I32 [N, K / 8], `weight_scale` [N, G] and
`weight_shape` I64 [2]; if it is not symmetric, also `weight_zero_point` I32 [N / 8, G]. A word has eight integers plus
8, the first in the lowest bits; of 8 bits four, plus 128. `weight_g_idx` I32 [K] is the group of each column, if
calibration reordered them.

In `nvfp4-pack-quantized` it is `weight_packed` U8 [N, K / 2], `weight_scale` F8_E4M3 [N, K / 16] and
`weight_global_scale` F32 [1], by which the scales are divided. In `mxfp4-pack-quantized`, `weight_scale` is U8
[N, K / 32], the exponents of powers of two plus 127. In `float-quantized` it is `weight` F8_E4M3 [N, K] and
`weight_scale`, of the tensor, of each row or of each block. Scales of activations are left out, because these stay in
16 bits here.

Dimension key: N out, K in, G groups per row.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from qlora_jax.io.hf.coded_weights import CodedMethod, CodedWeight, Parts, Settings, setting_problems, tensor_problems
from qlora_jax.io.hf.float_codes import fp8_weight, mxfp4_weight, nvfp4_weight
from qlora_jax.io.hf.fp8_reader import block_size_problems
from qlora_jax.io.hf.integer_groups import (
    SCALE_TYPES,
    WHOLE_ROW,
    Groups,
    IntegerWeight,
    column_order,
    group_size_problems,
    integers,
    matrix_of_words,
)
from qlora_jax.model_source import TensorEntry

INTEGERS, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
# Settings of the weights of each format; FP8 whose activations stay in 16 bits is `naive-quantized`.
_COMMON: Mapping[str, tuple[object, ...]] = {"dynamic": (False,)}
_FP8 = {**_COMMON, "num_bits": (8,), "type": ("float",), "strategy": ("tensor", "channel", "block")}
FORMATS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    INTEGERS: {"num_bits": (4, 8), "type": ("int",), "strategy": ("group", "channel"), **_COMMON},
    NVFP4: {"num_bits": (4,), "type": ("float",), "strategy": ("tensor_group",), "group_size": (16,), **_COMMON},
    MXFP4: {"num_bits": (4,), "type": ("float",), "strategy": ("group",), "group_size": (32,), **_COMMON},
    "float-quantized": _FP8,
    "naive-quantized": _FP8,
}
BY_GROUP = ("group", "dynamic", True)  # values of actorder whose groups are not runs of columns


class WeightSettings(TypedDict):
    """The settings of the weights of one group of layers."""

    num_bits: int
    type: NotRequired[str]
    symmetric: NotRequired[bool]
    strategy: NotRequired[str | None]
    group_size: NotRequired[int | None]
    dynamic: NotRequired[bool | str]
    actorder: NotRequired[bool | str | None]
    block_structure: NotRequired[list[int] | None]


class LayerSettings(TypedDict):
    """The settings of one group of layers."""

    weights: WeightSettings | None
    input_activations: NotRequired[dict[str, object] | None]
    output_activations: NotRequired[dict[str, object] | None]
    format: NotRequired[str | None]


class CompressedTensorsSettings(TypedDict):
    """The keys of quantization_config that are used."""

    config_groups: dict[str, LayerSettings]
    format: NotRequired[str | None]
    kv_cache_scheme: NotRequired[dict[str, object] | None]
    sparsity_config: NotRequired[dict[str, object] | None]
    transform_config: NotRequired[dict[str, object] | None]


def _settings_problems(settings: Settings) -> list[str]:
    problems = setting_problems(settings, {"kv_cache_scheme": (None,), "transform_config": (None, {})})
    if (sparsity := (settings.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        problems.append(f"sparsity_config.format: found {sparsity}, expected dense")
    if not settings["config_groups"]:
        problems.append("config_groups: found none, expected at least one")
    for name, layers in settings["config_groups"].items():
        found = _format(layers, settings)
        if found not in FORMATS:
            problems.append(f"format of {name}: found {found}, expected {' or '.join(FORMATS)}")
        problems += [f"config_groups.{name}.{problem}" for problem in _layer_problems(layers, found)]
    return problems


def _format(layers: LayerSettings, settings: Settings) -> str | None:
    return layers.get("format") or settings.get("format")


def _layer_problems(layers: LayerSettings, found: str | None) -> list[str]:
    problems = setting_problems(layers, {"output_activations": (None,)})
    if found == INTEGERS:
        problems = setting_problems(layers, {"input_activations": (None,)}) + problems
    if (weights := layers["weights"]) is None:
        return [*problems, "weights: found None, expected settings"]
    of_weights = setting_problems(weights, FORMATS.get(found or "", {}))
    of_weights += block_size_problems("block_structure", weights.get("block_structure"))
    return problems + [f"weights.{problem}" for problem in of_weights]


def _weight(parts: Parts, settings: Settings) -> CodedWeight:
    """Returns a weight, whose tensors show its format."""
    codes = [name for name in ("weight_packed", "weight") if name in parts]
    if len(codes) != 1:
        raise ValueError(f"found {' and '.join(codes) or 'no codes'}, expected weight_packed or weight")
    if codes == ["weight"]:
        sizes = [each.get("block_structure") for each in _weights(settings)]
        blocks = [(size[0], size[1]) for size in sizes if size is not None]
        return fp8_weight(parts, "weight_scale", [(None, None), (1, None), *blocks])
    forms = {_format(layers, settings) for layers in settings["config_groups"].values()}
    in_bytes = parts["weight_packed"].file_type == "U8"
    if in_bytes and MXFP4 in forms and "weight_global_scale" not in parts:
        return mxfp4_weight(parts)
    if in_bytes and NVFP4 in forms:
        if "weight_global_scale" not in parts:
            raise ValueError("missing weight_global_scale")
        return nvfp4_weight(parts, "weight_packed", "weight_global_scale", inverse=True)
    return _integer_weight(parts, settings)


def _integer_weight(parts: Parts, settings: Settings) -> CodedWeight:
    if "weight_shape" not in parts:
        raise ValueError("missing weight_shape")
    n, words = matrix_of_words(parts["weight_packed"])
    bits = _bits(parts["weight_shape"], words, settings)
    k, scales = words * 32 // bits, parts["weight_scale"]
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    size = k // groups if groups else 0
    problems = list(group_size_problems(size, k)) or _size_problems(settings, size, k)
    expected = _expected(n, k, bits, k // size if size else 0)
    problems += [*tensor_problems(parts, expected), *_missing(parts, _weights(settings, INTEGERS))]
    if problems:
        raise ValueError("; ".join(problems))
    if (shape := parts["weight_shape"].read().tolist()) != [n, k]:
        raise ValueError(f"weight_shape: found {shape}, expected {[n, k]}")
    return IntegerWeight(
        shape=(n, k),
        bits=bits,
        group_size=size,
        scale_type=SCALE_TYPES[scales.file_type],
        read=functools.partial(_read, parts, bits),
        order=column_order(parts.get("weight_g_idx"), k, size),
    ).coded()


def _bits(shape: TensorEntry, words: int, settings: Settings) -> int:
    """Returns the bits per integer, with which rows of words have as many columns as `weight_shape` says."""
    allowed = dict.fromkeys(each["num_bits"] for each in _weights(settings, INTEGERS))
    columns = int(shape.read()[-1]) if shape.file_type == "I64" and shape.shape == (2,) else 0
    return next((bits for bits in allowed if words * 32 // bits == columns), next(iter(allowed)))


def _expected(n: int, k: int, bits: int, groups: int) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Returns the types and the shape that each tensor of a weight may have."""
    return {
        "weight_scale": ([*SCALE_TYPES], (n, groups)),
        "weight_shape": (["I64"], (2,)),
        "weight_zero_point": (["I32"], (-(-n * bits // 32), groups)),
        "weight_g_idx": (["I32"], (k,)),
    }


def _missing(parts: Parts, settings: Sequence[WeightSettings]) -> Iterator[str]:
    """Yields the tensors that every group of layers needs, and that are missing."""
    if "weight_zero_point" not in parts and not any(each.get("symmetric", True) for each in settings):
        yield "missing weight_zero_point"
    if "weight_g_idx" not in parts and all(each.get("actorder") in BY_GROUP for each in settings):
        yield "missing weight_g_idx, the group of each column with actorder"


def _weights(settings: Settings, form: str | None = None) -> list[WeightSettings]:
    """Returns the settings of the weights of all groups of layers, or of those in a format."""
    groups = settings["config_groups"].values()
    return [layers["weights"] for layers in groups if form in (None, _format(layers, settings))]


def _size_problems(settings: Settings, size: int, columns: int) -> list[str]:
    """Returns a line if no group of layers has this number of columns per scale."""
    allowed = {each.get("group_size") or columns for each in _weights(settings, INTEGERS)}
    if size in {columns if each == WHOLE_ROW else each for each in allowed}:
        return []
    return [f"group_size: found {size} by the shape of weight_scale, expected {' or '.join(map(str, sorted(allowed)))}"]


def _read(parts: Parts, bits: int, first: int, end: int) -> Groups:
    per_word = 32 // bits
    scales_NG = np.ascontiguousarray(parts["weight_scale"].read_rows(first, end))
    zeros_NG = np.full(scales_NG.shape, 1 << (bits - 1), np.uint8)
    if (packed := parts.get("weight_zero_point")) is not None:
        start = first // per_word
        words = packed.read_rows(start, -(-end // per_word))
        own = slice(first - start * per_word, end - start * per_word)
        zeros_NG = np.ascontiguousarray(integers(words.T, bits).T[own])
    codes_NK = integers(parts["weight_packed"].read_rows(first, end), bits)
    return Groups(codes=codes_NK, zeros=zeros_NG, scales=scales_NG)


COMPRESSED_TENSORS = CodedMethod(
    title="compressed-tensors",
    settings=CompressedTensorsSettings,
    problems=_settings_problems,
    parts={"weight_scale": True}
    | dict.fromkeys(("weight_packed", "weight", "weight_global_scale", "weight_shape"), False)
    | dict.fromkeys(("weight_zero_point", "weight_g_idx", "input_global_scale", "input_scale"), False),
    weight=_weight,
)
