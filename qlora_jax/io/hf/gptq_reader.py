"""Reads weights of GPTQ in 2, 4 or 8 bits, as AutoGPTQ and GPTQModel write them.

A weight of N x K in 4 bits is `qweight` I32 [K / 8, N], `qzeros` I32 [G, N / 8], `scales` [G, N] and, from some
writers, `g_idx` I32 [K], the group of each column. A word has eight integers, the first in the lowest bits; of 2 bits
16, of 8 bits four. In the first version of the format (`checkpoint_format` gptq) each word of `qzeros` is less by
0x11111111, so each zero by one; not in gptq_v2. GPTQModel adds that number to the words, not to the integers, which
matters if a zero is 0; so does this reader.

Dimension key: N out, K in, G groups per row.
"""

import functools
from typing import NotRequired, TypedDict

import numpy as np

from qlora_jax.io.hf.coded_weights import CodedMethod, CodedWeight, Parts, Settings, setting_problems, tensor_problems
from qlora_jax.io.hf.integer_groups import (
    SCALE_TYPES,
    Groups,
    IntegerWeight,
    column_order,
    group_setting_problems,
    group_size_of,
    integers,
    matrix_of_words,
)

BITS = (2, 4, 8)  # those whose integers do not cross the ends of words


class GptqSettings(TypedDict):
    """The keys of quantization_config that are used."""

    bits: int
    group_size: int
    checkpoint_format: NotRequired[str | None]
    format: NotRequired[str | None]
    is_marlin_format: NotRequired[bool | None]
    pack_dtype: NotRequired[str | None]
    dynamic: NotRequired[dict[str, object] | None]
    desc_act: NotRequired[bool | None]


def _settings_problems(settings: Settings) -> list[str]:
    problems = setting_problems(
        settings,
        {"bits": BITS, "is_marlin_format": (False, None), "pack_dtype": ("int32", None)},
    )
    if _format(settings) not in ("gptq", "gptq_v2"):
        problems.append(f"checkpoint_format: found {_format(settings)}, expected gptq or gptq_v2")
    problems += group_setting_problems(settings)
    if others := [rule for rule in settings.get("dynamic") or {} if not rule.startswith("-:")]:
        problems.append(f"dynamic: found the rule {others[0]}, expected only rules of layers in 16 bits (-:)")
    return problems


def _format(settings: Settings) -> str:
    return (settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _weight(parts: Parts, settings: Settings) -> CodedWeight:
    words, n = matrix_of_words(parts["qweight"])
    bits = settings["bits"]
    per_word = 32 // bits
    k = words * per_word
    size = group_size_of(settings["group_size"], k)
    expected = {
        "qzeros": (["I32"], (k // size, n // per_word)),
        "scales": ([*SCALE_TYPES], (k // size, n)),
        "g_idx": (["I32"], (k,)),
    }
    problems = [f"found {n} outputs, expected a multiple of {per_word}"] if n % per_word else []
    if settings.get("desc_act") and size < k and "g_idx" not in parts:
        problems.append("missing g_idx, the group of each column with desc_act")
    if problems := problems + tensor_problems(parts, expected):
        raise ValueError("; ".join(problems))
    return IntegerWeight(
        shape=(n, k),
        bits=bits,
        group_size=size,
        scale_type=SCALE_TYPES[parts["scales"].file_type],
        read=functools.partial(_read, parts, bits, _format(settings) == "gptq"),
        order=column_order(parts.get("g_idx"), k, size),
    ).coded()


def _read(parts: Parts, bits: int, zeros_minus_one: bool, first: int, end: int) -> Groups:
    zeros = parts["qzeros"].read().view(np.uint32)
    ones = np.uint32(0xFFFFFFFF // (2**bits - 1))
    zeros_GN = integers(zeros + ones if zeros_minus_one else zeros, bits)
    return Groups(
        codes=integers(parts["qweight"].read()[:, first:end].T, bits),
        zeros=np.ascontiguousarray(zeros_GN[:, first:end].T),
        scales=np.ascontiguousarray(parts["scales"].read()[:, first:end].T),
    )


GPTQ = CodedMethod(
    title="GPTQ",
    settings=GptqSettings,
    problems=_settings_problems,
    parts={"qweight": True, "qzeros": True, "scales": True, "g_idx": False},
    weight=_weight,
)
