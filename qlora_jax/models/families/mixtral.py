"""Mixtral: a Mistral with experts in every layer; the weights of the chosen experts sum to one."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, experts_from_hf
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import SLIDING, rope_from_hf, windows_of

MODEL_TYPES = ("mixtral",)

ONLY = {"hidden_act": "silu", "router_jitter_noise": 0.0}
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    layers, window = attributes.integer("num_hidden_layers"), attributes.window("sliding_window", None)
    experts = experts_from_hf(
        attributes,
        tuple(range(layers)),
        attributes.integer("num_local_experts", DEFAULT_COUNTS["mixtral"]),
        2,
        mlp_dim=attributes.integer("intermediate_size"),
        normalize=True,
    )
    features = {"windows": windows_of(attributes, [SLIDING] * layers, window) if window else (), "experts": experts}
    rope = functools.partial(rope_from_hf, attributes, theta=1e6)
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, **features)
    attributes.finish()
    return model
