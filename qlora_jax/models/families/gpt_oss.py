"""gpt-oss: experts in every layer, attention sinks, windows in every second layer, and biases everywhere."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, experts_from_hf
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import FULL, SLIDING, layer_types, rope_from_hf, windows_of
from qlora_jax.nn.router import SOFTMAX_OF_CHOSEN

MODEL_TYPES = ("gpt_oss",)

ONLY = {"hidden_act": "silu"}
UNUSED = ("experts_per_token", "initial_context_length")  # older names of attributes that published configs also have
DEFAULTS = {
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
THETA = 150000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(_with_default_rope(config), name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    layers, bias = attributes.integer("num_hidden_layers"), attributes.boolean("attention_bias", True)
    types = layer_types(attributes, [FULL if layer % 2 else SLIDING for layer in range(layers)])
    experts = experts_from_hf(
        attributes,
        tuple(range(layers)),
        attributes.integer("num_local_experts", DEFAULT_COUNTS["gpt_oss"]),
        4,
        mlp_dim=attributes.integer("intermediate_size"),
        score=SOFTMAX_OF_CHOSEN,
        router_bias=True,
        bias=True,
        interleaved=True,
    )
    model = decoder_from_hf(
        attributes,
        DEFAULTS,
        rope=functools.partial(rope_from_hf, attributes, theta=THETA),
        experts=experts,
        windows=windows_of(attributes, types, attributes.window("sliding_window", 128)),
        attention_sinks=True,
        qkv_bias=bias,
        o_bias=bias,
        activation="clamped_swiglu",
        swiglu_alpha=attributes.number("swiglu_alpha", 1.702),
        swiglu_limit=attributes.number("swiglu_limit", 7.0),
        names=(("mlp.gate", "mlp.router"),),
    )
    attributes.finish()
    return model


def _with_default_rope(config: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the config with transformers' default scaling if it has none."""
    has_rope = any(config.get(name) is not None for name in ("rope_parameters", "rope_scaling"))
    return config if has_rope else {**config, "rope_parameters": YARN}
