"""The GPT-NeoX family: GPT-NeoX-20B and Pythia.

It has LayerNorms, partial rotation, one projection for queries, keys and values, and by default a parallel residual.
"""

import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import Base, Part, rope_from_hf

MODEL_TYPES = ("gpt_neox",)

DEFAULTS = {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5}
NAMES = (
    ("model.embed_tokens", "gpt_neox.embed_in"),
    ("model.layers", "gpt_neox.layers"),
    ("model.norm", "gpt_neox.final_layer_norm"),
    ("lm_head", "embed_out"),
    ("self_attn.qkv_proj", "attention.query_key_value"),
    ("self_attn.o_proj", "attention.dense"),
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    bias = attributes.boolean("attention_bias", True)
    theta, part = attributes.number("rotary_emb_base", 10000.0, Base), attributes.number("rotary_pct", 0.25, Part)
    model = decoder_from_hf(
        attributes,
        DEFAULTS,
        eps="layer_norm_eps",
        rope=functools.partial(rope_from_hf, attributes, theta=theta, partial=part),
        layout="parallel" if attributes.boolean("use_parallel_residual", True) else "pre",
        norm="layer",
        activation=attributes.activation("hidden_act", "gelu"),
        gated=False,
        fused_qkv="heads",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        names=NAMES,
    )
    attributes.finish()
    return model
