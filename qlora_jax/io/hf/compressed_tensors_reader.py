"""Reads 4-bit integers of compressed-tensors in its `pack-quantized` format, as llm-compressor writes them.

A weight of N x K is `weight_packed` I32 [N, K / 8], `weight_scale` [N, G] and `weight_shape` I64 [2]; if it is not
symmetric, also `weight_zero_point` I32 [N / 8, G]. A word has eight integers plus 8, the first in the lowest bits.
`weight_g_idx` I32 [K] is the group of each column, if calibration reordered them.

Dimension key: N out, K in, G groups per row.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from qlora_jax.io.hf.integer_groups import (
    SCALE_TYPES,
    WHOLE_ROW,
    Groups,
    IntegerMethod,
    IntegerWeight,
    Parts,
    Settings,
    column_order,
    group_size_problems,
    matrix_of_words,
    nibbles,
    setting_problems,
    tensor_problems,
)

SYMMETRIC_ZERO = 8
FORMAT = "pack-quantized"
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
        found = layers.get("format") or settings.get("format")
        if found != FORMAT:
            problems.append(f"format of {name}: found {found}, expected {FORMAT}")
        problems += [f"config_groups.{name}.{problem}" for problem in _layer_problems(layers)]
    return problems


def _layer_problems(layers: LayerSettings) -> list[str]:
    activations = {"input_activations": (None,), "output_activations": (None,)}
    problems = setting_problems(layers, activations)
    if (weights := layers["weights"]) is None:
        return [*problems, "weights: found None, expected those of integers"]
    expected = {"num_bits": (4,), "type": ("int",), "strategy": ("group", "channel"), "dynamic": (False,)}
    return problems + [f"weights.{problem}" for problem in setting_problems(weights, expected)]


def _weight(parts: Parts, settings: Settings) -> IntegerWeight:
    n, words = matrix_of_words(parts["weight_packed"])
    k, scales = words * 8, parts["weight_scale"]
    groups = scales.shape[1] if len(scales.shape) == 2 else 0
    size = k // groups if groups else 0
    problems = list(group_size_problems(size, k)) or _size_problems(settings, size, k)
    expected = _expected(n, k, k // size if size else 0)
    problems += [*tensor_problems(parts, expected), *_missing(parts, _weights(settings))]
    if problems:
        raise ValueError("; ".join(problems))
    if (shape := parts["weight_shape"].read().tolist()) != [n, k]:
        raise ValueError(f"weight_shape: found {shape}, expected {[n, k]}")
    return IntegerWeight(
        shape=(n, k),
        group_size=size,
        scale_type=SCALE_TYPES[scales.file_type],
        read=functools.partial(_read, parts),
        order=column_order(parts.get("weight_g_idx"), k, size),
    )


def _expected(n: int, k: int, groups: int) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """Returns the types and the shape that each tensor of a weight may have."""
    return {
        "weight_scale": ([*SCALE_TYPES], (n, groups)),
        "weight_shape": (["I64"], (2,)),
        "weight_zero_point": (["I32"], (-(-n // 8), groups)),
        "weight_g_idx": (["I32"], (k,)),
    }


def _missing(parts: Parts, settings: Sequence[WeightSettings]) -> Iterator[str]:
    """Yields the tensors that every group of layers needs, and that are missing."""
    if "weight_zero_point" not in parts and not any(each.get("symmetric", True) for each in settings):
        yield "missing weight_zero_point"
    if "weight_g_idx" not in parts and all(each.get("actorder") in BY_GROUP for each in settings):
        yield "missing weight_g_idx, the group of each column with actorder"


def _weights(settings: Settings) -> list[WeightSettings]:
    return [layers["weights"] for layers in settings["config_groups"].values()]


def _size_problems(settings: Settings, size: int, columns: int) -> list[str]:
    """Returns a line if no group of layers has this number of columns per scale."""
    allowed = {each.get("group_size") or columns for each in _weights(settings)}
    if size in {columns if each == WHOLE_ROW else each for each in allowed}:
        return []
    return [f"group_size: found {size} by the shape of weight_scale, expected {' or '.join(map(str, sorted(allowed)))}"]


def _read(parts: Parts, first: int, end: int) -> Groups:
    scales_NG = np.ascontiguousarray(parts["weight_scale"].read_rows(first, end))
    zeros_NG = np.full(scales_NG.shape, SYMMETRIC_ZERO, np.uint8)
    if (packed := parts.get("weight_zero_point")) is not None:
        start = first // 8
        words = packed.read_rows(start, -(-end // 8))
        zeros_NG = np.ascontiguousarray(nibbles(words.T).T[first - start * 8 : end - start * 8])
    return Groups(codes=nibbles(parts["weight_packed"].read_rows(first, end)), zeros=zeros_NG, scales=scales_NG)


COMPRESSED_TENSORS = IntegerMethod(
    title="compressed-tensors",
    settings=CompressedTensorsSettings,
    problems=_settings_problems,
    parts={
        "weight_packed": True,
        "weight_scale": True,
        "weight_shape": True,
        "weight_zero_point": False,
        "weight_g_idx": False,
    },
    weight=_weight,
)
