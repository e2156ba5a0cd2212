"""A tiny random model, and a tokenizer of bytes, for tests of inference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import combine, partition
from qlora_jax.nn.rope import Rope

VOCAB = 257  # bytes and an end token
MAX_POSITIONS = 600


def tiny_config(max_positions: int = MAX_POSITIONS) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        norm_eps=1e-5,
        rope=Rope(theta=10000.0, dim=8, max_positions=max_positions),
        tie_embeddings=True,
        max_positions=max_positions,
    )


def tiny_parts(seed: int = 0, max_positions: int = MAX_POSITIONS, **changes: Any):
    """The parts of a model with random dense f32 weights and adapters that do something.

    Args:
      changes: fields of the config.
    """
    weights = WeightFormat(quant_type=None, dtype="float32")

    def build() -> CausalLM:
        model = CausalLM(dataclasses.replace(tiny_config(max_positions), **changes), weights)
        attach_method(model, LoraArgs(rank=2), jax.random.key(0))
        return model

    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    random = jax.tree.map(lambda leaf: jnp.array(rng.standard_normal(leaf.shape) * 0.3, jnp.float32), shapes)
    return partition(nnx.merge(graphdef, random))


@jax.jit
def _logits(parts, ids_1T):
    model = combine(parts)
    return model.head.logits(model.hidden(ids_1T))


def full_logits(parts, ids: list[int]) -> jax.Array:
    """f32 logits [T, V] of one row, without a cache; padded to one length, which no earlier token sees."""
    padded = np.zeros((1, MAX_POSITIONS), np.int32)
    padded[0, : len(ids)] = ids
    return _logits(parts, padded)[: len(ids)]


def byte_tokenizer() -> Tokenizer:
    """A token a byte, ids in an order of their own, and one special token, <end>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(
        backend=backend,
        exported=backend.to_str(),
        chat_template=None,
        special_tokens={"eos_token": "<end>"},
        add_bos_token=False,
    )
