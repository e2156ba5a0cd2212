"""Translates GGUF metadata into the form of a Hugging Face config.json; refuses what it does not know.

A key with the prefix of the architecture changes the computation, so one that is not in a table here is an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.io.gguf.architectures import ARCHITECTURES, LONGROPE_FACTORS, ROPE_FACTORS, Architecture

REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
OPTIONAL = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
ROPE_FACTOR_KEYS = ("rope.scaling.factor", "rope.scale_linear")  # the second in old files; 0 stands for absent
FLOATS = {
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.attn_factor",
    *ROPE_FACTOR_KEYS,
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
BOOLEANS = {"use_parallel_residual"}
# Keys where 0 stands for absent.
ZERO_IS_NONE = {*ROPE_FACTOR_KEYS, "attention.sliding_window"}
# Keys that may be there with the one value that changes nothing.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
# Keys that say where the file comes from, and change nothing whatever they hold.
DESCRIPTIVE = {"tensor_data_layout", "rope.scaling.finetuned"}

# What keys outside the architecture's own must hold, where they are there; list: an array of str or numbers.
METADATA_TYPES: dict[str, type] = {
    "general.architecture": str,
    "general.type": str,
    "split.count": int,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.token_type": list,
    "tokenizer.ggml.merges": list,
    "tokenizer.ggml.scores": list,
    "tokenizer.ggml.bos_token_id": int,
    "tokenizer.ggml.eos_token_id": int,
    "tokenizer.ggml.eot_token_id": int,
    "tokenizer.ggml.eom_token_id": int,
    "tokenizer.ggml.padding_token_id": int,
    "tokenizer.ggml.unknown_token_id": int,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
}
FILE_KINDS = {"adapter": "a LoRA adapter", "mmproj": "an image projector", "vocab": "a vocabulary"}


def check_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Passes metadata whose known keys hold values of the known types.

    Raises:
      ValueError: names every key that does not.
    """
    wrong = [
        f"{key} is {type(metadata[key]).__name__}, expected {kind.__name__}"
        for key, kind in METADATA_TYPES.items()
        if key in metadata and type(metadata[key]) is not kind
    ]
    if wrong:
        raise ValueError(f"{path}: corrupt metadata: {'; '.join(wrong)}")


def architecture_of(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    """The architecture that a GGUF file names.

    Raises:
      ValueError: it names none or one that is not supported, or it is a part of a model rather than a model.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{path} holds {FILE_KINDS.get(kind, kind)} (general.type), expected a model")
    if metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts of a split model, which is not supported. Join them "
            "first: llama-gguf-split --merge FIRST_PART JOINED.gguf"
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {name!r} is not supported; supported in GGUF files: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def config_from_metadata(
    path: Path,
    architecture: Architecture,
    metadata: Mapping[str, Any],
    tensor_names: frozenset[str],
    rope_factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The config.json that the model would have.

    Args:
      rope_factors: those of ROPE_FACTORS and LONGROPE_FACTORS that are there, by name.

    Raises:
      ValueError: keys missing, unknown, or with a value that is not supported: all of them at once.
    """
    prefix = f"{architecture.name}."
    keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    keys = {key: value for key, value in keys.items() if key not in ZERO_IS_NONE or value != 0}
    problems = _problems(architecture, keys)
    if problems:
        lines = "\n".join(f"  {prefix}{problem}" for problem in problems)
        raise ValueError(f"{path}: metadata that is not supported:\n{lines}")
    config = {name: keys[key] for key, name in {**REQUIRED, **architecture.eps}.items()}
    config |= {name: keys[key] for key, name in architecture.attributes.items() if key in keys}
    heads, head_dim = config["num_attention_heads"], _head_dim(keys)
    config |= {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "vocab_size": keys.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", []))),
        # GGUF has no key for these: which tensors there are says it.
        "tie_word_embeddings": "output.weight" not in tensor_names,
        **{name: tensor in tensor_names for name, tensor in architecture.biases.items()},
        **architecture.fixed,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if architecture.partial:
        config[architecture.partial] = _part(keys.get("rope.dimension_count", head_dim), head_dim)
    if layers := architecture.query_scalar_layers:
        by_width = config["num_hidden_layers"] == layers
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if by_width else head_dim
    config["rope_scaling"] = _rope_scaling(path, keys, config, rope_factors)
    if LONGROPE_FACTORS["long_factor"] in rope_factors:
        config["original_max_position_embeddings"] = _original_context(keys, config)
    return config


def _part(rotated: int, head_dim: int) -> float:
    """rotated / head_dim, such that head_dim times it, rounded down, is `rotated`."""
    part = rotated / head_dim
    return part if int(head_dim * part) == rotated else math.nextafter(part, math.inf)


def _original_context(keys: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])


def _head_dim(keys: Mapping[str, Any]) -> int:
    return keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])


def _problems(architecture: Architecture, keys: Mapping[str, Any]) -> list[str]:
    required = (*REQUIRED, *architecture.eps)
    of_architecture = {*architecture.eps, *architecture.attributes}
    shared = FLOATS - {key for other in ARCHITECTURES.values() for key in (*other.eps, *other.attributes)}
    numbers = {*required, *OPTIONAL, *shared, *of_architecture, "rope.scaling.original_context_length"} - BOOLEANS
    known = {*numbers, *of_architecture, "rope.scaling.type", *NEUTRAL, *DESCRIPTIVE}
    problems = [f"{key}: missing" for key in required if key not in keys]
    problems += [f"{key} = {keys[key]!r}: unknown key" for key in sorted(keys.keys() - known)]
    problems += [
        f"{key} = {keys[key]!r}: expected {value}" for key, value in NEUTRAL.items() if keys.get(key, value) != value
    ]
    problems += [problem for key in sorted(numbers & keys.keys()) if (problem := _number_problem(key, keys[key]))]
    problems += [
        f"{key} = {keys[key]!r}: expected true or false"
        for key in sorted(BOOLEANS & known & keys.keys())
        if type(keys[key]) is not bool
    ]
    return problems if problems else _head_problems(architecture, keys)


def _number_problem(key: str, value: Any) -> str | None:
    kind = float if key in FLOATS else int
    sound = type(value) is kind and math.isfinite(value) and value > 0
    return None if sound else f"{key} = {value!r}: expected {'a number' if kind is float else 'an integer'} above 0"


def _head_problems(architecture: Architecture, keys: Mapping[str, Any]) -> list[str]:
    head_dim, rotated = _head_dim(keys), keys.get("rope.dimension_count", 0)
    if architecture.partial and rotated > head_dim:
        return [f"rope.dimension_count = {rotated}: expected at most {head_dim}, the length of a head"]
    whole = ("attention.value_length",) if architecture.partial else ("attention.value_length", "rope.dimension_count")
    return [
        f"{key} = {keys[key]}: expected {head_dim}, the length of a head"
        for key in whole
        if keys.get(key, head_dim) != head_dim
    ]


def _rope_scaling(
    path: Path, keys: Mapping[str, Any], config: Mapping[str, Any], rope_factors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    if set(LONGROPE_FACTORS.values()) <= rope_factors.keys():
        return _longrope_scaling(keys, rope_factors)
    attention_factor = keys.get("rope.scaling.attn_factor", 1.0)
    if attention_factor != 1.0:
        raise ValueError(f"{path}: rope.scaling.attn_factor = {attention_factor}: expected 1.0, or longrope's factors")
    factors = rope_factors.get(ROPE_FACTORS)
    factor = next((keys[key] for key in ROPE_FACTOR_KEYS if key in keys), 1.0)
    kind = keys.get("rope.scaling.type", "linear")
    scaled = kind != "none" and factor != 1.0
    if factors is not None and not np.all(factors == 1):
        if scaled:
            raise ValueError(f"{path}: {ROPE_FACTORS} and a rope.scaling.factor of {factor} at once is not supported")
        return _llama3_scaling(path, config, factors)
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn_scaling(keys, config, factor)
    raise ValueError(f"{path}: rope.scaling.type = {kind!r} is not supported; supported: none, linear, yarn")


def _longrope_scaling(keys: Mapping[str, Any], rope_factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    # The shortest decimal that stands for each f32, as the config had it.
    factors = {name: [float(str(v)) for v in rope_factors[tensor]] for name, tensor in LONGROPE_FACTORS.items()}
    given = "rope.scaling.attn_factor"
    return {"rope_type": "longrope", **factors, **({"attention_factor": keys[given]} if given in keys else {})}


def _yarn_scaling(keys: Mapping[str, Any], config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_context(keys, config),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3_scaling(path: Path, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The parameters whose factors the file holds: it keeps only the result, so they are found and checked by it."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise ValueError(
            f"{path}: {ROPE_FACTORS} {list(factors.shape)} does not follow from Llama 3.1's scaling with the published "
            "parameters (low_freq_factor 1, high_freq_factor 4, original context 8192), which alone is supported. "
            "Load the model from its Hugging Face folder, whose config.json names the parameters."
        )
    return scaling


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """f32 [head_dim / 2]: what each rotary frequency is divided by; 1 for short wavelengths, `factor` for long ones.

    In between, 1 / ((1 - s) / factor + s) with s rising from 0 to 1 (Llama 3.1).
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
