"""The Phi family: Phi-1, 1.5 and 2. Attention and MLP share one LayerNorm and have a parallel residual."""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import Part, rope_from_hf

MODEL_TYPES = ("phi",)

ONLY = {"qk_layernorm": False, "tie_word_embeddings": False}  # a tied head would still have a bias
DEFAULTS = {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
FEATURES = {
    "layout": "parallel, one norm",
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "names": (
        ("self_attn.o_proj", "self_attn.dense"),
        ("mlp.up_proj", "mlp.fc1"),
        ("mlp.down_proj", "mlp.fc2"),
        ("model.norm", "model.final_layernorm"),
    ),
}


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    activation = attributes.activation("hidden_act", "gelu_new")
    rope = functools.partial(rope_from_hf, attributes, partial=attributes.number("partial_rotary_factor", 0.5, Part))
    model = decoder_from_hf(attributes, DEFAULTS, eps="layer_norm_eps", rope=rope, activation=activation, **FEATURES)
    attributes.finish()
    return model
