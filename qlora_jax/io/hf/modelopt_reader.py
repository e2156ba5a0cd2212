"""Reads weights in NVFP4 and FP8 of NVIDIA's Model Optimizer.

A weight of N x K in NVFP4 is `weight` U8 [N, K / 2], `weight_scale` F8_E4M3 [N, K / 16] and `weight_scale_2`, a number;
the two scales are multiplied. In FP8 it is `weight` F8_E4M3 [N, K] and `weight_scale`, a number or one per row. Scales
of activations and caches are left out, because both stay in 16 bits here.
"""

from typing import TypedDict

from qlora_jax.io.hf.coded_weights import CodedMethod, CodedWeight, Parts, Settings, setting_problems
from qlora_jax.io.hf.float_codes import fp8_weight, nvfp4_weight

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")


class ModelOptSettings(TypedDict):
    """The keys of quantization_config that are used."""

    quant_algo: str


def _settings_problems(settings: Settings) -> list[str]:
    return setting_problems(settings, {"quant_algo": ALGORITHMS})


def _weight(parts: Parts, settings: Settings) -> CodedWeight:
    if parts["weight"].file_type == "F8_E4M3":
        return fp8_weight(parts, "weight_scale", [(None, None), (1, None)])
    if "weight_scale_2" not in parts:
        raise ValueError("missing weight_scale_2")
    return nvfp4_weight(parts, "weight", "weight_scale_2", inverse=False)


MODELOPT = CodedMethod(
    title="ModelOpt",
    settings=ModelOptSettings,
    problems=_settings_problems,
    parts={"weight_scale": True, "weight": True}
    | dict.fromkeys(("weight_scale_2", "input_scale", "k_scale", "v_scale"), False),
    weight=_weight,
)
