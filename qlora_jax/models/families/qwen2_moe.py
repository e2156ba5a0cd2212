"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts and a gated shared expert in its sparse layers."""

from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import DEFAULT_COUNTS, Attributes, NotNegative, experts_from_hf, sparse_layers
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import FULL, SLIDING, layer_types, windows_of

MODEL_TYPES = ("qwen2_moe",)

ONLY = {"hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 16}
NAMES = (("mlp.shared_experts", "mlp.shared_expert"),)


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    experts = experts_from_hf(
        attributes,
        sparse_layers(attributes),
        attributes.integer("num_experts", DEFAULT_COUNTS["qwen2_moe"]),
        4,
        mlp_dim=attributes.integer("moe_intermediate_size", 1408),
        normalize=attributes.boolean("norm_topk_prob", False),
        shared_mlp_dim=attributes.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    features = {"qkv_bias": attributes.boolean("qkv_bias", True), "windows": _windows(attributes)}
    model = decoder_from_hf(attributes, DEFAULTS, experts=experts, names=NAMES, **features)
    attributes.finish()
    return model


def _windows(attributes: Attributes) -> tuple[int | None, ...]:
    """Returns a window in every second layer, from the first, before layer `max_window_layers`."""
    layers, last = attributes.integer("num_hidden_layers"), attributes.number("max_window_layers", 28, NotNegative)
    attributes.ignore(["sliding_window"])  # without a window, transformers 5 saves 0
    slide = attributes.boolean("use_sliding_window", False)
    window = attributes.window("sliding_window", 4096) if slide else None
    slides = [window is not None and layer % 2 == 0 and layer < last for layer in range(layers)]
    return windows_of(attributes, layer_types(attributes, [SLIDING if s else FULL for s in slides]), window)
