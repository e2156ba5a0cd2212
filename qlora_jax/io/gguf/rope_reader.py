"""Translates rotary scaling from GGUF metadata to a Hugging Face config."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.io.gguf.architecture import LONGROPE_FACTORS, ROPE_FACTORS, TEMPERATURE, Architecture
from qlora_jax.io.gguf.header import Metadata
from qlora_jax.metadata import JsonObject, shorten

ROPE_FACTOR_KEYS = ("rope.scaling.factor", "rope.scale_linear")  # the second in old files; 0 means unset
# LongRoPE's, and yarn's in files of OLMo 3 from 2025; yarn's in later files.
ATTENTION_FACTORS = ATTENTION_FACTOR, YARN_ATTENTION_FACTOR = (
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
)
F32 = 1e-6  # relative error of a number that is stored in f32


def rope_scaling(
    path: Path,
    architecture: Architecture,
    keys: Metadata,
    config: JsonObject,
    rope_factors: Mapping[str, np.ndarray],
) -> JsonObject | None:
    """Returns the config's rope_scaling, or None without scaling.

    Args:
      keys: values by key without the architecture's prefix.
      config: the attributes of the config that are known so far.
      rope_factors: the tensors ROPE_FACTORS and LONGROPE_FACTORS of the file, by name.

    Raises:
      ValueError: the scaling is not supported.
    """
    if set(LONGROPE_FACTORS.values()) <= rope_factors.keys():
        _attention_factor(path, {key: value for key, value in keys.items() if key != ATTENTION_FACTOR}, 1.0)
        return _longrope_scaling(keys, rope_factors)
    factors = rope_factors.get(ROPE_FACTORS)
    factor = next((keys[key] for key in ROPE_FACTOR_KEYS if key in keys), 1.0)
    kind = keys.get("rope.scaling.type", "linear")
    scaled = kind != "none" and factor != 1.0
    attention_factor = _attention_factor(path, keys, factor if scaled and kind == "yarn" else 1.0)
    if factors is not None and not np.all(factors == 1):
        if scaled:
            raise ValueError(
                f"{path}: {ROPE_FACTORS} together with a rope.scaling.factor (found {factor}) is not supported"
            )
        return _llama3_scaling(path, config, factors)
    if TEMPERATURE in keys and not (scaled and kind == "yarn"):
        raise ValueError(f"{path}: {TEMPERATURE}: found without yarn's scaling, expected both. Convert the model again")
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        given = architecture.rope_attributes.items()
        further = {name: keys[key] for key, names in given if key in keys for name in names}
        return _yarn_scaling(keys, config, factor) | attention_factor | further
    raise ValueError(f"{path}: rope.scaling.type: found {shorten(kind)}, expected none, linear or yarn")


def _attention_factor(path: Path, keys: Metadata, factor: float) -> JsonObject:
    """Returns attention_factor if the file has yarn's usual one for `factor`; llama.cpp applies that one anyway."""
    usual = yarn_attention_factor(factor)
    given = {key: keys[key] for key in ATTENTION_FACTORS if keys.get(key, 1.0) != 1.0}
    for key, value in given.items():
        if not math.isclose(value, usual, rel_tol=F32):
            either = (
                f"1.0 or {usual:.7g}, yarn's for factor {factor}" if usual != 1.0 else "1.0 (or longrope's factors)"
            )
            raise ValueError(
                f"{path}: {key}: found {value}, expected {either}. Load the model from its Hugging Face folder"
            )
    return {"attention_factor": usual} if given else {}


def yarn_attention_factor(factor: float) -> float:
    """Returns the factor of cosines and sines that yarn has unless a config names another one."""
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


def original_context(keys: Metadata, config: JsonObject) -> int:
    """Returns the length of pretraining's sequences, before their context was extended."""
    return keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])


def _longrope_scaling(keys: Metadata, rope_factors: Mapping[str, np.ndarray]) -> JsonObject:
    # The shortest decimal of each f32, which is the number in the original config.
    factors = {name: [float(str(v)) for v in rope_factors[tensor]] for name, tensor in LONGROPE_FACTORS.items()}
    given = {"attention_factor": keys[ATTENTION_FACTOR]} if ATTENTION_FACTOR in keys else {}
    return {"rope_type": "longrope", **factors, **given}


def _yarn_scaling(keys: Metadata, config: JsonObject, factor: float) -> JsonObject:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_context(keys, config),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3_scaling(path: Path, config: JsonObject, factors: np.ndarray) -> JsonObject:
    """The published parameters of Llama 3.1's scaling, after its factors are checked against those in the file."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    has_shape = factors.shape == (config["head_dim"] // 2,)
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling) if has_shape else None
    if expected is None or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise ValueError(
            f"{path}: {ROPE_FACTORS} {list(factors.shape)} differs from Llama 3.1's scaling with the published "
            "parameters (low_freq_factor 1, high_freq_factor 4, original context 8192), the only ones supported. Load "
            "the model from its Hugging Face folder, whose config.json names the parameters"
        )
    return scaling


def llama3_factors(head_dim: int, theta: float, scaling: JsonObject) -> np.ndarray:
    """The divisors f32 [head_dim / 2] of the rotary frequencies: 1 for short wavelengths, `factor` for long ones.

    In between, 1 / ((1 - s) / factor + s) with s rising from 0 to 1 (Llama 3.1).
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
