"""Translates GGUF metadata to a Hugging Face config.json.

A key with the prefix of the architecture may change the computation, so a key that is in no table here is an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from pydantic import FailFast, Field

from qlora_jax.io.gguf.architectures import (
    ARCHITECTURES,
    LONGROPE_FACTORS,
    OF_KEY,
    PATTERN,
    ROPE_FACTORS,
    SECTIONS,
    TEMPERATURE,
    Architecture,
    Variant,
)
from qlora_jax.io.gguf.header import Metadata
from qlora_jax.models.families.attributes import LIMITS
from qlora_jax.untrusted_json import Count, JsonObject, Kind, check_value, find_problems, shorten

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
FLOATS = {
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_weights_scale",
    "attention.scale",
    TEMPERATURE,
    "embedding_scale",
    "logit_scale",
    "residual_scale",
    "rope.freq_base",
    "rope.freq_base_swa",
    *ATTENTION_FACTORS,
    *ROPE_FACTOR_KEYS,
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
BOOLEANS = {"use_parallel_residual", "expert_weights_norm"}
# Keys for which 0 means unset.
ZERO_IS_NONE = {
    *ROPE_FACTOR_KEYS,
    "attention.sliding_window",
    *("leading_dense_block_count", "nextn_predict_layers", "expert_weights_scale"),
    *("expert_group_count", "expert_group_used_count"),
}
# Layers at the end of a file that predict further tokens; they are left out.
DRAFT_LAYERS = "nextn_predict_layers"
# Keys that are allowed only with the value that changes nothing.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
# Keys that describe the file and never change the computation.
DESCRIPTIVE = {"tensor_data_layout", "rope.scaling.finetuned"}

type Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
type Texts = Annotated[list[str], FailFast()]
type Flags = Annotated[list[bool], FailFast()]
type Numbers[T] = Annotated[list[T], FailFast()]
type FourCounts = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=4, max_length=4)]

# Types of keys without the architecture's prefix.
GgufMetadata = TypedDict(
    "GgufMetadata",
    {
        "general.architecture": str,
        "general.type": str,
        "split.count": int,
        "tokenizer.chat_template": str,
        "tokenizer.ggml.model": str,
        "tokenizer.ggml.pre": str,
        "tokenizer.ggml.tokens": Texts,
        "tokenizer.ggml.token_type": Numbers[int],
        "tokenizer.ggml.merges": Texts,
        "tokenizer.ggml.scores": Numbers[float],
        "tokenizer.ggml.bos_token_id": int,
        "tokenizer.ggml.eos_token_id": int,
        "tokenizer.ggml.eot_token_id": int,
        "tokenizer.ggml.eom_token_id": int,
        "tokenizer.ggml.padding_token_id": int,
        "tokenizer.ggml.unknown_token_id": int,
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
    },
    total=False,
)
FILE_KINDS = {"adapter": "a LoRA adapter", "mmproj": "an image projector", "vocab": "a vocabulary"}


def architecture_of(path: Path, metadata: Metadata) -> Architecture:
    """The architecture of a GGUF file; the types of GgufMetadata are checked first.

    Raises:
      ValueError: keys have other types (all are named); the architecture is missing or not supported; or the file is
        not a whole model.
    """
    check_value(metadata, GgufMetadata, path)
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{path}: general.type: found {FILE_KINDS.get(kind, shorten(kind))}, expected a model")
    if metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"{path}: one of {metadata['split.count']} parts of a split model, which is not supported. Join them "
            "first: llama-gguf-split --merge FIRST_PART JOINED.gguf"
        )
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture is not supported (found {shorten(name)}, expected {', '.join(ARCHITECTURES)})"
        )
    others = (each for (shared, key), each in OF_KEY.items() if shared == name and metadata.get(f"{name}.{key}"))
    return next(others, ARCHITECTURES[name])


def number_of_layers(architecture: Architecture, metadata: Metadata) -> int:
    """Returns the number of layers of the model, without those that predict further tokens."""
    count, extra = (metadata.get(f"{architecture.name}.{key}", 0) for key in ("block_count", DRAFT_LAYERS))
    return count - extra


def config_from_metadata(
    path: Path,
    architecture: Architecture,
    metadata: Metadata,
    tensor_names: frozenset[str],
    rope_factors: Mapping[str, np.ndarray],
) -> JsonObject:
    """Translates metadata to the config.json of the same model.

    Args:
      tensor_names: names of all tensors of the file; their presence implies some attributes.
      rope_factors: the tensors ROPE_FACTORS and LONGROPE_FACTORS of the file, by name.

    Raises:
      ValueError: keys are missing, unknown, or have an unsupported value; all are named.
    """
    keys = _supported_keys(path, architecture, metadata)
    plain = Variant(model_type=architecture.model_type, class_name=architecture.class_name)
    variant = next((variant for key, variant in architecture.variants.items() if key in keys), plain)
    config = {name: keys[key] for key, name in _required(architecture).items()}
    config["num_hidden_layers"] = number_of_layers(architecture, metadata)
    config |= architecture.absent
    config |= {name: keys[key] for key, name in architecture.attributes.items() if key in keys}
    config |= {"architectures": [variant.class_name], "model_type": variant.model_type}
    config |= _implied(architecture, keys, metadata, tensor_names)
    config |= _attention(architecture, keys, config)
    config["rope_scaling"] = rope_scaling(path, architecture, keys, config, rope_factors)
    if architecture.untruncated_yarn:
        scaling = config["rope_scaling"]
        config["rope_scaling"] = {"rope_type": "default"} if scaling is None else scaling | {"truncate": False}
    if variant.rope_per_window:
        config = _with_ropes_apart(config)
    if LONGROPE_FACTORS["long_factor"] in rope_factors:
        config["original_max_position_embeddings"] = original_context(keys, config)
    return config


def _supported_keys(path: Path, architecture: Architecture, metadata: Metadata) -> Metadata:
    """Returns the values of the architecture's keys, without its prefix; ValueError names those not supported."""
    prefix = f"{architecture.name}."
    keys = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(architecture.ignored)
    }
    keys = {key: value for key, value in keys.items() if key not in ZERO_IS_NONE or value != 0}
    if problems := _problems(architecture, keys):
        lines = "\n".join(f"  {prefix}{problem}" for problem in problems)
        raise ValueError(f"{path}: metadata that is not supported:\n{lines}")
    return keys


def _implied(
    architecture: Architecture, keys: Metadata, metadata: Metadata, tensor_names: frozenset[str]
) -> JsonObject:
    """Returns attributes with defaults, and those that the architecture, the tokenizer or the tensors imply."""
    return {
        "num_key_value_heads": keys.get("attention.head_count_kv", keys["attention.head_count"]),
        "head_dim": _head_dim(keys),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "vocab_size": keys.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", []))),
        # GGUF has no key for these; the presence of tensors implies them.
        "tie_word_embeddings": "output.weight" not in tensor_names,
        **{name: tensor in tensor_names for name, tensor in architecture.biases.items()},
        **architecture.fixed,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _attention(architecture: Architecture, keys: Metadata, config: JsonObject) -> JsonObject:
    """Returns the rotated fraction, the scale of queries and the windows, where the architecture has them."""
    head_dim = config["head_dim"]
    found: JsonObject = {}
    if architecture.partial:
        found[architecture.partial] = _rotated_fraction(keys.get("rope.dimension_count", head_dim), head_dim)
    if layers := architecture.query_scalar_layers:
        by_width = config["num_hidden_layers"] == layers
        found["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if by_width else head_dim
        )
    found |= {name: keys.get(key, head_dim**-0.5) for key, name in architecture.query_scale.items()}
    if architecture.window_period:
        found |= _windows(architecture, keys, config | found)
    return found


def _windows(architecture: Architecture, keys: Metadata, config: JsonObject) -> JsonObject:
    """The window of a model in which only some layers have one, and the kind of every layer, as in llama.cpp."""
    layers, window = config["num_hidden_layers"], keys.get("attention.sliding_window")
    if window is None or architecture.window_layers not in (0, layers):
        # transformers needs the kinds of layers to read a model without windows, and OLMo 2 has no such attribute.
        kinds = {} if architecture.variants else {"layer_types": ["full_attention"] * layers}
        return {"sliding_window": None, **kinds}
    pattern = keys.get(PATTERN, architecture.window_period)
    slides = pattern if isinstance(pattern, list) else [bool((layer + 1) % pattern) for layer in range(layers)]
    return {"layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides]}


def _with_ropes_apart(config: JsonObject) -> JsonObject:
    """A config in which layers with a window have the same rotary base, and no scaling."""
    theta, scaling = config["rope_theta"], config["rope_scaling"] or {"rope_type": "default"}
    per_window = {
        "full_attention": {**scaling, "rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }
    kept = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    return kept | {"rope_parameters": per_window}


def _rotated_fraction(rotated: int, head_dim: int) -> float:
    """The fraction rotated / head_dim, rounded so that int(head_dim * fraction) is `rotated`."""
    part = rotated / head_dim
    return part if int(head_dim * part) == rotated else math.nextafter(part, math.inf)


def _head_dim(keys: Metadata) -> int:
    return keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])


def _required(architecture: Architecture) -> Mapping[str, str]:
    return {**REQUIRED, **architecture.eps, **architecture.required}


def _problems(architecture: Architecture, keys: Metadata) -> list[str]:
    required, only = _required(architecture), {**NEUTRAL, **architecture.only, **architecture.neutral}
    only = {key: value for key, value in only.items() if key not in required}
    of_architecture = _own_keys(architecture)
    shared = FLOATS - {key for other in ARCHITECTURES.values() for key in _own_keys(other)}
    numbers = {*required, *OPTIONAL, *shared, *of_architecture, "rope.scaling.original_context_length"} - BOOLEANS
    known = {*numbers, *of_architecture, "rope.scaling.type", *only, *architecture.equal, *DESCRIPTIVE}
    always = [*required, *([SECTIONS] if architecture.sections else [])]
    problems = [f"{key}: missing" for key in always if key not in keys]
    problems += [f"{key}: unknown key (found {shorten(keys[key])})" for key in sorted(keys.keys() - known)]
    problems += [
        f"{key}: found {shorten(keys[key])}, expected {value}"
        for key, value in only.items()
        if keys.get(key, value) != value
    ]
    problems += [
        f"{key}: found {shorten(keys[key])}, expected {shorten(keys.get(same))} as {same}"
        for key, same in architecture.equal.items()
        if key in keys and keys[key] != keys.get(same)
    ]
    typed = (numbers | (BOOLEANS & known)) & keys.keys()
    problems += [
        problem for key in sorted(typed) for problem in find_problems(keys[key], _kind(key, architecture), key)
    ]
    return problems if problems else _head_problems(architecture, keys)


def _own_keys(architecture: Architecture) -> set[str]:
    """The keys that some architectures have, and this one."""
    each = (architecture.eps, architecture.attributes, architecture.query_scale, architecture.rope_attributes)
    lists = {PATTERN: architecture.window_period, SECTIONS: architecture.sections}
    return {key for table in each for key in table} | {key for key, has in lists.items() if has}


def _kind(key: str, architecture: Architecture) -> Kind:
    if key == PATTERN and architecture.window_period:
        return Count | Flags
    if key == SECTIONS:
        return FourCounts
    return bool if key in BOOLEANS else Positive if key in FLOATS else Count


def _head_problems(architecture: Architecture, keys: Metadata) -> list[str]:
    if keys["block_count"] > (limit := LIMITS["num_hidden_layers"]):
        return [f"block_count: found {keys['block_count']}, expected at most {limit}"]
    if (layers := keys["block_count"]) <= (extra := keys.get(DRAFT_LAYERS, 0)):
        return [f"{DRAFT_LAYERS}: found {extra}, expected fewer than block_count = {layers}"]
    head_dim, rotated = _head_dim(keys), keys.get("rope.dimension_count", 0)
    if not head_dim:
        width = keys["embedding_length"]
        return [f"attention.head_count: found {keys['attention.head_count']}, expected at most {width}, the width"]
    if architecture.partial and rotated > head_dim:
        return [f"rope.dimension_count: found {rotated}, expected at most {head_dim}, the length of a head"]
    if architecture.sections and (problem := _section_problem(keys[SECTIONS], rotated or head_dim)):
        return [problem]
    whole = ("attention.value_length",) if architecture.partial else ("attention.value_length", "rope.dimension_count")
    return [
        f"{key}: found {keys[key]}, expected {head_dim}, the length of a head"
        for key in whole
        if keys.get(key, head_dim) != head_dim
    ]


def _section_problem(sections: list[int], rotated: int) -> str | None:
    """Returns the problem of sections that would turn some pairs by a position that text tokens do not have."""
    if sections[3] == 0 and 2 * sum(sections) == rotated:
        return None
    half = rotated // 2
    return (
        f"{SECTIONS}: found {sections}, expected three numbers with sum {half}, half of the rotated dimensions, then 0"
    )
