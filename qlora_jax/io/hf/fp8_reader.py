"""Reads FP8 weights as DeepSeek and Qwen publish them: e4m3, with a scale per block of 128 x 128, or per tensor.

A weight of N x K is `weight` F8_E4M3 [N, K] and `weight_scale_inv`, which multiplies it in spite of its name.
`activation_scale` is left out, because activations stay in 16 bits here.
"""

from typing import NotRequired, TypedDict

from qlora_jax.io.hf.coded_weights import CodedMethod, CodedWeight, Parts, Settings, setting_problems
from qlora_jax.io.hf.float_codes import fp8_weight
from qlora_jax.io.hf.integer_groups import PART


class Fp8Settings(TypedDict):
    """The keys of quantization_config that are used."""

    weight_block_size: NotRequired[list[int] | None]
    fmt: NotRequired[str | None]


def _settings_problems(settings: Settings) -> list[str]:
    problems = setting_problems(settings, {"fmt": ("e4m3", "float8_e4m3fn", None)})
    return problems + block_size_problems("weight_block_size", settings.get("weight_block_size"))


def block_size_problems(name: str, size: list[int] | None) -> list[str]:
    """Returns a line if blocks are not two numbers, of which that of columns is a multiple of 32."""
    valid = size is None or (len(size) == 2 and min(size) > 0 and size[1] % PART == 0)
    return [] if valid else [f"{name}: found {size}, expected rows and a multiple of {PART} columns"]


def _weight(parts: Parts, settings: Settings) -> CodedWeight:
    size = settings.get("weight_block_size")
    return fp8_weight(parts, "weight_scale_inv", [(None, None) if size is None else (size[0], size[1])])


FP8 = CodedMethod(
    title="FP8",
    settings=Fp8Settings,
    problems=_settings_problems,
    parts={"weight_scale_inv": True, "weight": True, "activation_scale": False},
    weight=_weight,
)
