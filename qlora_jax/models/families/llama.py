"""The Llama family: Llama 1, 2 and 3, SmolLM2, and what else calls itself `llama` in a Hugging Face config."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.nn.rope import NUMBERS, SCALINGS, Rope, RopeScaling

MODEL_TYPES = ("llama",)

# Attributes that change what a Llama computes, and that the decoder does not have: their only value accepted here.
ONLY = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "layer_types": None,
    "sliding_window": None,
}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The features of a Hugging Face config of this family; refuses, all at once, what it does not know."""
    attributes = Attributes(config)
    attributes.require_only(ONLY)
    bias, mlp_bias = attributes.boolean("attention_bias", False), attributes.boolean("mlp_bias", False)
    defaults = {"max_position_embeddings": 2048}
    model = decoder_from_hf(attributes, defaults, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
    attributes.finish()
    return model


def decoder_from_hf(attributes: Attributes, defaults: Mapping[str, int], **biases: bool) -> ModelConfig:
    """What all relatives of Llama name alike.

    Args:
      defaults: of max_position_embeddings, and of num_key_value_heads where that is not the number of heads.
      biases: qkv_bias, o_bias and mlp_bias of the decoder.
    """
    heads, width = attributes.integer("num_attention_heads"), attributes.integer("hidden_size")
    head_dim = attributes.integer("head_dim", width // heads if heads else 0)
    max_positions = attributes.integer("max_position_embeddings", defaults["max_position_embeddings"])
    model = ModelConfig(
        vocab_size=attributes.integer("vocab_size"),
        embed_dim=width,
        num_layers=attributes.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=attributes.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        head_dim=head_dim,
        mlp_dim=attributes.integer("intermediate_size"),
        norm_eps=attributes.number("rms_norm_eps", 1e-6),
        rope=rope_from_hf(attributes, head_dim, max_positions),
        tie_embeddings=attributes.boolean("tie_word_embeddings", False),
        max_positions=max_positions,
        **biases,
    )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        attributes.refuse(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={model.num_kv_heads}")
    return model


def rope_from_hf(attributes: Attributes, dim: int, max_positions: int) -> Rope:
    """Rope from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before)."""
    theta = attributes.number("rope_theta", 10000.0)
    new, old = attributes.mapping("rope_parameters"), attributes.mapping("rope_scaling")
    if new and old:
        attributes.refuse("rope_parameters and rope_scaling are both given: remove one")
    numbers = dict(new or old or {})
    kind = numbers.pop("rope_type", numbers.pop("type", "default"))
    rope_theta = float(numbers.pop("rope_theta", theta))
    if numbers.pop("partial_rotary_factor", 1.0) != 1.0:
        attributes.refuse("partial_rotary_factor other than 1 is not supported")
    if kind not in SCALINGS:
        attributes.refuse(f"rope scaling {kind!r} is not supported: known are {sorted(SCALINGS)}")
        return Rope(theta=rope_theta, dim=dim, max_positions=max_positions)
    required, optional = NUMBERS[kind]
    if missing := required - numbers.keys():
        attributes.refuse(f"rope scaling {kind!r} lacks {sorted(missing)}")
    if unknown := {n for n in numbers.keys() - required - optional if numbers[n] is not None}:
        attributes.refuse(f"rope scaling {kind!r} has {sorted(unknown)}, which it does not know")
    scaling = RopeScaling(kind=kind, numbers=tuple((name, _as_float(v)) for name, v in sorted(numbers.items())))
    return Rope(theta=rope_theta, dim=dim, max_positions=max_positions, scaling=scaling)


def _as_float(value: Any) -> Any:
    """JSON's whole numbers as floats, lists as tuples."""
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    return float(value) if type(value) is int else value
