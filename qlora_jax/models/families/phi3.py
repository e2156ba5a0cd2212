"""The Phi-3 family: Phi-3, 3.5 and 4, dense models. A Llama with fused projections."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import SLIDING, Part, rope_from_hf, windows_of
from qlora_jax.nn.rope import Rope

MODEL_TYPES = ("phi3",)

ONLY = {"hidden_act": "silu", "attention_bias": False, "layer_types": None, "mlp_bias": False, "lm_head_bias": False}
ONLY |= {"full_attn_mod": 1, "interpolate_factor": 1}  # as in Phi-4-mini
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    window, layers = attributes.window("sliding_window", None), attributes.integer("num_hidden_layers")
    windows = windows_of(attributes, [SLIDING] * layers, window) if window else ()
    rope = functools.partial(_rope, attributes)
    features = {"fused_qkv": "parts", "fused_gate_up": True, "windows": windows}
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, **features)
    attributes.finish()
    return model


def _rope(attributes: Attributes, head_dim: int, max_positions: int) -> Rope:
    """Reads the rope; the top-level original context length overrides the one in LongRoPE's numbers."""
    original = attributes.integer("original_max_position_embeddings", 4096)
    numbers = {"original_max_position_embeddings": original}
    partial = attributes.number("partial_rotary_factor", 1.0, Part)
    return rope_from_hf(attributes, head_dim, max_positions, partial=partial, longrope=numbers)
