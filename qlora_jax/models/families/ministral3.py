"""Ministral 3, the text model: a Llama with yarn scaling, whose queries grow with their position."""

import dataclasses
import functools
from collections.abc import Mapping

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import Attributes, NotNegative
from qlora_jax.models.families.llama import decoder_from_hf
from qlora_jax.models.families.rope_config import SLIDING, Base, RopeNumbers, rope_of, windows_of
from qlora_jax.nn.rope import QueryPositionScale

MODEL_TYPES = ("ministral3",)

ONLY = {"hidden_act": "silu", "layer_types": None}
DEFAULTS = {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# The growth of queries, and the context of the whole model, which transformers does not read here.
NOT_OF_ROPE = ("llama_4_scaling_beta", "max_position_embeddings")


class MinistralRope(RopeNumbers, total=False):
    """The numbers of `rope_parameters`, with the growth of queries."""

    llama_4_scaling_beta: NotNegative
    max_position_embeddings: int


def from_hf(config: Mapping[str, object], name: str) -> ModelConfig:
    """Maps a Hugging Face config of this family to features.

    Raises:
      ValueError: all attributes that the family does not support.
    """
    attributes = Attributes(config, name)
    attributes.require_only(ONLY)
    window, layers = attributes.window("sliding_window", None), attributes.integer("num_hidden_layers")
    windows = windows_of(attributes, [SLIDING] * layers, window) if window else ()
    new, old = (attributes.mapping(name, MinistralRope) for name in ("rope_parameters", "rope_scaling"))
    if new and old:
        attributes.refuse("rope_parameters and rope_scaling are both given: remove one")
    given = new or old or ROPE
    rope = functools.partial(
        rope_of,
        attributes,
        {key: value for key, value in given.items() if key not in NOT_OF_ROPE},
        theta=attributes.number("rope_theta", 10000.0, Base),
    )
    model = decoder_from_hf(attributes, DEFAULTS, rope=rope, windows=windows)
    beta, original = given.get("llama_4_scaling_beta"), given.get("original_max_position_embeddings")
    if beta is None or original is None:
        attributes.refuse("rope_parameters: llama_4_scaling_beta or original_max_position_embeddings is missing")
    attributes.finish()
    growth = QueryPositionScale(beta=float(beta), period=int(original)) if beta and original else None
    return dataclasses.replace(model, query_position_scale=growth)
