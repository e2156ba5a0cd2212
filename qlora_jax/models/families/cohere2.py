"""Cohere 2 (Command R7B): attention and MLP read one LayerNorm in parallel, and logits are scaled.

Three of four layers have a sliding window and rotate neighbouring pairs; the others have neither.
"""

import dataclasses
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import periodic_windows

MODEL_TYPES = ("cohere2",)

ONLY = {
    "hidden_act": "silu",
    "use_qk_norm": False,
    # transformers does not read these, which published configs have.
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
}
UNUSED = ("layer_switch", "use_parallel_embedding")  # an older name of sliding_window_pattern; how to split a table
DEFAULTS = {"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
FEATURES = {"layout": "parallel, one norm", "norm": "layer without bias", "rope_interleaved": True}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    attributes.ignore(UNUSED)
    bias, scale = attributes.boolean("attention_bias", False), attributes.number("logit_scale", 0.0625)
    # transformers 4.53 to 4.57 save the second name.
    period = attributes.integer("sliding_window_pattern", attributes.integer("_sliding_window_pattern", 4)) or 1
    features = {"windows": periodic_windows(attributes, period), "logit_scale": None if scale == 1.0 else scale}
    model = decoder_from_hf(
        attributes, DEFAULTS, eps="layer_norm_eps", qkv_bias=bias, o_bias=bias, **FEATURES, **features
    )
    if model.num_heads and model.head_dim != model.embed_dim // model.num_heads:
        attributes.refuse(f"head_dim={model.head_dim} is not supported (only hidden_size / num_attention_heads)")
    attributes.finish()
    rotates = [window is not None for window in model.windows] or [False] * model.num_layers
    ropes = () if all(rotates) else tuple(model.rope if rotated else None for rotated in rotates)
    return dataclasses.replace(model, ropes=ropes)
