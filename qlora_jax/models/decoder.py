"""The one decoder: stacked layers, scanned, for training and for decoding with a cache.

Attribute paths equal Hugging Face names with the layer's index left out, so that `model.layers.self_attn.q_proj`
holds, stacked on a leading axis, what is `model.layers.{i}.self_attn.q_proj` there.

Dimension key: B batch, T positions, S cache slots, D embed, N q-heads, K kv-heads, H head_dim, F mlp, V vocab,
L layers, M = B T.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.skeleton import frozen_linear_leaves
from qlora_jax.nn.attention import cached_attention, causal_attention
from qlora_jax.nn.linear import QLinear, project
from qlora_jax.nn.mlp import swiglu
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.rope import rotate, rotations
from qlora_jax.nn.variables import Frozen

# What jax.checkpoint keeps of a layer besides its input. `none`: all that autodiff wants. `names`: what products gave,
# so that norms and activations alone are computed again. `full`: nothing. `offload`: as `full`, and the input waits in
# host memory: it goes there while the next layer is computed, and comes back while a later one is differentiated.
SAVED_NAMES = (
    *("query", "key", "value", "attention_out", "attention_lse", "attention_residual"),
    *("mlp_gate", "mlp_up", "lora_xa"),
)
LAYER_INPUT = "layer_input"
REMAT_POLICIES = {
    "none": None,
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the positions seen so far: k, v [L, B, K, S, H], keys already rotated."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        """Room for `slots` positions of each of `batch` rows."""
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand: index [B, T], and the rotations of each."""

    index_BT: jax.Array
    cos_BTJ: jax.Array
    sin_BTJ: jax.Array


jax.tree_util.register_dataclass(Positions)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k, v and o are adaptable projections."""

    def __init__(self, linears: dict[str, QLinear], config: ModelConfig):
        self.q_proj, self.k_proj = linears["q_proj"], linears["k_proj"]
        self.v_proj, self.o_proj = linears["v_proj"], linears["o_proj"]
        self.config = config

    def __call__(self, x_MD, positions: Positions, layer, key, cache: KVCache | None):
        config = self.config
        batch, length = positions.index_BT.shape
        heads = (batch, length, -1, config.head_dim)
        projections = project([self.q_proj, self.k_proj, self.v_proj], x_MD, layer, key)
        q, k, v = (y.reshape(heads) for y in projections)
        with jax.named_scope("rope"):
            q, k = (rotate(x, positions.cos_BTJ, positions.sin_BTJ) for x in (q, k))
        scale = config.head_dim**-0.5
        if cache is None:
            q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
            with jax.named_scope("attention"):
                out_BTNH = causal_attention(q, k, v, scale)
        else:
            cache = _write(cache, layer, k, v, positions.index_BT)
            k_BKSH, v_BKSH = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (cache.k, cache.v))
            out_BTNH = cached_attention(q, k_BKSH, v_BKSH, positions.index_BT, scale)
        out_MD = out_BTNH.reshape(batch * length, -1)
        return self.o_proj(out_MD, layer, key), cache


def _write(cache: KVCache, layer: jax.Array, k: jax.Array, v: jax.Array, index_BT: jax.Array) -> KVCache:
    """The cache with each row's keys and values put at that row's positions, in place inside the scan."""
    rows_B1 = jnp.arange(index_BT.shape[0])[:, None]
    put = [x.at[layer, rows_B1, :, index_BT].set(new.astype(x.dtype)) for x, new in ((cache.k, k), (cache.v, v))]
    return KVCache(k=put[0], v=put[1])


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, linears: dict[str, QLinear]):
        self.gate_proj, self.up_proj, self.down_proj = (linears[n] for n in ("gate_proj", "up_proj", "down_proj"))

    def __call__(self, x_MD, layer, key):
        gate_MF, up_MF = project([self.gate_proj, self.up_proj], x_MD, layer, key)
        gate_MF, up_MF = checkpoint_name(gate_MF, "mlp_gate"), checkpoint_name(up_MF, "mlp_up")
        with jax.named_scope("swiglu"):
            hidden_MF = swiglu(gate_MF, up_MF)
        return self.down_proj(hidden_MF, layer, key)


class Block(nnx.Module):
    """Pre-norm attention and MLP; base leaves hold all layers, adapters one layer inside the scan."""

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        def group(prefix: str) -> dict[str, QLinear]:
            names = [name for name in config.linear_shapes() if name.startswith(prefix)]
            return {name.removeprefix(prefix): _qlinear(name, config, weights) for name in names}

        ones = jnp.ones((config.num_layers, config.embed_dim), weights.dtype)
        self.input_layernorm = RMSNorm(ones, config.norm_eps)
        self.self_attn = Attention(group("self_attn."), config)
        self.post_attention_layernorm = RMSNorm(ones, config.norm_eps)
        self.mlp = MLP(group("mlp."))

    def __call__(self, x_MD, positions: Positions, layer, key, cache: KVCache | None):
        attended, cache = self.self_attn(self.input_layernorm(x_MD, layer), positions, layer, key, cache)
        x_MD = checkpoint_name(x_MD + attended, "attention_residual")
        return x_MD + self.mlp(self.post_attention_layernorm(x_MD, layer), layer, key), cache


def _qlinear(name: str, config: ModelConfig, weights: WeightFormat) -> QLinear:
    shape, has_bias = config.linear_shapes()[name]
    weight, bias = frozen_linear_leaves(config.num_layers, shape, has_bias, weights)
    return QLinear(f"model.layers.{name}", weight, bias)


class Embedding(nnx.Module):
    """A frozen table [V, D]."""

    def __init__(self, table: Float[Array, "V D"]):
        self.weight = Frozen(table)


class Decoder(nnx.Module):
    """Embedding, L blocks in one scan, final norm."""

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        self.config = config
        self.embed_tokens = Embedding(jnp.zeros((config.vocab_size, config.embed_dim), weights.dtype))
        self.layers = Block(config, weights)
        self.norm = RMSNorm(jnp.ones((config.embed_dim,), weights.dtype), config.norm_eps)

    def __call__(self, tokens_BT, index_BT, *, length: int, remat: str, key=None, cache: KVCache | None = None):
        positions = Positions(index_BT, *rotations(self.config.rope, index_BT, length))
        x_MD = self.embed_tokens.weight[...].at[tokens_BT.reshape(-1)].get(mode="promise_in_bounds")
        graphdef, lora, base = nnx.split(self.layers, nnx.LoRAParam, ...)

        def block(carry, per_layer):
            x_MD, cache = carry
            x_MD = checkpoint_name(x_MD, LAYER_INPUT)
            layer, lora_of_layer = per_layer
            layer_key = None if key is None else jax.random.fold_in(key, layer)
            return nnx.merge(graphdef, lora_of_layer, base)(x_MD, positions, layer, layer_key, cache), None

        policy = REMAT_POLICIES[remat]
        body = block if policy is None else jax.checkpoint(block, policy=policy, prevent_cse=False)
        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x_MD, cache), _ = jax.lax.scan(body, (x_MD, cache), (layers, lora))
        return self.norm(x_MD), cache


class CausalLM(nnx.Module):
    """A decoder and its head. All leaves of a new one are placeholders: `io.loader` fills them.

    Args:
      config: the model's features.
      weights: how frozen weights are held.
    """

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        self.config = config
        self.model = Decoder(config, weights)
        if not config.tie_embeddings:
            self.lm_head = Embedding(jnp.zeros((config.vocab_size, config.embed_dim), weights.dtype))

    @property
    def head_VD(self) -> jax.Array:
        """The head's weight: the embedding itself where they are tied."""
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight[...]

    def hidden(
        self, tokens_BT: Int[Array, "B T"], *, remat: str = "none", key: jax.Array | None = None
    ) -> Float[Array, "M D"]:
        """The normalized last hidden state of each token, positions from 0 in each row, causal.

        Padding belongs to the right of a row, where no real token sees it.

        Args:
          remat: a key of REMAT_POLICIES.
          key: dropout's key of this step and micro-batch; None for no dropout.
        """
        batch, length = tokens_BT.shape
        index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return self.model(tokens_BT, index_BT, length=length, remat=remat, key=key)[0]

    def extend(
        self, tokens_BT: Int[Array, "B T"], start_B: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "M D"], KVCache]:
        """Hidden states of tokens that follow `start` earlier ones in each row, and the cache with them in it."""
        index_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        hidden_MD, longer = self.model(tokens_BT, index_BT, length=cache.k.shape[3], remat="none", cache=cache)
        assert longer is not None  # a cache given comes back
        return hidden_MD, longer
