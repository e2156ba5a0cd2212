"""Reads weights of AWQ in its `gemm` form in 4 bits, as AutoAWQ and GPTQModel write them, or in 8.

A weight of N x K in 4 bits is `qweight` I32 [K, N / 8], `qzeros` I32 [G, N / 8] and `scales` [G, N]. A word has the
integers of eight neighbouring outputs, from the lowest bits on those of 0, 2, 4, 6, 1, 3, 5 and 7. In 8 bits it has
four, those of 0, 2, 1 and 3, as vLLM reads them; AutoAWQ writes no such files.

Dimension key: N out, K in, G groups per row.
"""

import functools
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Integer, UInt8

from qlora_jax.io.hf.coded_weights import CodedMethod, CodedWeight, Parts, Settings, setting_problems, tensor_problems
from qlora_jax.io.hf.integer_groups import (
    SCALE_TYPES,
    Groups,
    IntegerWeight,
    group_setting_problems,
    group_size_of,
    integers,
    matrix_of_words,
)

PLACES = {4: np.argsort([0, 2, 4, 6, 1, 3, 5, 7]), 8: np.argsort([0, 2, 1, 3])}  # by bits, in a word, of each output


class AwqSettings(TypedDict):
    """The keys of quantization_config that are used."""

    bits: int
    group_size: int
    zero_point: NotRequired[bool]
    version: NotRequired[str | None]
    format: NotRequired[str | None]
    backend: NotRequired[str | None]


def _settings_problems(settings: Settings) -> list[str]:
    problems = setting_problems(settings, {"bits": tuple(PLACES), "zero_point": (True,)})
    version = (settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        problems.append(f"version: found {version}, expected gemm")
    if settings.get("backend") == "llm-awq":
        problems.append("backend: found llm-awq, expected autoawq")
    return problems + group_setting_problems(settings)


def _weight(parts: Parts, settings: Settings) -> CodedWeight:
    k, words = matrix_of_words(parts["qweight"])
    n = words * (32 // settings["bits"])
    size = group_size_of(settings["group_size"], k)
    expected = {"qzeros": (["I32"], (k // size, words)), "scales": ([*SCALE_TYPES], (k // size, n))}
    if problems := tensor_problems(parts, expected):
        raise ValueError("; ".join(problems))
    return IntegerWeight(
        shape=(n, k),
        bits=settings["bits"],
        group_size=size,
        scale_type=SCALE_TYPES[parts["scales"].file_type],
        read=functools.partial(_read, parts, settings["bits"]),
    ).coded()


def _read(parts: Parts, bits: int, first: int, end: int) -> Groups:
    per_word = 32 // bits
    start, stop = first // per_word, -(-end // per_word)
    own = slice(first - start * per_word, end - start * per_word)
    codes_KN, zeros_GN = (_outputs(parts[name].read()[:, start:stop], bits)[:, own] for name in ("qweight", "qzeros"))
    return Groups(
        codes=np.ascontiguousarray(codes_KN.T),
        zeros=np.ascontiguousarray(zeros_GN.T),
        scales=np.ascontiguousarray(parts["scales"].read()[:, first:end].T),
    )


def _outputs(words: Integer[np.ndarray, "rows words"], bits: int) -> UInt8[np.ndarray, "rows _"]:
    """Unpacks words to the integers of their outputs, in order."""
    return integers(words, bits).reshape(len(words), -1, 32 // bits)[..., PLACES[bits]].reshape(len(words), -1)


AWQ = CodedMethod(
    title="AWQ",
    settings=AwqSettings,
    problems=_settings_problems,
    parts={"qweight": True, "qzeros": True, "scales": True},
    weight=_weight,
)
