"""Translates GGUF metadata into the form of a Hugging Face config.json; refuses what it does not know.

A key with the prefix of the architecture changes the computation, so one that is not in a table here is an error.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaling divides each rotary frequency by


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to Hugging Face.

    Attributes:
      name: value of general.architecture and prefix of the keys.
      model_type, class_name: Hugging Face's.
      permutes_rotary_rows: the converter moved the rows of q and k so that rotary pairs are neighbours.
    """

    name: str
    model_type: str
    class_name: str
    permutes_rotary_rows: bool


ARCHITECTURES = {
    "llama": Architecture(name="llama", model_type="llama", class_name="LlamaForCausalLM", permutes_rotary_rows=True)
}

REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
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
    "rope.freq_base",
    *ROPE_FACTOR_KEYS,
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Keys that may be there with the one value that changes nothing.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
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
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """The config.json that the model would have.

    Raises:
      ValueError: keys missing, unknown, or with a value that is not supported: all of them at once.
    """
    prefix = f"{architecture.name}."
    keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    keys = {key: value for key, value in keys.items() if key not in ROPE_FACTOR_KEYS or value != 0}
    problems = _problems(keys)
    if problems:
        lines = "\n".join(f"  {prefix}{problem}" for problem in problems)
        raise ValueError(f"{path}: metadata that is not supported:\n{lines}")
    config = {name: keys[key] for key, name in REQUIRED.items()}
    heads = config["num_attention_heads"]
    config |= {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(keys),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "vocab_size": keys.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", []))),
        "hidden_act": "silu",
        # GGUF has no key for these three: which tensors there are says it.
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    config["rope_scaling"] = _rope_scaling(path, keys, config, rope_factors)
    return config


def _head_dim(keys: Mapping[str, Any]) -> int:
    return keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])


def _problems(keys: Mapping[str, Any]) -> list[str]:
    numbers = {*REQUIRED, *OPTIONAL, *FLOATS, "rope.scaling.original_context_length"}
    known = {*numbers, "rope.scaling.type", *NEUTRAL, *DESCRIPTIVE}
    problems = [f"{key}: missing" for key in REQUIRED if key not in keys]
    problems += [f"{key} = {keys[key]!r}: unknown key" for key in sorted(keys.keys() - known)]
    problems += [
        f"{key} = {keys[key]!r}: expected {value}" for key, value in NEUTRAL.items() if keys.get(key, value) != value
    ]
    problems += [problem for key in sorted(numbers & keys.keys()) if (problem := _number_problem(key, keys[key]))]
    return problems if problems else _head_problems(keys)


def _number_problem(key: str, value: Any) -> str | None:
    kind = float if key in FLOATS else int
    sound = type(value) is kind and math.isfinite(value) and value > 0
    return None if sound else f"{key} = {value!r}: expected {'a number' if kind is float else 'an integer'} above 0"


def _head_problems(keys: Mapping[str, Any]) -> list[str]:
    head_dim = _head_dim(keys)
    return [
        f"{key} = {keys[key]}: expected {head_dim}, the length of a head"
        for key in ("attention.value_length", "rope.dimension_count")
        if keys.get(key, head_dim) != head_dim
    ]


def _rope_scaling(
    path: Path, keys: Mapping[str, Any], config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
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


def _yarn_scaling(keys: Mapping[str, Any], config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    original = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
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
